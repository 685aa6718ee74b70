"""Rebuilds ``data/shapes`` from seeds: captions, the FLUX pipeline folder, four reward models."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FluxPipeline

from mixgrpo.shapes.architecture import flux_pipeline
from mixgrpo.shapes.scenes import draw, split
from mixgrpo.shapes.train_flux import train_flux
from mixgrpo.shapes.train_rewards import train_imagereward, train_open_clip, train_pickscore
from mixgrpo.shapes.train_vae import train_vae

logger = logging.getLogger(__name__)

VAE_STEPS = 4500
# Seed, steps and play of each stage: first full variation of sizes and places, then neat images.
FLUX_STAGES = ((2, 5000, 1.0), (7, 2200, 0.15), (8, 1500, 0.15))
FLUX_PICTURES = 20000
WRONG_CAPTIONS = 0.2
REWARD_STEPS = 1000
TEST_PROMPTS = 256


def write_prompts(folder: Path) -> None:
    """Writes ``prompts.txt`` (training captions) and ``prompts_test.txt`` (sampled test captions).

    In each file, half of the lines describe one thing and half describe two.
    """
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    training, test = split(test=False), split(test=True)
    for name, scenes, count in (
        ("prompts.txt", training, 2 * len(training)),
        ("prompts_test.txt", test, TEST_PROMPTS),
    ):
        lines = [scene.caption for scene in draw(scenes, count, rng)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def build_vae(folder: Path) -> None:
    """Builds the pipeline with a trained VAE; the other parts are untrained."""
    pipeline = flux_pipeline(seed=0)
    train_vae(pipeline.vae, VAE_STEPS, seed=1)
    _save(pipeline, folder / "flux")


def build_flux(folder: Path) -> None:
    """Trains the transformer and the text encoders of the pipeline, with its existing VAE."""
    for seed, steps, play in FLUX_STAGES:
        pipeline = FluxPipeline.from_pretrained(folder / "flux", dtype=torch.float32)
        train_flux(pipeline, steps, seed, FLUX_PICTURES, play, WRONG_CAPTIONS)
        _save(pipeline, folder / "flux")


def _save(pipeline: FluxPipeline, folder: Path) -> None:
    """Saves in float16, which halves the size."""
    pipeline.to(torch.float16).save_pretrained(folder)


PARTS: dict[str, Callable[[Path], None]] = {
    "prompts": write_prompts,
    "vae": build_vae,
    "flux": build_flux,
    "hpsv2": lambda folder: train_open_clip(folder / "hpsv2", REWARD_STEPS, seed=3),
    "pickscore": lambda folder: train_pickscore(folder / "pickscore", REWARD_STEPS, seed=4),
    "imagereward": lambda folder: train_imagereward(folder / "imagereward", REWARD_STEPS, seed=5),
    "clip": lambda folder: train_open_clip(folder / "clip", REWARD_STEPS, seed=6),
}
