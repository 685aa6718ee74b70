"""Micro-batches, failures and the checks of ``score``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixgrpo.rewards import depends_on_metadata, score, takes_metadata
from mixgrpo.rewards.ocr import Ocr
from mixgrpo.rewards.vlm import Vlm

IMAGES = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 3, 4, 4).contiguous()
TEXTS = list("abcde")


def brightness(images: Tensor, texts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


class FailsOn:
    """Brightness, but raises when it sees one of ``texts``."""

    def __init__(self, texts: str) -> None:
        self.texts = texts
        self.batches: list[int] = []

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        self.batches.append(len(texts))
        if set(texts) & set(self.texts):
            raise ConnectionError("the service is away")
        return brightness(images, texts)


@pytest.mark.parametrize("micro_batch", [1, 2, 5, 100])
def test_micro_batches_do_not_change_the_scores(micro_batch: int) -> None:
    scores = score({"bright": brightness}, IMAGES, TEXTS, micro_batch)
    torch.testing.assert_close(scores["bright"], torch.linspace(0, 1, 5))


def test_micro_batches_have_the_size_asked_for() -> None:
    reward = FailsOn("")
    score({"r": reward}, IMAGES, TEXTS, 2)
    assert reward.batches == [2, 2, 1]


def test_order_is_the_mappings_and_scores_are_float32_without_gradient() -> None:
    rewards = {"z": brightness, "a": lambda i, t: brightness(i, t).double(), "m": brightness}
    scores = score(rewards, IMAGES.clone().requires_grad_(), TEXTS, 2)
    assert list(scores) == ["z", "a", "m"]
    for values in scores.values():
        assert values.dtype == torch.float32
        assert not values.requires_grad


def test_a_failed_micro_batch_is_nan_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        scores = score({"r": FailsOn("ae"), "ok": brightness}, IMAGES, TEXTS, 2)
    assert scores["r"].isnan().tolist() == [True, True, False, False, True]
    assert not scores["ok"].isnan().any()
    (record,) = caplog.records
    assert "reward r failed on 2 of 3 micro-batches" in record.getMessage()
    assert "on samples 0-1, was ConnectionError: the service is away" in record.getMessage()


def test_a_reward_that_never_worked_stops_the_run() -> None:
    with pytest.raises(RuntimeError, match=r"'r' failed on every sample.*service is away") as info:
        score({"r": FailsOn("abcde")}, IMAGES, TEXTS, 2)
    assert isinstance(info.value.__cause__, ConnectionError)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("!"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory", 2),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
    ],
    ids=["torch", "cuBLAS", "CUDA", "a kernel failed"],
)
def test_a_gpu_that_is_too_small_or_lost_is_no_samples_fault(error: RuntimeError) -> None:
    def large(images: Tensor, texts: Sequence[str]) -> Tensor:
        if texts[0] == "a":
            return torch.zeros(len(images))  # it has worked before
        raise error

    with pytest.raises(type(error)) as info:
        score({"r": large}, IMAGES, TEXTS, 2)
    assert info.value is error


def test_a_servers_memory_is_not_this_ones() -> None:
    """A judge's server says what happened to it; the training goes on."""

    class JudgeError(RuntimeError):
        pass

    def judge(images: Tensor, texts: Sequence[str]) -> Tensor:
        if texts[0] == "a":
            return torch.zeros(len(images))
        raise JudgeError("HTTP 500: CUDA out of memory")

    assert score({"r": judge}, IMAGES, TEXTS, 2)["r"].isnan().tolist() == [False] * 2 + [True] * 3


def test_a_reward_that_has_worked_may_fail_entirely() -> None:
    reward = FailsOn("x")
    score({"r": reward}, IMAGES, TEXTS, 2)
    reward.texts = "abcde"
    assert score({"r": reward}, IMAGES, TEXTS, 2)["r"].isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_image_or_score_is_nan_for_that_sample_alone(bad: float) -> None:
    images = IMAGES.clone()
    images[1, 0, 2, 2] = bad
    scores = score(
        {
            "zero": lambda images, texts: torch.zeros(len(images)),
            "bad": lambda images, texts: torch.tensor([bad if t == "d" else 0.0 for t in texts]),
        },
        images,
        TEXTS,
        5,
    )
    assert scores["zero"].isnan().tolist() == [False, True, False, False, False]
    assert scores["bad"].isnan().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("reward", "got"),
    [
        (lambda images, texts: torch.zeros(len(images), 1), r"\[2, 1\]"),
        (lambda images, texts: torch.zeros(()), r"got \[\]"),
        (lambda images, texts: [0.0] * len(images), "got list"),
    ],
)
def test_a_result_of_the_wrong_shape_is_an_error(reward: object, got: str) -> None:
    with pytest.raises(ValueError, match=r"'r' must return a tensor of shape \[2\].*" + got):
        score({"r": reward}, IMAGES, TEXTS, 2)  # type: ignore[dict-item]


