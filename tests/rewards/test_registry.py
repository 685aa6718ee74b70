"""From names and options to rewards, and every way to get them wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixgrpo.rewards import build_reward, score
from mixgrpo.rewards.jpeg_size import JpegSize

OWN = """
import torch

def red(images, texts):
    return images[:, 0].mean((1, 2))

class Channel:
    def __init__(self, index, device):
        self.index, self.device = index, device

    def __call__(self, images, texts):
        return images[:, self.index].mean((1, 2))

class Anything:
    def __init__(self, **options):
        self.options = options

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with rewards of the user's own."""
    (tmp_path / "own_rewards_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_rewards_of_a_test"


def test_a_known_name_with_options() -> None:
    reward = build_reward("jpeg_size", {"compressible": False})
    assert isinstance(reward, JpegSize)
    assert reward.sign == 1


def test_a_function_and_a_class_of_the_users_own(own: str) -> None:
    rewards = {
        "red": build_reward(f"{own}:red", {}),
        "blue": build_reward(f"{own}:Channel", {"index": 2}, "cpu"),
    }
    images = torch.tensor([0.1, 0.2, 0.3])[None, :, None, None].expand(1, 3, 2, 2)
    scores = score(rewards, images, ["x"], 1)
    torch.testing.assert_close(scores["red"], torch.tensor([0.1]))
    torch.testing.assert_close(scores["blue"], torch.tensor([0.3]))
    assert rewards["blue"].device == torch.device("cpu")
    assert build_reward(f"{own}:Anything", {"a": 1}).options == {"a": 1}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hpsv3", r"unknown reward 'hpsv3' \(did you mean 'hpsv2'\?\); .* clip_score, pickscore"),
        ("zzz", "unknown reward 'zzz'; the known rewards are hpsv2"),
        ("a:b c", "not of the form package.module:callable"),
        (":red", "not of the form package.module:callable"),
        ("no_such_module_here:f", "cannot import 'no_such_module_here'.*PYTHONPATH"),
        ("own_rewards_of_a_test:blue", "has no attribute 'blue'"),
        ("own_rewards_of_a_test:number", "holds no callable named 'number'"),
    ],
)
def test_names_that_lead_nowhere(own: str, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_reward(kind, {})


def test_options_that_do_not_fit(own: str) -> None:
    with pytest.raises(ValueError, match=r"'jpeg_size' has no option qualty; .* compressible, qu"):
        build_reward("jpeg_size", {"qualty": 3})
    with pytest.raises(ValueError, match="has no option device"):
        build_reward("hpsv2", {"device": "cuda"})
    with pytest.raises(ValueError, match="'pickscore' needs the option model"):
        build_reward("pickscore", {})
    with pytest.raises(ValueError, match=r"takes no options, got \['a'\]"):
        build_reward(f"{own}:red", {"a": 1})
    with pytest.raises(ValueError, match=r"quality must be in 1..95, got 0"):
        build_reward("jpeg_size", {"quality": 0})
