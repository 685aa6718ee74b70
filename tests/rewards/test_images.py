"""Tensor preprocessing against PIL, which the published pipelines use."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from reward_parity import pictures, to_batch
from torch import Tensor

from mixgrpo.rewards.images import (
    OPENAI_MEAN,
    OPENAI_STD,
    center_crop,
    normalise,
    resize,
    resize_longest_and_pad,
    resize_shortest,
)

from . import tiny


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 20), (100, 100), (64, 64)])
@pytest.mark.parametrize("kind", ["smooth", "noise"])
def test_resize_differs_from_pil_by_its_rounding_only(kind: str, height: int, width: int) -> None:
    batch = tiny.images(3, 64, 64)
    if kind == "noise":  # bicubic overshoots here, so the clamp counts
        batch = torch.rand(3, 3, 64, 64, generator=torch.manual_seed(1)).round()
    ours = resize(batch, height, width)
    for image, mine in zip(batch, ours, strict=True):
        pil = from_pil(tiny.to_pil(image).resize((width, height), Image.Resampling.BICUBIC))
        # PIL rounds to 8 bits after each of its two passes: half a step each, the first one
        # amplified by the second's negative lobes. Measured: 0.004 at most.
        assert (mine - pil).abs().max() < 1.5 / 255
    assert ours.min() >= 0 and ours.max() <= 1


@pytest.mark.parametrize("edge", [64, 224, 378])
def test_large_pictures_differ_from_pil_as_the_readme_says(edge: int) -> None:
    images, _ = pictures(4, 512, 512, seed=3)
    pil = [image.resize((edge, edge), Image.Resampling.BICUBIC) for image in images]
    steps = 255 * (resize(to_batch(images), edge, edge) - to_batch(pil)).abs()
    assert 0.2 < steps.mean() < 0.3
    assert 0.5 < steps.max() < 1.2


def test_an_image_of_the_right_size_is_untouched() -> None:
    batch = tiny.images(2, 32, 32)
    assert torch.equal(resize(batch, 32, 32), batch)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((64, 64), (32, 32)), ((64, 96), (32, 48)), ((97, 64), (48, 32)), ((20, 33), (32, 52))],
)
def test_resize_shortest(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resize_shortest(tiny.images(1, *shape), 32).shape[-2:] == expected


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [((64, 32), (0, 32), (8, 24)), ((32, 64), (8, 24), (0, 32)), ((64, 62), (0, 32), (0, 31))],
)
def test_resize_longest_pads_to_a_centred_square(
    shape: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    padded = resize_longest_and_pad(torch.full((2, 3, *shape), 0.5), 32, fill=0.25)
    assert padded.shape == (2, 3, 32, 32)
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[slice(*rows), slice(*columns)] = True
    torch.testing.assert_close(padded[..., inside], torch.full_like(padded[..., inside], 0.5))
    assert (padded[..., ~inside] == 0.25).all()


def test_center_crop_rounds_an_odd_margin_as_asked() -> None:
    row = torch.arange(7.0).expand(1, 3, 7, 7)
    assert center_crop(row, 7, 4)[0, 0, 0].tolist() == [2, 3, 4, 5]  # 1.5 -> 2
    assert center_crop(row, 7, 4, math.floor)[0, 0, 0].tolist() == [1, 2, 3, 4]


def test_normalise_maps_the_mean_to_zero_and_one_deviation_to_one() -> None:
    mean, std = torch.tensor(OPENAI_MEAN), torch.tensor(OPENAI_STD)
    pixels = torch.stack([mean, mean + std])[:, :, None, None].expand(2, 3, 4, 4)
    normal = normalise(pixels, OPENAI_MEAN, OPENAI_STD)
    torch.testing.assert_close(normal[0], torch.zeros(3, 4, 4))
    torch.testing.assert_close(normal[1], torch.ones(3, 4, 4))
