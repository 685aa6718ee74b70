"""Each published reward against an independent path from PIL images to the score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import clip
from reward_parity import pictures, to_batch
from torch import Tensor
from torch.nn.functional import normalize

from mixgrpo.rewards import build_reward

from . import tiny
from .blip_oracle import imagereward_by_hand

ROOT = Path(__file__).resolve().parents[2]
Folders = dict[str, Path]
NAMES = ["hpsv2", "clip_score", "pickscore", "imagereward"]
# The models that the Shapes world ships: trained ones, whose scores mean something.
SHAPES = {name: ROOT / "data" / "shapes" / name for name in NAMES} | {
    "clip_score": ROOT / "data" / "shapes" / "clip"
}

# Each takes PIL images, texts and the reward's own options.
ORACLES: dict[str, Callable[..., Tensor]] = {
    "hpsv2": clip.hpsv2,
    "clip_score": clip.clip_score,
    "pickscore": clip.pickscore,
    "imagereward": imagereward_by_hand,
}
# What resizing on tensors changes, at least twice the measured difference: PIL rounds to 8 bits.
ROUNDING = {"hpsv2": 2e-3, "clip_score": 2e-3, "pickscore": 2e-2, "imagereward": 1e-3}
# The trained models tell pictures apart more sharply.
ROUNDING_SHAPES = {"hpsv2": 4e-3, "clip_score": 4e-3, "pickscore": 0.15, "imagereward": 8e-3}
# What bfloat16 changes in the trained models' scores, about twice the measured difference.
BFLOAT16 = {"hpsv2": 6e-3, "clip_score": 6e-3, "pickscore": 0.1, "imagereward": 0.2}
# Long enough to be cut at 16 and at 35 tokens.
TEXTS = [*tiny.TEXTS, " ".join(["a red circle above a green square on gray"] * 5)]


def build(name: str, folders: Folders, **options: Any) -> Any:
    return build_reward(name, {"model": str(folders[name]), **options})


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (96, 61), (64, 70)])
def test_score_is_the_published_path_s(name: str, shape: tuple[int, int], folders: Folders) -> None:
    images = tiny.images(len(TEXTS), *shape)
    scores = build(name, folders)(images, TEXTS)
    pil = [tiny.to_pil(image) for image in images]
    expected = ORACLES[name](pil, TEXTS, model=folders[name])
    assert scores.dtype == torch.float32 and scores.shape == (len(TEXTS),)
    # Nothing is resized at 32x32, so there the two paths do the same arithmetic.
    tolerance = 2e-5 if shape == (32, 32) else ROUNDING[name]
    torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)
    # The tolerance would not hide a mix-up of samples: they differ by far more.
    assert scores.std() > 3 * tolerance


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(64, 64), (256, 256), (320, 224)])
def test_trained_models_score_as_on_the_published_path(name: str, shape: tuple[int, int]) -> None:
    images, texts = pictures(12, *shape, seed=1)
    expected = ORACLES[name](images, texts, model=SHAPES[name])
    scores = build(name, SHAPES)(to_batch(images), texts)
    tolerance = 2e-5 if shape == (64, 64) else ROUNDING_SHAPES[name]
    torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)
    assert scores.std() > 5 * tolerance


@pytest.mark.parametrize("name", NAMES)
def test_trained_models_in_bfloat16(name: str) -> None:
    images, texts = pictures(24, 64, 64, seed=2)
    full = build(name, SHAPES)(to_batch(images), texts)
    low = build(name, SHAPES, dtype="bfloat16")(to_batch(images), texts)
    assert low.dtype == torch.float32
    assert not torch.equal(low, full)
    torch.testing.assert_close(low, full, rtol=0, atol=BFLOAT16[name])
    assert full.std() > 4 * BFLOAT16[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_scores_as_its_samples_do_alone(name: str, folders: Folders) -> None:
    reward, images = build(name, folders), tiny.images(len(TEXTS), 40, 48)
    alone = [reward(images[i : i + 1], TEXTS[i : i + 1]) for i in range(len(TEXTS))]
    torch.testing.assert_close(reward(images, TEXTS), torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_text_and_image_both_count(name: str, folders: Folders) -> None:
    reward, images = build(name, folders), tiny.images(2, 32, 32)
    base = reward(images, TEXTS[:2])
    assert (base - reward(images, TEXTS[1::-1])).abs().min() > 1e-5
    assert (base - reward(images.flip(0), TEXTS[:2])).abs().min() > 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_is_close_and_returns_float32(
    name: str, dtype: str, folders: Folders
) -> None:
    images = tiny.images(len(TEXTS), 64, 64)
    full = build(name, folders)(images, TEXTS)
    low = build(name, folders, dtype=dtype)(images, TEXTS)
    assert low.dtype == torch.float32
    assert not torch.equal(low, full)
    tolerance = 0.5 if name == "pickscore" else 0.03
    torch.testing.assert_close(low, full, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_dtype(name: str, folders: Folders) -> None:
    with pytest.raises(ValueError, match="float32, bfloat16, float16, got 'fp8'"):
        build(name, folders, dtype="fp8")


@torch.no_grad()
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_clip_score_follows_the_folder_s_preprocessing(
    resize_mode: str, interpolation: str, tmp_path: Path
) -> None:
    settings = {"resize_mode": resize_mode, "interpolation": interpolation, "fill_color": 128}
    folder = tiny.open_clip_folder(tmp_path / "clip", **settings)
    images = tiny.images(len(TEXTS), 96, 61)
    scores = build_reward("clip_score", {"model": str(folder)})(images, TEXTS)
    expected = clip.clip_score([tiny.to_pil(image) for image in images], TEXTS, model=folder)
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-3)


def test_pickscore_shift_and_scale(folders: Folders) -> None:
    images = tiny.images(2, 32, 32)
    plain = build("pickscore", folders)(images, TEXTS[:2])
    mixed = build("pickscore", folders, shift=18.0, scale=8.0)(images, TEXTS[:2])
    torch.testing.assert_close(mixed, (plain - 18) / 8)
    with pytest.raises(ValueError, match="scale divides"):
        build("pickscore", folders, scale=0.0)


def test_features_are_normalised_before_the_product(folders: Folders) -> None:
    clip = build("hpsv2", folders).clip
    pixels = torch.randn(2, 3, tiny.SIZE, tiny.SIZE, generator=torch.manual_seed(0))
    image = normalize(clip.model.encode_image(pixels), dim=-1)
    text = normalize(clip.model.encode_text(clip.tokenize(TEXTS[:2])), dim=-1)
    torch.testing.assert_close(clip.cosine(pixels, TEXTS[:2]), (image * text).sum(-1))


def test_imagereward_keeps_its_head_in_float32(folders: Folders) -> None:
    model = build("imagereward", folders, dtype="bfloat16").model
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
    assert {p.dtype for p in model.text.parameters()} == {torch.bfloat16}
