"""Checks that types cannot express: combinations of knobs that cannot work together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from mixgrpo.config import Config, RunConfig, TextConfig, flatten

# Knobs that a resumed run may change: none of them alters the weights that training produces.
MAY_CHANGE = (
    "run.iterations",
    "run.folder",
    "run.resume",  # and run.resume_from
    "run.threads",
    "run.deterministic",  # like the number of processes, it only changes rounding
    "run.patience",
    "run.grace",
    "text.mode",  # stored embeddings equal those of the encoders bit for bit
    "text.embeddings",
    "validation.every",
    "validation.before",
    "validation.patience",
    "scoring.",
    "sampling.micro_batch",  # another batch size only changes rounding
    "sampling.decode_batch",
    "update.micro_batch",
    "text.placement",
    "contents.",  # of the prompt files, which are compared separately
    "checkpoint.",
    "engine.",  # like the number of processes, it only changes rounding
    "model.gradient_checkpointing",
    "model.checkpoint_every",
    "ema.placement",
    "log.",
)


def check(config: Config, world_size: int | None) -> None:
    """Runs all cross-field checks, before anything is loaded.

    Args:
        world_size: number of processes of the run; None where it does not matter.

    Raises:
        ValueError: on the first combination that cannot work, with both numbers and the remedy.
    """
    for complaint in _complaints(config, world_size):
        raise ValueError(complaint)


def _complaints(config: Config, world_size: int | None) -> Iterator[str]:
    model, batch, update = config.model, config.batch, config.update
    yield from _too_small(config)
    yield from _sampling_complaints(config)
    for side in ("height", "width"):
        if getattr(model, side) < 16 or getattr(model, side) % 16:
            yield f"model.{side} is {getattr(model, side)}; it must be a positive multiple of 16"
    yield from _weight_complaints(config)
    if batch.samples < 2:
        yield (
            f"batch.samples is {batch.samples}, but advantages compare the samples of a group; "
            "set --batch.samples to at least 2"
        )
    if world_size and batch.prompts % world_size:
        yield (
            f"batch.prompts ({batch.prompts}) must be a multiple of the number of processes "
            f"({world_size}); set --batch.prompts to {_multiple(batch.prompts, world_size)}"
        )
    yield from _engine_complaints(config, world_size)
    if batch.samples % update.optimizer_steps:
        yield (
            f"batch.samples ({batch.samples}) must be a multiple of update.optimizer_steps "
            f"({update.optimizer_steps}), since each step uses an equal part of every group; set "
            f"--batch.samples to {_multiple(batch.samples, update.optimizer_steps)} or "
            "--update.optimizer_steps to a divisor"
        )
    yield from _resume_complaints(config.run)
    yield from _emphasis_complaints(config)
    yield from _text_complaints(config.text)
    if not config.rewards:
        yield "no reward is configured; add one, as the recipes in scripts/recipes do"
    weights = {name: reward.weight for name, reward in config.rewards.items()}
    if config.rewards and (min(weights.values()) < 0 or not any(weights.values())):
        yield (
            f"reward weights are {weights}; none may be negative, and at least one must be positive"
        )
    if config.scoring.max_failed > 1:
        yield f"scoring.max_failed is {config.scoring.max_failed}; it is a fraction, at most 1"
    for part, knobs in (("prefix", config.prefix), ("tail", config.tail)):
        if not 0 < knobs.ratio <= 1:
            yield f"{part}.ratio is {knobs.ratio}; it must lie in (0, 1]"
        if not 1 <= knobs.order <= 3:
            yield f"{part}.order is {knobs.order}; DPM-Solver++ has orders 1, 2 and 3"
    if not 0 <= config.ema.decay < 1:
        yield f"ema.decay is {config.ema.decay}; it must lie in [0, 1)"


def _engine_complaints(config: Config, world_size: int | None) -> Iterator[str]:
    engine = config.engine
    if engine.kind == "single" and world_size and world_size > 1:
        yield (
            f"engine.kind is 'single', but there are {world_size} processes; start one process, or "
            "set --engine.kind to ddp, fsdp or deepspeed"
        )
    for knob in ("hybrid", "offload"):
        if getattr(engine, knob) and engine.kind != "fsdp":
            yield (
                f"engine.{knob} is true, which only fsdp supports, but engine.kind is "
                f"{engine.kind!r}; set --engine.kind fsdp or --engine.{knob} false"
            )
    if engine.offload and world_size == 1:
        yield (
            "engine.offload is true, but a single process shards nothing and keeps the whole model "
            "on its device; start several processes, or set --engine.offload false"
        )
    if engine.kind == "deepspeed" and config.update.optimizer != "adamw":
        yield (
            f"update.optimizer is {config.update.optimizer!r}, but DeepSpeed updates flat float32 "
            "copies of the weights; set --update.optimizer adamw or --engine.kind fsdp"
        )
    if engine.kind == "deepspeed" and config.model.weights != "float32":
        yield (
            f"model.weights is {config.model.weights!r}, but DeepSpeed keeps float32 copies of "
            "the weights; set --model.weights float32 or --engine.kind fsdp"
        )


def _emphasis_complaints(config: Config) -> Iterator[str]:
    """Checks which parts of a rollout are trained, and how they are weighted."""
    advantage, update, samples = config.advantage, config.update, config.batch.samples
    if not 0 <= advantage.trim < 0.5:
        yield f"advantage.trim is {advantage.trim}; it is a fraction at each end, in [0, 0.5)"
    kept, parts = advantage.best_of, update.optimizer_steps
    if kept and not (0 < kept <= samples and kept % 2 == 0 and kept % parts == 0):
        yield (
            f"advantage.best_of is {kept}; it must be even, a multiple of update.optimizer_steps "
            f"({parts}), and at most batch.samples ({samples}), or 0 to train on all"
        )
    if not 0 < update.step_fraction <= 1:
        yield f"update.step_fraction is {update.step_fraction}; it must lie in (0, 1]"
    weights, steps = update.step_weight, config.sampling.steps
    if isinstance(weights, list):
        if len(weights) != steps - 1:
            yield (
                f"update.step_weight has {len(weights)} weights; {steps} denoising steps need "
                f"{steps - 1}, one for each but the last"
            )
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            yield (
                f"update.step_weight is {weights}; weights must be finite and >= 0, with at least "
                "one positive"
            )
    if update.kl_target > 0 and update.kl == 0:
        yield (
            f"update.kl_target is {update.kl_target}, but update.kl is 0; set --update.kl to the "
            "initial weight"
        )


def _resume_complaints(run: RunConfig) -> Iterator[str]:
    if run.resume_from != "latest" and not run.resume:
        yield (
            f"run.resume_from is {run.resume_from!r}, but run.resume is false, so the run would "
            "not resume; set --run.resume true"
        )


def _text_complaints(text: TextConfig) -> Iterator[str]:
    if text.mode == "embeddings" and not text.embeddings:
        yield (
            "text.mode is 'embeddings', but no folder is given; set --text.embeddings to a folder "
            "that `python -m mixgrpo preprocess` wrote"
        )
    if text.mode == "online" and text.embeddings:
        yield (
            f"text.embeddings is {text.embeddings!r}, but text.mode is 'online', which does not "
            "read embeddings; set --text.mode embeddings"
        )


def _weight_complaints(config: Config) -> Iterator[str]:
    if config.model.weights == "float32":
        return
    if config.model.compute_dtype != "bfloat16":
        yield (
            f"model.weights is {config.model.weights}, but model.compute_dtype is "
            f"{config.model.compute_dtype}; set --model.compute_dtype bfloat16 or --model.weights "
            "float32"
        )
    if config.ema.decay:
        yield (
            f"ema.decay is {config.ema.decay} with model.weights {config.model.weights}, but the "
            "average changes by less than bfloat16 can represent; set --ema.decay 0 or "
            "--model.weights float32"
        )


def _sampling_complaints(config: Config) -> Iterator[str]:
    if config.sampling.eta <= 0:
        yield (
            f"sampling.eta is {config.sampling.eta}; without noise there is no log-probability to "
            "train on, so it must be positive"
        )
    if config.sampling.transition == "cps" and config.sampling.eta > 1:
        yield f"sampling.eta is {config.sampling.eta}; with transition cps it must lie in (0, 1]"
    if config.sampling.shift < 0:
        yield (
            f"sampling.shift is {config.sampling.shift}; it must be positive, or 0 for the "
            "resolution-dependent shift"
        )


def _too_small(config: Config) -> Iterator[str]:
    least = {
        "run.iterations": 1,
        "run.patience": 0,
        "run.grace": 1,
        "sampling.steps": 2,
        "sampling.micro_batch": 1,
        "sampling.decode_batch": 1,
        "batch.prompts": 1,
        "scoring.micro_batch": 1,
        "scoring.max_failed": 0,
        "update.optimizer_steps": 1,
        "update.micro_batch": 1,
        "update.clip": 1e-12,
        "update.learning_rate": 1e-12,
        "update.max_grad_norm": 1e-12,
        "update.kl": 0,
        "update.kl_target": 0,
        "update.warmup": 0,
        "model.lora_rank": 1,
        "model.text_length": 1,
        "model.checkpoint_every": 1,
        "ema.every": 1,
        "validation.every": 0,
        "validation.prompts": 0,
        "validation.steps": 2,
        "validation.pictures": 0,
        "validation.patience": 0,
        "checkpoint.every": 0,
        "checkpoint.keep": 0,
        "advantage.clip": 1e-12,
    }
    values = flatten(config)
    for key, bound in least.items():
        if not values[key] >= bound:
            yield f"{key} is {values[key]}; it must be at least {bound}"


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def check_resumable(saved: dict[str, Any], config: Config) -> None:
    """Raises ValueError naming every knob that differs from the saved run but must not."""
    now = flatten(config)
    differing = [
        f"{key} was {saved.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if differing:
        raise ValueError(
            f"this run cannot be resumed with different settings: {'; '.join(differing)}; "
            "use the saved values, or train in another --run.folder"
        )
