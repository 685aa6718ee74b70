"""The same with all weights trained: bfloat16 with stochastic rounding, and 8-bit moments.

The batches are the largest that the plan says fit on the card; if they do not, smaller ones follow.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from gpu.iterations import Batches, Bench, Wanted
from gpu.job import Job, main
from gpu.models import FULL, SMALL, Scale
from gpu.plan import planned_memory
from mixgrpo.config import ModelConfig

CHOICES = (Batches(12, 10), Batches(6, 5), Batches(3, 3), Batches(3, 2), Batches(1, 1))
ROOM = 0.95  # of the card's memory


def wanted(scale: Scale, compiler: str) -> list[Wanted]:
    """The iterations, in the order of their worth."""
    few, all_images, steps = scale.optimizer_steps, scale.samples, scale.steps
    return [
        Wanted("MixGRPO", "off", few, steps),
        Wanted("published", "off", few, steps),
        Wanted("MixGRPO-Flash", "off", few, steps),
        Wanted("MixGRPO", compiler, all_images, steps),
        Wanted("MixGRPO-Flash", compiler, all_images, steps),
        Wanted("MixGRPO", "off", all_images, steps),
    ]


def fitting(scale: Scale, knobs: ModelConfig, total: float) -> Batches:
    """The first of CHOICES that the plan expects to fit into ``total`` GiB, else the last."""
    with tempfile.TemporaryDirectory() as place:
        folder = scale.write_folder(Path(place))
        for batches in CHOICES:
            if planned_memory(scale, knobs, batches, folder).peak / 2**30 < ROOM * total:
                return batches
    return CHOICES[-1]


def perform(job: Job) -> None:
    scale, total = (SMALL if job.small else FULL), float("inf")
    if job.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
    knobs = scale.knobs(train="full", weights="bfloat16_stochastic", compute_dtype="bfloat16")
    batches = fitting(scale, knobs, total)
    smaller = iter(CHOICES[CHOICES.index(batches) + 1 :])
    job.report("batches", rollout=batches.rollout, update=batches.update)
    bench = Bench(job, scale, knobs, batches)
    for each in wanted(scale, "eager" if job.small else "inductor"):
        while not bench.measure(each) and (less := next(smaller, None)):
            bench.batches = less  # the plan was too hopeful, and its error is reported


if __name__ == "__main__":
    main("full", perform)
