from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixgrpo.rewards.jpeg_size import JpegSize

from . import tiny


def test_score_is_minus_the_size_of_the_file(tmp_path: Path) -> None:
    images = tiny.images(3, 40, 56)
    scores = JpegSize()(images, ["", "", ""])
    for index, image in enumerate(images):
        path = tmp_path / f"{index}.jpg"
        tiny.to_pil(image).save(path, quality=95)
        assert scores[index].item() == pytest.approx(-path.stat().st_size / 1000)


def test_noise_is_less_compressible_than_a_plain_image_and_the_sign_turns() -> None:
    noise = torch.rand(3, 32, 32, generator=torch.manual_seed(0))
    pair = torch.stack([noise, torch.full_like(noise, 0.5)])
    scores = JpegSize()(pair, ["", ""])
    assert scores[0] < scores[1] < 0
    assert torch.equal(JpegSize(compressible=False)(pair, ["", ""]), -scores)
