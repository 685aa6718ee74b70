"""The plan against what was measured: memory and seconds of whole iterations.

Needs no GPU: it reads the results of ``lora`` and ``full``. What the benchmark lacks, text encoders
and rewards, is left out of the plan, and so is its allowance for CUDA, which is measured beside the
tensors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu.iterations import Batches
from gpu.job import Job, main
from gpu.models import FULL, SMALL, Scale
from mixgrpo.config import Config, ModelConfig
from mixgrpo.planning.device_memory import DeviceMemory, device_memory
from mixgrpo.planning.operations import seconds
from mixgrpo.planning.plan import Question
from mixgrpo.planning.spread import Spread

GIB = 2**30
PARTS = ("lora", "full")


def planned_memory(
    scale: Scale, knobs: ModelConfig, batches: Batches, folder: Path, samples: int = 0
) -> DeviceMemory:
    """The plan's estimate for a benchmark's iteration, without text encoders, rewards, context.

    Args:
        folder: configurations of the model's parts, by ``Scale.write_folder``.
        samples: images of the iteration; 0 for the scale's.
    """
    config = Config(model=knobs)
    config.model.path = str(folder)
    config.text.mode = "embeddings"
    config.batch.prompts, config.batch.samples = 1, samples or scale.samples
    config.sampling.steps, config.window.size = scale.steps, scale.window
    config.sampling.micro_batch = config.sampling.decode_batch = batches.rollout
    config.update.micro_batch, config.update.optimizer = batches.update, "adamw_8bit"
    planned = device_memory(config, Spread("single"), 1)
    return DeviceMemory(**{**vars(planned), "context": 0})


def perform(job: Job) -> None:
    scale, question = (SMALL if job.small else FULL), Question()
    with tempfile.TemporaryDirectory() as place:
        folder = scale.write_folder(Path(place))
        for part in PARTS:
            for name, found in job.earlier(part).items():
                if "tflop" in found and found["variant"] != "published":
                    compared = comparison(scale, folder, found, question)
                    job.report(f"{part}: {name}", **compared)


def comparison(
    scale: Scale, folder: Path, found: Mapping[str, Any], question: Question
) -> dict[str, Any]:
    """Planned and measured GiB and seconds of an iteration."""
    # A batch is never larger than what there is to evaluate.
    images, window = found["images"], found["window"][1] - found["window"][0]
    evaluated = 1 + images // found["optimizer_steps"] * (window - 1)
    rollout, update = min(found["batches"][0], images), min(found["batches"][1], evaluated)
    knobs = scale.knobs(**found["model"])
    planned = planned_memory(scale, knobs, Batches(rollout, update), folder, images)
    operations = found["tflop"] * 1e12
    return {
        "planned_gib": planned.peak / GIB,
        "measured_gib": found["memory_gib"].get("allocated"),
        "reserved_gib": found["memory_gib"].get("reserved"),
        "context_gib": found["memory_gib"].get("context"),
        "planned_seconds": seconds(operations, question.share, question.peak),
        "measured_seconds": found["seconds"]["total"],
    }


if __name__ == "__main__":
    main("plan", perform)