def test_inputs_are_checked() -> None:
    with pytest.raises(ValueError, match="5 images need the same number of texts, got 4"):
        score({}, IMAGES, TEXTS[:4], 2)
    with pytest.raises(ValueError, match="got one string"):
        score({}, IMAGES, "abcde", 2)
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\], got \[3, 4, 4\]"):
        score({}, IMAGES[0], TEXTS, 2)
    with pytest.raises(ValueError, match="micro_batch must be at least 1, got 0"):
        score({}, IMAGES, TEXTS, 0)


# ---- metadata of prompts

METADATA = [{"n": i, "list": [i]} for i in range(5)]


def numbers(images: Tensor, texts: Sequence[str], metadata: list[dict]) -> Tensor:
    return torch.tensor([float(each["n"]) for each in metadata])


class Told:
    def __call__(self, images: Tensor, texts: Sequence[str], *, metadata: object = None) -> Tensor:
        return numbers(images, texts, metadata)


class Module(nn.Module):
    def forward(self, images: Tensor, texts: Sequence[str], metadata: object = None) -> Tensor:
        return numbers(images, texts, metadata)


class Called(nn.Module):
    """Its own call takes metadata, whatever its forward takes."""

    def forward(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        raise AssertionError

    def __call__(self, images: Tensor, texts: Sequence[str], metadata: list[dict]) -> Tensor:
        return numbers(images, texts, metadata)


class Untold:
    """Its constructor's parameter is an option."""

    def __init__(self, metadata: object = None) -> None:
        pass

    def __call__(self, images: Tensor, texts: Sequence[str], **more: object) -> Tensor:
        assert not more
        return brightness(images, texts)


@functools.wraps(numbers)
def decorated(*arguments: Any, **named: Any) -> Tensor:
    return numbers(*arguments, **named)


@pytest.mark.parametrize(
    "reward",
    [numbers, Told(), Module(), Called(), decorated, functools.partial(numbers), Told().__call__],
)
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_a_reward_with_the_parameter_receives_metadata(reward: Any, micro_batch: int) -> None:
    assert takes_metadata(reward)
    rewards = {"told": reward, "untold": Untold(), "plain": brightness}
    scores = score(rewards, IMAGES, TEXTS, micro_batch, METADATA)
    assert scores["told"].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(scores["untold"], scores["plain"])


def test_which_classes_and_functions_are_told() -> None:
    assert all(map(takes_metadata, (Told, Module, Called)))
    assert not any(map(takes_metadata, (Untold, Untold(), brightness, nn.Linear, print, dict)))


def test_which_scores_depend_on_metadata() -> None:
    assert depends_on_metadata(Told, {"anything": 1})
    assert not depends_on_metadata(Untold, {})
    for kind in (Ocr, Vlm):
        assert not depends_on_metadata(kind, {"threads": 2})
        assert depends_on_metadata(kind, {"key": "text"})


def test_prompts_without_metadata_have_empty_dicts() -> None:
    seen = []

    def reward(images: Tensor, texts: Sequence[str], metadata: list[dict]) -> Tensor:
        seen.append(metadata)
        return torch.zeros(len(images))

    score({"r": reward}, IMAGES, TEXTS, 3)
    assert seen == [[{}] * 3, [{}] * 2]


def test_a_reward_may_change_what_it_receives() -> None:
    """Samples of a prompt share its metadata, with each other and with later iterations."""
    shared = {"n": 1, "list": [3]}

    def greedy(images: Tensor, texts: Sequence[str], metadata: list[dict]) -> Tensor:
        return torch.tensor([float(each.pop("n") + each["list"].pop()) for each in metadata])

    rewards = {"first": greedy, "second": greedy}
    scores = score(rewards, IMAGES, TEXTS, 5, [shared] * 5)
    assert scores["first"].tolist() == scores["second"].tolist() == [4] * 5
    assert shared == {"n": 1, "list": [3]}


def test_metadata_is_counted() -> None:
    with pytest.raises(ValueError, match="5 images need metadata as often, got 4"):
        score({}, IMAGES, TEXTS, 2, METADATA[:4])


def test_no_rewards_and_no_samples() -> None:
    assert score({}, IMAGES, TEXTS, 2) == {}
    assert score({"r": brightness}, IMAGES[:0], [], 2)["r"].shape == (0,)
