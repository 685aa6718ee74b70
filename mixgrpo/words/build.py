"""Rebuilds ``data/words`` from seeds: captions, and the Qwen-Image pipeline folder."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch

from mixgrpo.words.architecture import qwen_image_pipeline
from mixgrpo.words.signs import draw, split
from mixgrpo.words.train_qwen import train_qwen
from mixgrpo.words.train_vae import train_vae

VAE_STEPS = 3000
QWEN_STEPS = 2000
QWEN_PICTURES = 8192
WRONG_CAPTIONS = 0.2
DROPPED_CAPTIONS = 0.1
TRAINING_PROMPTS = 2000
TEST_PROMPTS = 256


def write_prompts(folder: Path) -> None:
    """Writes ``prompts.txt`` (training words) and ``prompts_test.txt`` (words held out)."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, test, count in (
        ("prompts.txt", False, TRAINING_PROMPTS),
        ("prompts_test.txt", True, TEST_PROMPTS),
    ):
        lines = [sign.caption for sign in draw(split(test), count, rng)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def build_pipeline(folder: Path) -> None:
    """Trains the VAE, then the transformer and the text encoder on its latents."""
    pipeline = qwen_image_pipeline(seed=0)
    train_vae(pipeline.vae, VAE_STEPS, seed=1)
    train_qwen(pipeline, QWEN_STEPS, 2, QWEN_PICTURES, WRONG_CAPTIONS, DROPPED_CAPTIONS)
    pipeline.to(torch.float16).save_pretrained(folder / "qwen_image")  # halves the size


PARTS: dict[str, Callable[[Path], None]] = {
    "prompts": write_prompts,
    "qwen_image": build_pipeline,
}
