"""Rendered images with captions, for the pretraining of the Shapes checkpoints."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from mixgrpo.shapes.renderer import render
from mixgrpo.shapes.scenes import Scene, draw, split


def training_pictures(count: int, seed: int, play: float = 1.0) -> tuple[Tensor, list[Scene]]:
    """Images [count, 3, 64, 64] in [0, 1] of training scenes, half of them with one thing."""
    rng = random.Random(seed)
    scenes = draw(split(test=False), count, rng)
    return torch.stack([render(scene, rng, play) for scene in scenes]), scenes
