"""Iterations at FLUX.1-dev's size with LoRA; the short form first, so that a number exists early.

A third of the images first: the published way, which handles them one at a time, and the others for
comparison. Then all of them, eager and compiled.
"""

from __future__ import annotations

from gpu.iterations import Batches, Bench, Wanted
from gpu.job import Job, main
from gpu.models import FULL, SMALL, Scale

BATCHES = Batches(rollout=12, update=10)


def wanted(scale: Scale, compiler: str) -> list[Wanted]:
    """The iterations, in the order of their worth."""
    few, all_images, steps = scale.optimizer_steps, scale.samples, scale.steps
    return [
        Wanted("MixGRPO", "off", few, scale.window + 2),
        Wanted("published", "off", few, steps),
        Wanted("MixGRPO", "off", few, steps),
        Wanted("MixGRPO-Flash", "off", few, steps),
        Wanted("MixGRPO", compiler, all_images, steps),
        Wanted("MixGRPO-Flash", compiler, all_images, steps),
        Wanted("MixGRPO-Flash*", compiler, all_images, steps),
        Wanted("MixGRPO", "off", all_images, steps),
        Wanted("published", compiler, few, steps),
        Wanted("MixGRPO-Flash", "off", all_images, steps),
        Wanted("MixGRPO-Flash*", "off", all_images, steps),
        Wanted("published", "off", all_images, steps),
    ]


def perform(job: Job) -> None:
    scale = SMALL if job.small else FULL
    knobs = scale.knobs(train="lora", compute_dtype="bfloat16", gradient_checkpointing=True)
    bench = Bench(job, scale, knobs, BATCHES)
    for each in wanted(scale, "eager" if job.small else "inductor"):
        bench.measure(each)


if __name__ == "__main__":
    main("lora", perform)
