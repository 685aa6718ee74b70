"""Draws signs with a pipeline folder, and measures how often they are right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import QwenImagePipeline
from PIL import Image, ImageDraw
from torch import Tensor

from mixgrpo.rewards.ocr import Ocr
from mixgrpo.words import judge
from mixgrpo.words.renderer import HEIGHT, WIDTH
from mixgrpo.words.train_qwen import NEGATIVE

STEPS = 12
BATCH = 32
VERDICTS = ("word_right", "look_right", "facts_right", "all_right")

_CAPTION_ROOM = 14  # pixels above each picture of a grid
_COLUMN = 4 * WIDTH


def load(folder: Path) -> QwenImagePipeline:
    """The pipeline of a folder, in float32 and without progress bars."""
    pipeline = QwenImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_signs(
    pipeline: QwenImagePipeline,
    captions: Sequence[str],
    guidance: float,
    *,
    steps: int = STEPS,
    seed: int = 0,
) -> Tensor:
    """The pipeline's pictures [N, 3, 32, 64] in [0, 1], guided away from the negative prompt."""
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for start in range(0, len(captions), BATCH):
        part = list(captions[start : start + BATCH])
        drawn = pipeline(
            part,
            negative_prompt=[NEGATIVE] * len(part) if guidance > 1 else None,
            true_cfg_scale=guidance,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=steps,
            generator=generator,
            output_type="pt",
        )
        pictures.append(drawn.images)
    return torch.cat(pictures)


def measure(images: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """The means of the judge's verdicts on pictures [N, 3, 32, 64] of captions, and what is read.

    ``ocr`` is the mean of the reward of that name, which reads each picture as one line, and
    ``read`` the fraction of words that it reads without a mistake.
    """
    found = {name: float(getattr(judge, name)(images, captions).mean()) for name in VERDICTS}
    scores = Ocr(detect=False)(images, captions)
    return {**found, "ocr": float(scores.mean()), "read": float((scores == 1).float().mean())}


def grid(rows: Sequence[Tensor], titles: Sequence[str], captions: Sequence[str]) -> Image.Image:
    """Pictures [N, 3, 32, 64] of the same captions, one row for each of several models or settings.

    Pictures are magnified three times; each has its caption above it, and each row its title.
    """
    height = 3 * HEIGHT + _CAPTION_ROOM
    sheet = Image.new("RGB", (_COLUMN * len(captions), (height + 2 * _CAPTION_ROOM) * len(rows)))
    pen = ImageDraw.Draw(sheet)
    sheet.paste("white", (0, 0, *sheet.size))
    for row, (pictures, title) in enumerate(zip(rows, titles, strict=True)):
        top = row * (height + 2 * _CAPTION_ROOM)
        pen.text((4, top), title, fill="black")
        for column, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            left = column * _COLUMN + 4
            pen.text((left, top + _CAPTION_ROOM), caption, fill="black")
            pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            magnified = Image.fromarray(pixels).resize(
                (3 * WIDTH, 3 * HEIGHT), Image.Resampling.NEAREST
            )
            sheet.paste(magnified, (left, top + 2 * _CAPTION_ROOM))
    return sheet
