"""Run every reward over a batch of images, a micro-batch at a time."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixgrpo.rewards.protocol import Reward

logger = logging.getLogger(__name__)

# The rewards that have returned a score before, by id (a reward need not be hashable). One that
# has worked may fail for a while (a remote service, memory); one that never has is a mistake.
_PROVEN: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class RewardError(RuntimeError):
    """A reward does not work: its configuration, code or service is at fault, not a sample."""


class Failure(NamedTuple):
    """The samples of one micro-batch, and what the reward raised on them."""

    samples: slice
    cause: Exception


class Scoring(NamedTuple):
    """Scores by reward, [B] each, and for rewards that raised, the first thing they raised."""

    scores: dict[str, Tensor]
    causes: dict[str, str]


def score(
    rewards: Mapping[str, Reward], images: Tensor, texts: Sequence[str], micro_batch: int
) -> dict[str, Tensor]:
    """Reward name -> [B] float32 on the images' device, in the mapping's order.

    images [B, 3, H, W] in [0, 1], B texts. A micro-batch whose reward raises becomes NaN and the
    first cause is logged; so does a sample whose image or score is not finite.

    Raises:
        RewardError: a reward failed on every sample and has never worked before.
        torch.OutOfMemoryError: the GPU is too small.
        ValueError: inputs that do not fit, or a reward that does not return [B] numbers.
    """
    return score_and_tell(rewards, images, texts, micro_batch).scores


@torch.no_grad()
def score_and_tell(
    rewards: Mapping[str, Reward], images: Tensor, texts: Sequence[str], micro_batch: int
) -> Scoring:
    """As ``score``, with the causes of failures."""
    _check_inputs(images, texts, micro_batch)
    finite = images.isfinite().flatten(1).all(1)
    scored = Scoring({}, {})
    for name, reward in rewards.items():
        values, failures = _score_one(name, reward, images, list(texts), micro_batch)
        scored.scores[name] = values.masked_fill(~(finite & values.isfinite()), float("nan"))
        if failures:
            cause = failures[0].cause
            scored.causes[name] = f"{type(cause).__name__}: {cause}"
    return scored


def _score_one(
    name: str, reward: Reward, images: Tensor, texts: list[str], micro_batch: int
) -> tuple[Tensor, list[Failure]]:
    """[B] float32, NaN where the reward raised; and where it raised what."""
    values = torch.full([len(texts)], float("nan"), device=images.device)
    failures: list[Failure] = []
    starts = range(0, len(texts), micro_batch)
    for start in starts:
        part = slice(start, min(start + micro_batch, len(texts)))
        try:
            result = reward(images[part], texts[part])
        except torch.OutOfMemoryError:
            raise  # no sample's fault
        except Exception as error:
            failures.append(Failure(part, error))
            continue
        values[part] = _checked(name, result, part.stop - part.start).to(values)
    if len(failures) < len(starts):
        # An object that allows no weak reference stays unproven: stricter, never wrong.
        with contextlib.suppress(TypeError):
            _PROVEN[id(reward)] = reward
    if failures:
        _report(name, reward, failures, len(starts))
    return values, failures


def check_failures(scoring: Scoring, most: float) -> None:
    """Raises RewardError if a reward gave no score for more than this share of the samples."""
    for name, values in scoring.scores.items():
        failed, count = int(values.isnan().sum()), values.numel()
        if failed > most * count:
            cause = scoring.causes.get(name, "the log above or another process's says why")
            raise RewardError(
                f"reward {name!r} gave no score for {failed} of {count} pictures, more than "
                f"scoring.max_failed ({most:g}) of them: {cause}"
            )


def _report(name: str, reward: Reward, failures: list[Failure], micro_batches: int) -> None:
    part, cause = failures[0]
    if len(failures) == micro_batches and _PROVEN.get(id(reward)) is not reward:
        raise RewardError(
            f"reward {name!r} failed on every sample of its first batch: "
            f"{type(cause).__name__}: {cause}"
        ) from cause
    logger.warning(
        "reward %s failed on %d of %d micro-batches (their scores are NaN); the first, samples "
        "%d-%d, by %s: %s",
        *(name, len(failures), micro_batches, part.start, part.stop - 1),
        *(type(cause).__name__, cause),
    )


def _check_inputs(images: Tensor, texts: Sequence[str], micro_batch: int) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
    if isinstance(texts, str) or len(texts) != len(images):
        count = "one string" if isinstance(texts, str) else len(texts)
        raise ValueError(f"{len(images)} images need as many texts, got {count}")
    if micro_batch < 1:
        raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")


def _checked(name: str, result: Any, expected: int) -> Tensor:
    if not isinstance(result, Tensor) or result.shape != (expected,):
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(
            f"reward {name!r} must return a tensor of shape [{expected}], one score per image, "
            f"got {got}"
        )
    return result
