"""Runs' folders as trainings leave them, written without training."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from mixgrpo.config import Config, RewardConfig, RunConfig

PROMPTS = ("a red circle", "a blue <square> & a cross", "a green triangle")
REWARDS = {"hpsv2": 1.0, "judge": 0.0}
# Iteration of a validation -> the scores of its pictures, by reward.
SCORES = {
    0: {"hpsv2": [0.5, 0.2, 0.1], "judge": [1.0, 0.0, None]},
    4: {"hpsv2": [0.6, 0.9, 0.15], "judge": [1.0, 1.0, 0.5]},
}


def write_run(folder: Path, iterations: int = 4, **knobs: Any) -> Path:
    """Four iterations, validations at 0 and 4, three pictures each; ``knobs`` by section."""
    folder.mkdir(parents=True)
    rewards = {name: RewardConfig("jpeg_size", weight) for name, weight in REWARDS.items()}
    config = Config(run=RunConfig(folder=str(folder), iterations=iterations), rewards=rewards)
    saved = asdict(config)
    for section, values in knobs.items():
        saved[section] |= values
    (folder / "config.json").write_text(json.dumps({"revision": "abc123", "config": saved}))
    lines = [validation(0, 0.25, 0.5), *map(training, range(1, 5)), validation(4, 0.75, 0.375)]
    write_records(folder, lines)
    for iteration, scores in SCORES.items():
        place = folder / "pictures" / f"iteration_{iteration:08d}"
        place.mkdir(parents=True)
        for index, colour in enumerate(("red", "blue", "green")):
            Image.new("RGB", (16, 16), colour).save(place / f"{index:03d}.png")
        kept = {"prompts": PROMPTS, "scores": scores}
        (place / "scores.json").write_text(json.dumps(kept))
    return folder


def write_records(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def validation(iteration: int, hpsv2: float, judge: float) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "validation/hpsv2": hpsv2,
        "validation/judge": judge,
        "seconds/validation": 8.0,
    }


def training(iteration: int) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "reward/hpsv2": iteration / 8,
        "reward_failed/hpsv2": 0,
        "advantage/deviation": 0.5,
        "update/grad_norm": 1 / iteration,
        "update/clip_fraction": None,
        "window/start": iteration - 1,
        "window/stop": iteration + 4,
        "seconds/rollout": 2.0,
        "seconds/reward": 0.5,
        "seconds/reward_hidden": 3.0,
        "seconds/update": 1.5,
    }
