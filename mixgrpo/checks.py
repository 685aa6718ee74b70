"""Checks that types cannot express: combinations of knobs that cannot work together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mixgrpo.config import Config, GuidanceConfig, RunConfig, TextConfig, flatten

# Knobs that a resumed run may change: none of them alters the weights that training produces.
MAY_CHANGE = (
    "run.iterations",
    "run.folder",
    "model.family",  # auto or a name; the model's files are compared
    "guidance.batched",  # only changes rounding
    "guidance.validation_scale",
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
    "contents.",  # compared with the knob that names the files
    "checkpoint.",
    "engine.",  # like the number of processes, it only changes rounding
    "model.gradient_checkpointing",
    "model.checkpoint_every",
    "ema.placement",
    "log.",
)

# The values that a number, or each number of a list, may have. The upper limits exclude only what
# can be nothing but a mistake, such as a number of steps for which no computer has the memory.
_SEED, _COUNT, _ITERATIONS = "[-9223372036854775808, 9223372036854775807]", "[1, 1e6]", "[1, 1e8]"
BOUNDS = {
    "run.iterations": _ITERATIONS,
    "run.seed": _SEED,
    "run.threads": "[0, 4096]",
    "run.patience": "[0, 1e7]",
    "run.grace": "[1, 1e7]",
    "model.lora_rank": "[1, 65536]",
    "model.lora_alpha": _COUNT,
    "model.guidance": "[0, 1000]",
    "model.height": "[16, 16384]",
    "model.width": "[16, 16384]",
    "model.text_length": "[1, 8192]",
    "model.checkpoint_every": "[1, 10000]",
    "guidance.scale": "[1, 1000]",
    "guidance.update_scale": "[1, 1000]",
    "guidance.validation_scale": "[1, 1000]",
    "sampling.steps": "[2, 10000]",
    "sampling.shift": "[0, 1000]",
    "sampling.eta": "[0, 100]",
    "sampling.micro_batch": _COUNT,
    "sampling.decode_batch": _COUNT,
    "window.size": "[1, 10000]",
    "window.start": "[0, 10000]",
    "window.stride": "[0, 10000]",
    "window.iters_per_window": _ITERATIONS,
    "window.min_iters": _ITERATIONS,
    "window.max_iters": _ITERATIONS,
    "window.decay_rate": "[0, 1000]",
    "window.decay_threshold": "[-1, 10000]",
    "window.envelope": "[0, 10000]",
    "window.seed": _SEED,
    "prefix.order": "[1, 3]",
    "prefix.ratio": "(0, 1]",
    "tail.order": "[1, 3]",
    "tail.ratio": "(0, 1]",
    "batch.prompts": _COUNT,
    "batch.samples": "[1, 1e5]",
    "rewards.*.weight": "[0, 1e9]",
    "scoring.micro_batch": _COUNT,
    "scoring.max_failed": "[0, 1]",
    "advantage.clip": "(0, 1e9]",
    "advantage.trim": "[0, 0.5)",
    "advantage.best_of": "[0, 1e5]",
    "update.optimizer_steps": "[1, 1e5]",
    "update.micro_batch": _COUNT,
    "update.clip": "(0, 1e9]",
    "update.step_fraction": "(0, 1]",
    "update.step_weight": "[0, 1e9]",
    "update.kl": "[0, 1e6]",
    "update.kl_target": "[0, 1e6]",
    "update.learning_rate": "(0, 10]",
    "update.betas": "[0, 1)",
    "update.weight_decay": "[0, 1000]",
    "update.warmup": "[0, 1e8]",
    "update.max_grad_norm": "(0, 1e12]",
    "ema.decay": "[0, 1)",
    "ema.every": _ITERATIONS,
    "validation.every": "[0, 1e8]",
    "validation.prompts": "[0, 1e6]",
    "validation.steps": "[2, 10000]",
    "validation.seed": _SEED,
    "validation.pictures": "[0, 1e5]",
    "validation.patience": "[0, 1e8]",
    "checkpoint.every": "[0, 1e8]",
    "checkpoint.keep": "[0, 1e8]",
}
# Of the commands sample and preprocess.
SAMPLING_BOUNDS = {
    "model.guidance": BOUNDS["model.guidance"],
    "model.height": BOUNDS["model.height"],
    "model.width": BOUNDS["model.width"],
    "model.text_length": BOUNDS["model.text_length"],
    "guidance.scale": BOUNDS["guidance.scale"],
    "lora_scale": "[-1000, 1000]",
    "hybrid": "[0, 1]",
    "steps": BOUNDS["sampling.steps"],
    "shift": BOUNDS["sampling.shift"],
    "seed": _SEED,
    "samples": BOUNDS["batch.samples"],
    "micro_batch": _COUNT,
    "decode_batch": _COUNT,
    "threads": BOUNDS["run.threads"],
}
ENCODING_BOUNDS = {
    "model.text_length": BOUNDS["model.text_length"],
    "shard_size": _COUNT,
    "threads": BOUNDS["run.threads"],
}


def check_bounds(values: dict[str, Any], bounds: dict[str, str]) -> None:
    """Checks every number of a configuration, and every number in a list.

    Args:
        values: of the knobs, as ``flatten`` gives them.
        bounds: knob -> interval, such as "(0, 1]"; ``*`` stands for any name between two dots.

    Raises:
        ValueError: a number is not finite or lies outside of its knob's interval.
    """
    for complaint in _out_of_bounds(values, bounds):
        raise ValueError(complaint)


def _out_of_bounds(values: dict[str, Any], bounds: dict[str, str]) -> Iterator[str]:
    for key, value in values.items():
        interval = bounds.get(re.sub(r"^(rewards)\.[^.]+\.", r"\1.*.", key))
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            verb = "holds" if isinstance(value, list) else "is"
            wrong = (
                "must be a finite number"
                if not math.isfinite(number)
                else (interval and _outside(number, interval))
            )
            if wrong:
                yield f"{key} {verb} {number}; it {wrong}"


def _outside(number: float, interval: str) -> str:
    """What is required of a number that lies outside of an interval; empty if it lies inside."""
    low, high = interval[1:-1].split(", ")
    # Seeds need whole numbers that a float cannot represent.
    least, most = (int(end) if end.lstrip("-").isdecimal() else float(end) for end in (low, high))
    if number < least or (number == least and interval[0] == "("):
        return f"must be {'greater than' if interval[0] == '(' else 'at least'} {low}"
    if number > most or (number == most and interval[-1] == ")"):
        return f"must be {'less than' if interval[-1] == ')' else 'at most'} {high}"
    return ""


def check_values(config: Config) -> None:
    """Checks each knob by itself, which depends on nothing but the configuration.

    Raises:
        ValueError: on the first knob whose value cannot work.
    """
    for complaint in _value_complaints(config):
        raise ValueError(complaint)


def _value_complaints(config: Config) -> Iterator[str]:
    yield from _out_of_bounds(flatten(config), BOUNDS)
    names: dict[str, str] = {}
    for name in config.rewards:
        if names.setdefault(name.lower(), name) != name:
            yield (
                f"the rewards {names[name.lower()]} and {name} differ only in upper and lower "
                "case; give one of them another name"
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
    model, batch = config.model, config.batch
    yield from _value_complaints(config)
    yield from _sampling_complaints(config)
    for side in ("height", "width"):
        if getattr(model, side) % 16:
            yield f"model.{side} is {getattr(model, side)}; it must be a positive multiple of 16"
    yield from _guidance_complaints(config.guidance)
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
    yield from _split_complaints(config, world_size or 1)
    yield from _resume_complaints(config.run)
    yield from _emphasis_complaints(config)
    yield from _text_complaints(config.text)
    if not config.rewards:
        yield "no reward is configured; add one, as the recipes in scripts/recipes do"
    weights = {name: reward.weight for name, reward in config.rewards.items()}
    if config.rewards and not any(weights.values()):
        yield f"reward weights are {weights}; at least one must be positive"


def _split_complaints(config: Config, world_size: int) -> Iterator[str]:
    """Checks that the samples can be divided among the optimizer steps."""
    batch, steps = config.batch, config.update.optimizer_steps
    if config.update.split == "samples" and batch.samples % steps:
        yield (
            f"batch.samples ({batch.samples}) must be a multiple of update.optimizer_steps "
            f"({steps}), since each step uses an equal part of every group; set "
            f"--batch.samples to {_multiple(batch.samples, steps)} or "
            "--update.optimizer_steps to a divisor"
        )
    if config.update.split == "groups" and batch.prompts % (world_size * steps):
        yield (
            f"batch.prompts ({batch.prompts}) must be a multiple of update.optimizer_steps times "
            f"the number of processes ({steps} x {world_size}), since update.split is 'groups' and "
            "each step uses an equal part of every process's prompts; set --batch.prompts to "
            f"{_multiple(batch.prompts, world_size * steps)} or --update.split samples"
        )


def _guidance_complaints(guidance: GuidanceConfig) -> Iterator[str]:
    scales = (guidance.scale, guidance.update_scale, guidance.validation_scale)
    yield from guidance_complaints(guidance.negative_prompt, *scales)
    if guidance.batched and not guidance.unconditional_gradient:
        yield (
            "guidance.batched is true, but guidance.unconditional_gradient is false, which needs "
            "the branches apart; set one of them to the other value"
        )


def guidance_complaints(negative_prompt: str | None, *scales: float | None) -> Iterator[str]:
    """Says what is wrong with a negative prompt and the scales of guidance."""
    if negative_prompt is None:
        return
    if not any(scale and scale > 1 for scale in scales):
        yield (
            f"guidance.negative_prompt is {negative_prompt!r}, but guidance.scale is 1, with which "
            "no negative prompt is used; set --guidance.scale above 1"
        )
    if "\0" in negative_prompt:
        yield "guidance.negative_prompt holds a NUL character; remove it"


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
    kept, parts = advantage.best_of, update.optimizer_steps
    whole = update.split == "groups"
    if kept and not (0 < kept <= samples and kept % 2 == 0 and (whole or kept % parts == 0)):
        divisible = "" if whole else f", a multiple of update.optimizer_steps ({parts}),"
        yield (
            f"advantage.best_of is {kept}; it must be even{divisible} and at most batch.samples "
            f"({samples}), or 0 to train on all"
        )
    weights, steps = update.step_weight, config.sampling.steps
    if isinstance(weights, list):
        if len(weights) != steps - 1:
            yield (
                f"update.step_weight has {len(weights)} weights; {steps} denoising steps need "
                f"{steps - 1}, one for each but the last"
            )
        if not any(weights):
            yield "update.step_weight has only weights of 0; at least one must be positive"
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
    if config.sampling.eta == 0:
        yield (
            f"sampling.eta is {config.sampling.eta}; without noise there is no log-probability to "
            "train on, so it must be positive"
        )
    if config.sampling.transition == "cps" and config.sampling.eta > 1:
        yield f"sampling.eta is {config.sampling.eta}; with transition cps it must lie in (0, 1]"


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def check_resumable(
    saved: Mapping[str, Any], config: Config, contents: Mapping[str, str] | None = None
) -> None:
    """Checks that a run is resumed with the knobs with which it was saved, except ``MAY_CHANGE``.

    Of a knob that names files, the contents are compared, if they are known of both.

    Args:
        saved: dotted path of each knob -> value, and ``contents.`` and knob -> digest.
        contents: ``contents.`` and knob -> digest of the files that it now names.

    Raises:
        ValueError: names every knob that differs but must not.
    """
    now = flatten(config) | dict(contents or {})
    keys = sorted(key for key in saved.keys() | now.keys() if not key.startswith(MAY_CHANGE))
    differing = [found for key in keys if (found := _difference(key, saved, now))]
    if differing:
        raise ValueError(
            f"this run cannot be resumed with different settings: {'; '.join(differing)}; "
            "use the saved values, or train in another --run.folder"
        )


def _difference(key: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    before, after = saved.get(f"contents.{key}"), now.get(f"contents.{key}")
    if before is not None and after is not None:
        said = f"{key} is {now.get(key)!r}, whose contents are not those of the saved run"
        return None if before == after else said
    same = saved.get(key) == now.get(key)
    return None if same else f"{key} was {saved.get(key)!r}, is {now.get(key)!r}"
