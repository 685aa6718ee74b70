"""Rewards at their published sizes: images per second, and how much of them a rollout hides.

The weights are random; they are written as the published files are and read from there, as in a
training. With ``small``, the models of ``data/shapes`` score.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import scoring
import torch
from environment import ROOT
from oracles import random_weights
from speed import Task, synchronize
from torch import Tensor

from gpu.iterations import evaluate
from gpu.job import Job, main
from gpu.models import FULL, SMALL, Scale, build, text_for
from mixgrpo.rewards import Reward, ScoreStream, build_reward
from mixgrpo.rollout import rollout
from mixgrpo.types import Window

TRAINED_ON = ("hpsv2", "pickscore", "imagereward")
NEEDED = 8 * 2**30  # bytes of the largest reward's file, with room


def perform(job: Job) -> None:
    scale, device = (SMALL if job.small else FULL), torch.device(job.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(scale.samples, 3, scale.pixels, scale.pixels, generator=generator)
    images = images.to(device)
    rewards: dict[str, Reward] = {}
    for name in TRAINED_ON:
        if job.left() > 0:
            job.attempt(name, partial(measure, job, name, images, rewards))
    if rewards and job.left() > 0:
        job.attempt("hidden by a rollout", partial(hidden, job, scale, rewards))
    rewards.clear()
    if job.left() > 0:  # held out: no rollout waits for it
        job.attempt("clip_score", partial(measure, job, "clip_score", images, rewards))


def measure(job: Job, name: str, images: Tensor, rewards: dict[str, Reward]) -> dict[str, Any]:
    """Builds a reward, keeps it in ``rewards``, and times it one image at a time and batched."""
    start = perf_counter()
    rewards[name] = built(job, name)
    loading = perf_counter() - start
    found = scoring.measure(name, rewards[name], images, repeats=2)
    return {
        "loading_seconds": loading,
        "images": len(images),
        "pixels": images.shape[-1],
        "one_per_second": found.one,
        "batched_per_second": found.batched,
        "difference": found.difference,
    }


def built(job: Job, name: str) -> Reward:
    """The reward, from files that are gone again afterwards."""
    if job.small:
        options = {"model": str(ROOT / "data" / "shapes" / scoring.FOLDERS.get(name, name))}
        return build_reward(name, options, job.device)
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        options = getattr(random_weights, name)(Path(folder), 0, job.device)
        if job.device == "cuda":
            torch.cuda.empty_cache()
        return build_reward(name, {**options, "dtype": "bfloat16"}, job.device)


def scratch() -> str | None:
    """A folder in memory if it has room, else None: the system's temporary folder."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return None
    there = os.statvfs(place)
    return str(place) if there.f_bavail * there.f_frsize > NEEDED else None


def hidden(job: Job, scale: Scale, rewards: Mapping[str, Reward]) -> dict[str, Any]:
    """A rollout with decoding, once without rewards and once with them in their thread.

    A micro-batch is a quarter of the images, so that three quarters are scored beside a rollout.
    """
    device = torch.device(job.device)
    policy = build(scale, scale.knobs(train="lora"), device)
    size, window = max(1, scale.samples // 4), Window(0, scale.window)
    task = Task(
        policy=policy,
        text=text_for(policy, 1),
        samples=scale.samples,
        steps=scale.window + 2,
        window=window,
        optimizer_steps=1,
        advantages=torch.zeros(scale.samples),
        micro_batch=size,
        seed=0,
    )
    plan, velocity = task.plan(), policy.velocity(policy.module)
    texts = [scoring.CAPTION] * scale.samples

    def sample(stream: ScoreStream | None) -> float:
        def decode(latents: Tensor, rows: range) -> None:
            images = policy.decode(latents)
            if stream is not None:
                stream.submit(images, texts[rows.start : rows.stop])

        synchronize(device)
        start = perf_counter()
        rollout(velocity, task.text, plan, task.noise(0), size, decode)
        synchronize(device)
        if stream is not None:
            stream.result()
        return perf_counter() - start

    for count in (1, size):
        evaluate(policy, count, trains=False)
    warm = ScoreStream(rewards, size, device)
    warm.submit(policy.decode(task.noise(0).at(0, range(size))), texts[:size])
    warm.result()
    alone = sample(None)
    stream = ScoreStream(rewards, size, device)
    together = sample(stream)
    return {
        "rollout_seconds": alone,
        "together_seconds": together,
        "scoring_seconds": stream.busy,
        "waited_seconds": stream.waited,
        "steps": task.steps,
    }


if __name__ == "__main__":
    main("rewards", perform)
