"""Scoring: evaluates every reward on a batch of images, one micro-batch at a time."""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixgrpo.devices import is_device_lost, is_out_of_memory
from mixgrpo.rewards.protocol import Reward, takes_metadata
from mixgrpo.types import Metadata

logger = logging.getLogger(__name__)

# The rewards that have returned a score before, by id (a reward need not be hashable). A reward
# that has worked before may fail temporarily (a remote service, memory); one that has never worked
# is misconfigured.
_PROVEN: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class RewardError(RuntimeError):
    """A reward does not work because of its configuration, code or service, not of a sample."""


class Failure(NamedTuple):
    """The samples of one micro-batch, and the exception that the reward raised on them."""

    samples: slice
    cause: Exception


class Scoring(NamedTuple):
    """The scores of each reward, [B], and the first exception of each reward that raised one."""

    scores: dict[str, Tensor]
    causes: dict[str, str]


def score(
    rewards: Mapping[str, Reward],
    images: Tensor,
    texts: Sequence[str],
    micro_batch: int,
    metadata: Sequence[Metadata] | None = None,
) -> dict[str, Tensor]:
    """Returns reward name -> [B] float32 on the images' device, in the order of the mapping.

    images [B, 3, H, W] in [0, 1], B texts, and the B prompts' metadata (None: there is none), of
    which rewards that take it receive copies. If a reward raises an exception, the scores of that
    micro-batch are NaN and the first exception is logged. The score of a sample is also NaN if its
    image or score is not finite.

    Raises:
        RewardError: if a reward failed on every sample and has never worked before.
        RuntimeError: if the GPU has too little memory, or a kernel failed on it.
        ValueError: if the shapes of the inputs do not match, or a reward does not return a tensor
            of shape [B].
    """
    return score_and_tell(rewards, images, texts, micro_batch, metadata).scores


@torch.no_grad()
def score_and_tell(
    rewards: Mapping[str, Reward],
    images: Tensor,
    texts: Sequence[str],
    micro_batch: int,
    metadata: Sequence[Metadata] | None = None,
) -> Scoring:
    """Same as ``score``, but also returns the causes of failures."""
    metadata = [{}] * len(texts) if metadata is None else metadata
    _check_inputs(images, texts, metadata, micro_batch)
    finite = images.isfinite().flatten(1).all(1)
    scored = Scoring({}, {})
    for name, reward in rewards.items():
        values, failures = _score_one(name, reward, images, list(texts), metadata, micro_batch)
        scored.scores[name] = values.masked_fill(~(finite & values.isfinite()), float("nan"))
        if failures:
            cause = failures[0].cause
            scored.causes[name] = f"{type(cause).__name__}: {cause}"
    return scored


def _score_one(
    name: str,
    reward: Reward,
    images: Tensor,
    texts: list[str],
    metadata: Sequence[Metadata],
    micro_batch: int,
) -> tuple[Tensor, list[Failure]]:
    """[B] float32, NaN where the reward raised an exception; and the failures."""
    values = torch.full([len(texts)], float("nan"), device=images.device)
    failures: list[Failure] = []
    starts = range(0, len(texts), micro_batch)
    told = takes_metadata(reward)
    for start in starts:
        part = slice(start, min(start + micro_batch, len(texts)))
        # Copies, because the samples of a prompt share its metadata with those of later iterations.
        more = {"metadata": [copy.deepcopy(each) for each in metadata[part]]} if told else {}
        try:
            result = reward(images[part], texts[part], **more)
        except Exception as error:
            if is_out_of_memory(error) or is_device_lost(error):
                raise  # not caused by a sample
            failures.append(Failure(part, error))
            continue
        values[part] = _checked(name, result, part.stop - part.start).to(values)
    if len(failures) < len(starts):
        # An object without support for weak references stays unproven, which is merely stricter.
        with contextlib.suppress(TypeError):
            _PROVEN[id(reward)] = reward
    if failures:
        _report(name, reward, failures, len(starts))
    return values, failures


def check_failures(scoring: Scoring, most: float) -> None:
    """Raises RewardError if a reward gave no score for more than the fraction ``most``."""
    for name, values in scoring.scores.items():
        failed, count = int(values.isnan().sum()), values.numel()
        if failed > most * count:
            cause = scoring.causes.get(name, "see the log above or that of another process")
            raise RewardError(
                f"reward {name!r} gave no score for {failed} of {count} images, more than the "
                f"fraction allowed by scoring.max_failed ({most:g}): {cause}"
            )


def _report(name: str, reward: Reward, failures: list[Failure], micro_batches: int) -> None:
    part, cause = failures[0]
    if len(failures) == micro_batches and _PROVEN.get(id(reward)) is not reward:
        raise RewardError(
            f"reward {name!r} failed on every sample of its first batch: "
            f"{type(cause).__name__}: {cause}"
        ) from cause
    logger.warning(
        "reward %s failed on %d of %d micro-batches (their scores are NaN); the first failure, on "
        "samples %d-%d, was %s: %s",
        *(name, len(failures), micro_batches, part.start, part.stop - 1),
        *(type(cause).__name__, cause),
    )


def _check_inputs(
    images: Tensor, texts: Sequence[str], metadata: Sequence[Metadata], micro_batch: int
) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
    if isinstance(texts, str) or len(texts) != len(images):
        count = "one string" if isinstance(texts, str) else len(texts)
        raise ValueError(f"{len(images)} images need the same number of texts, got {count}")
    if len(metadata) != len(images):
        raise ValueError(f"{len(images)} images need metadata as often, got {len(metadata)}")
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
