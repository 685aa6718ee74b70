"""Scores from the rewards' own thread are those of one call; pictures do not wait for them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mixgrpo.rewards import (
    RewardError,
    ScoreStream,
    Scoring,
    build_reward,
    check_failures,
    resident,
    score,
)
from mixgrpo.rewards.weights import move_frozen

SHAPES = Path(__file__).resolve().parents[2] / "data" / "shapes"

CPU = torch.device("cpu")
IMAGES = torch.rand(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
TEXTS = list("abcdefg")


class Batches:
    """A reward whose score depends on the whole call, and which remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        self.calls.append("".join(texts))
        return images.mean((1, 2, 3)) + images.std()


def streamed(rewards: dict, micro_batch: int, sizes: Sequence[int]) -> Scoring:
    stream = ScoreStream(rewards, micro_batch, CPU)
    texts = iter(TEXTS)
    for images in IMAGES.split(list(sizes)):
        stream.submit(images, [next(texts) for _ in images])
    return stream.result()


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("sizes", [(7,), (1,) * 7, (3, 3, 1), (2, 5)])
def test_equals_one_call_whatever_the_pieces(micro_batch: int, sizes: tuple[int, ...]) -> None:
    whole, pieces = Batches(), Batches()
    expected = score({"z": whole, "a": whole}, IMAGES, TEXTS, micro_batch)
    found = streamed({"z": pieces, "a": pieces}, micro_batch, sizes).scores
    assert list(found) == ["z", "a"]
    for name, values in expected.items():
        assert torch.equal(found[name], values)
    assert sorted(pieces.calls) == sorted(whole.calls)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("sizes", [(7,), (1,) * 7, (3, 3, 1), (2, 5)])
def test_metadata_stays_with_its_image(micro_batch: int, sizes: tuple[int, ...]) -> None:
    def told(images: Tensor, texts: Sequence[str], metadata: list[dict]) -> Tensor:
        assert [each.get("text", "a") for each in metadata] == texts
        return images.mean((1, 2, 3)) + torch.tensor([each.get("n", 0) for each in metadata])

    metadata = [{"n": i, "text": text} if i else {} for i, text in enumerate(TEXTS)]
    stream = ScoreStream({"told": told}, micro_batch, CPU)
    start = 0
    for images in IMAGES.split(list(sizes)):
        part = slice(start, start + len(images))
        stream.submit(images, TEXTS[part], metadata[part])
        start = part.stop
    expected = IMAGES.mean((1, 2, 3)) + torch.arange(7)
    torch.testing.assert_close(stream.result().scores["told"], expected)


def test_pictures_do_not_wait_for_their_scores() -> None:
    """Everything is submitted while the reward is still held in its first call."""
    held = threading.Event()

    def slow(images: Tensor, texts: Sequence[str]) -> Tensor:
        assert held.wait(30)
        return torch.ones(len(images))

    stream = ScoreStream({"slow": slow}, 1, CPU)
    for i in range(7):
        stream.submit(IMAGES[i : i + 1], TEXTS[i : i + 1])
    held.set()
    assert stream.result().scores["slow"].tolist() == [1.0] * 7
    assert stream.busy > 0
    assert stream.waited > 0
    stream.busy, stream.waited = 3.0, 1.0
    assert stream.hidden == 2.0
    stream.busy = 0.5  # what was waited for was not all scoring
    assert stream.hidden == 0.0


def test_what_a_reward_raises_comes_out_of_result() -> None:
    def broken(images: Tensor, texts: Sequence[str]) -> Tensor:
        raise ConnectionError("away")

    with pytest.raises(RewardError, match=r"'broken' failed .* ConnectionError: away"):
        streamed({"broken": broken}, 2, (7,))


def test_a_failed_micro_batch_is_nan_and_its_cause_is_known() -> None:
    def picky(images: Tensor, texts: Sequence[str]) -> Tensor:
        if "c" in texts:
            raise TimeoutError("too slow")
        return torch.ones(len(images))

    found = streamed({"picky": picky}, 2, (3, 4))
    assert found.scores["picky"].isnan().tolist() == [False, False, True, True] + [False] * 3
    assert found.causes == {"picky": "TimeoutError: too slow"}


def test_nothing_submitted_gives_no_scores() -> None:
    assert ScoreStream({"r": Batches()}, 2, CPU).result().scores["r"].shape == (0,)


def test_a_reward_that_fails_too_often_is_an_error_with_its_cause() -> None:
    half = Scoring({"r": torch.tensor([1.0, torch.nan])}, {"r": "TimeoutError: too slow"})
    check_failures(half, 0.5)
    with pytest.raises(RewardError, match=r"'r' gave no score for 1 of 2.*0\.4\).*too slow"):
        check_failures(half, 0.4)
    with pytest.raises(RewardError, match="the log above"):
        check_failures(Scoring(half.scores, {}), 0)


class Movable:
    def __init__(self) -> None:
        self.device = CPU

    def to(self, device: torch.device) -> None:
        self.device = device


def test_off_loaded_rewards_are_on_the_device_only_to_score() -> None:
    movable, meta = Movable(), torch.device("meta")
    rewards = {"movable": movable, "function": Batches()}
    with resident(rewards, "offload", meta):
        assert movable.device == meta
    assert movable.device == CPU
    with pytest.raises(KeyError), resident(rewards, "offload", meta):
        raise KeyError
    assert movable.device == CPU
    for placement in ("device", "cpu"):
        with resident(rewards, placement, meta):
            assert movable.device == CPU


@pytest.mark.parametrize("name", ["hpsv2", "pickscore", "imagereward"])
def test_a_reward_comes_back_to_the_tensors_that_it_left(name: str) -> None:
    """Copying weights that never change back from the GPU would take seconds per iteration."""
    reward = build_reward(name, {"model": str(SHAPES / name)}, CPU)
    module = reward.clip.model if name == "hpsv2" else reward.model
    before = {key: value.data_ptr() for key, value in module.state_dict().items()}
    expected = reward(IMAGES, TEXTS)
    reward.to(torch.device("meta"))
    assert {value.device.type for value in module.state_dict().values()} == {"meta"}
    reward.to(CPU)
    assert {key: value.data_ptr() for key, value in module.state_dict().items()} == before
    assert torch.equal(reward(IMAGES, TEXTS), expected)


def test_shared_weights_stay_shared_on_the_way() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[1].weight = module[0].weight
    for device in ("meta", "cpu"):
        move_frozen(module, torch.device(device))
        assert module[0].weight is module[1].weight
        assert module[2].running_mean.device.type == device
