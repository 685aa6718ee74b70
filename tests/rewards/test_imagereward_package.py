"""Our ImageReward against the package image-reward 1.5, installed apart and run in its own process.

Where it cannot be installed the tests are skipped, unless MIXGRPO_ORACLE=required, as in CI.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import imagereward as package
from oracles import random_weights
from reward_parity import pictures, to_batch
from torch import Tensor

from mixgrpo.rewards import build_reward
from mixgrpo.rewards.imagereward_model import (
    ImageRewardModel,
    VisionSize,
    to_imagereward_keys,
    used_keys,
)

from . import tiny

SHAPES = Path(__file__).resolve().parents[2] / "data" / "shapes" / "imagereward"
# Cut at 35 tokens, not in the vocabulary, with accents and punctuation; and an empty one.
TEXTS = [*tiny.TEXTS, "A RÉD circle!!", "a red circle " * 20, ""]
# What PIL's rounding to 8 bits changes, at least twice the measured difference.
ROUNDING = 0.13

Jobs = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Every question to the package at once: importing it takes seconds. Name -> job."""
    root = tmp_path_factory.mktemp("package")
    small, full = root / "small", root / "full"
    for folder in (small, full):
        folder.mkdir()
    random_weights.imagereward_files(full)
    for name, content in (("med_config", tiny.MED), ("vision_config", tiny.VISION)):
        (small / f"{name}.json").write_text(json.dumps(content))
    (small / "vocab.txt").write_text("\n".join(tiny.PIECES) + "\n")
    weights = {"do": "weights", "model": small, "tokenizer": small, "seed": 5}
    jobs: Jobs = {
        "names": {"do": "names", "model": full, "tokenizer": full},
        "weights": {**weights, "checkpoint": small / "ImageReward.pt"},
    }
    for shape in ((32, 32), (70, 45)):
        images = [tiny.to_pil(image) for image in tiny.images(len(TEXTS), *shape)]
        folder = root / str(shape)
        folder.mkdir()
        jobs[f"small {shape}"] = package.score_job(
            images, TEXTS, folder, small, small / "ImageReward.pt"
        )
    for shape in ((64, 64), (320, 224)):
        folder = root / str(shape)
        folder.mkdir()
        jobs[f"trained {shape}"] = package.score_job(*pictures(8, *shape, 1), folder, SHAPES)
    return jobs


@pytest.fixture(scope="module")
def answers(asked: Jobs) -> dict[str, Any]:
    """Name of a job -> what the package answered."""
    try:
        found = package.run(list(asked.values()))
    except package.OracleUnavailable as error:
        required = os.environ.get("MIXGRPO_ORACLE") == "required"
        if required and sys.version_info[:2] == (3, 11):
            pytest.fail(f"MIXGRPO_ORACLE=required, and {error}")
        pytest.skip(str(error))
    return dict(zip(asked, found, strict=True))


@pytest.mark.parametrize("shape", [(32, 32), (70, 45)])
def test_scores_with_the_package_s_own_weights(
    shape: tuple[int, int], asked: Jobs, answers: dict[str, Any]
) -> None:
    job = asked[f"small {shape}"]
    expected = torch.tensor(answers[f"small {shape}"])
    # Building it is a test too: a key missing or too many is an error.
    reward = build_reward("imagereward", {"model": str(job["model"])})
    scores = reward(tiny.images(len(TEXTS), *shape), TEXTS)
    _agree(scores, expected, 1e-4 if shape == (32, 32) else ROUNDING)


@pytest.mark.parametrize("shape", [(64, 64), (320, 224)])
def test_scores_of_the_trained_model(shape: tuple[int, int], answers: dict[str, Any]) -> None:
    images, texts = pictures(8, *shape, 1)
    scores = build_reward("imagereward", {"model": str(SHAPES)})(to_batch(images), texts)
    _agree(scores, torch.tensor(answers[f"trained {shape}"]), 1e-4 if shape == (64, 64) else 1e-2)


def _agree(scores: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)
    # The tolerance would not hide a mix-up of samples: they differ by far more.
    assert scores.std() > 5 * tolerance


def test_full_size_has_the_package_s_names_and_shapes(answers: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = ImageRewardModel(VisionSize(), random_weights.MED_CONFIG)
    ours = to_imagereward_keys(model.state_dict())
    theirs = {name: torch.empty(shape, device="meta") for name, shape in answers["names"].items()}
    assert {name: value.shape for name, value in used_keys(theirs).items()} == {
        name: value.shape for name, value in ours.items()
    }
    # What the package has besides is no part of its score.
    rest = {name.rsplit(".", 1)[0] for name in set(theirs) - set(used_keys(theirs))}
    assert rest <= {"blip.vision_proj", "blip.text_proj", "blip.text_encoder.embeddings"}


def test_the_folder_holds_no_second_torch(answers: dict[str, Any]) -> None:
    found = {path.name for path in package.install().iterdir()}
    assert {"ImageReward", "timm", "transformers", "fairscale"} <= found
    assert not {"torch", "torchvision", "numpy", "nvidia"} & found


# --- installing -----------------------------------------------------------------------------------


@pytest.fixture
def python_3_11(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package.sys, "version_info", (3, 11, 7))


@pytest.mark.usefixtures("python_3_11")
def test_is_installed_once_for_each_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = []
    monkeypatch.setattr(package, "_pip", lambda new: (new.mkdir(), installed.append(new)))
    first = package.install(tmp_path)
    assert package.install(tmp_path) == first
    assert len(installed) == 1
    longer = tmp_path / "requirements.txt"
    longer.write_text(package.REQUIREMENTS.read_text() + "six\n")
    monkeypatch.setattr(package, "REQUIREMENTS", longer)
    second = package.install(tmp_path)
    assert second.is_dir()
    assert not first.exists()


@pytest.mark.usefixtures("python_3_11")
def test_pip_s_own_words_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path))):
        monkeypatch.setenv(name, value)
    with pytest.raises(package.OracleUnavailable, match=r"installed by pip: ERROR: .*image-reward"):
        package.install(tmp_path / "oracle")
    assert not list((tmp_path / "oracle").iterdir())  # nothing half-made is left


def test_another_python_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package.sys, "version_info", (3, 12, 1))
    with pytest.raises(package.OracleUnavailable, match=r"Python 3\.11 alone, and this is 3\.12"):
        package.install(tmp_path)


def test_every_requirement_is_pinned() -> None:
    lines = package.REQUIREMENTS.read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "image-reward==1.5" in pins
    assert all("==" in pin for pin in pins)
    assert not any(pin.startswith("torch") for pin in pins)
