"""Plans a recipe on several numbers of GPUs: what fits, what saves memory, how long it takes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mixgrpo.config import Config
from mixgrpo.planning.branches import Branches
from mixgrpo.planning.device_memory import CONTEXT, GIB, DeviceMemory, device_memory
from mixgrpo.planning.network import Size, network_of
from mixgrpo.planning.operations import operations_per_picture, seconds
from mixgrpo.planning.settings import family_for, has_files
from mixgrpo.planning.spread import Spread, spreads

COMPARED = (1, 8, 32)  # numbers of GPUs, in addition to the requested one
TRAINED = ("full", "lora")
SHOWN = 5  # maximum number of remedies


@dataclass(frozen=True)
class Question:
    """The options of a plan.

    Attributes:
        gpus, gpus_per_node: number of GPUs of the run and per machine.
        gpu_memory: memory of each GPU in GiB.
        share, peak: fraction reached of a GPU's peak, and the peak in dense bfloat16 TFLOP/s.
    """

    gpus: int = 32
    gpus_per_node: int = 8
    gpu_memory: float = 80.0
    share: float = 0.4
    peak: float = 989.0


@dataclass(frozen=True)
class Row:
    """One way to run the recipe."""

    train: str
    gpus: int
    spread: Spread
    memory: DeviceMemory


@dataclass(frozen=True)
class Remedy:
    """A knob, as written on the command line, and the bytes that it saves on each GPU."""

    knob: str
    saved: int


@dataclass(frozen=True)
class Pace:
    """Of one iteration: the transformer's floating-point operations on each GPU, and seconds."""

    operations: float
    seconds: float


def rows(config: Config, gpus: Sequence[int], gpus_per_node: int) -> list[Row]:
    """Full training and LoRA on each number of GPUs, with every engine."""
    found = []
    for train in TRAINED:
        changed = with_knobs(config, {"model.train": train})
        for count in gpus:
            for spread in spreads(count, gpus_per_node):
                memory = device_memory(changed, spread, count)
                found.append(Row(train, count, spread, memory))
    return found


_REMEDIES: tuple[dict[str, Any], ...] = (
    {"update.optimizer": "adamw_8bit"},
    {"model.weights": "bfloat16_stochastic", "ema.decay": 0.0},
    {"ema.decay": 0.0},
    {"update.kl": 0.0},
    {"text.placement": "offload"},
    {"scoring.placement": "offload"},
    {"scoring.placement": "cpu"},
    {"model.gradient_checkpointing": True},
    {"guidance.batched": True},
    {"update.micro_batch": 1},
    {"sampling.micro_batch": 1, "sampling.decode_batch": 1},
    {"model.train": "lora"},
)


def remedies(config: Config, row: Row) -> list[Remedy]:
    """The memory that each knob would save on its own for this row, largest first."""
    config = with_knobs(config, {"model.train": row.train})
    found = []
    for knobs in _REMEDIES:
        memory = device_memory(with_knobs(config, knobs), row.spread, row.gpus)
        words = " ".join(f"--{name} {str(value).lower()}" for name, value in knobs.items())
        found.append(Remedy(words, row.memory.peak - memory.peak))
    return sorted((r for r in found if r.saved > 0), key=lambda r: -r.saved)


def pace(
    config: Config, rollout: float, update: float, gpus: int, share: float, peak: float
) -> Pace:
    """How long an iteration takes.

    Args:
        rollout, update: model evaluations per image, averaged over the run; with guidance both
            branches count.
        share, peak: fraction of a GPU's peak TFLOP/s that is reached, and the peak.
    """
    model, batch = config.model, config.batch
    products = network_of(model).products(Size.of(model))
    recomputed = 1 / model.checkpoint_every if model.gradient_checkpointing else 0.0
    full, kl = model.train == "full", config.update.kl > 0
    share_of_update = Branches.of(config).differentiated
    one = operations_per_picture(products, rollout, update, full, recomputed, kl, share_of_update)
    operations = one * batch.prompts * batch.samples / gpus
    return Pace(operations, seconds(operations, share, peak))


def with_knobs(config: Config, knobs: dict[str, Any]) -> Config:
    """A copy of the configuration with other values for these knobs (section.name)."""
    changed = copy.deepcopy(config)
    for path, value in knobs.items():
        section, _, name = path.partition(".")
        setattr(getattr(changed, section), name, value)
    return changed


# ---- as text

_PARTS = (
    *("weights", "whole", "gradients", "optimizer", "average", "reference"),
    *("kept", "evaluating", "rewards", "text", "vae"),
)
_HEADS = ("train", "GPUs", "engine", *_PARTS, "peak", "fits")


def report(config: Config, question: Question, rollout: float, update: float) -> str:
    """The table, what fits and what saves memory, and the time of an iteration.

    Args:
        rollout, update: model evaluations per image, averaged over the run.
    """
    counts = sorted({*COMPARED, question.gpus})
    found = rows(config, counts, question.gpus_per_node)
    parts = [_heading(config), "\n".join(table(found, question.gpu_memory))]
    for train in TRAINED:
        mine = [row for row in found if row.train == train and row.gpus == question.gpus]
        parts.append("\n".join(advice(config, mine, question.gpu_memory)))
    parts.append("\n".join(_times(config, question, counts, rollout, update)))
    return "\n\n".join(parts)


def _heading(config: Config) -> str:
    model = config.model
    name = family_for(model).published.name
    of = model.path if has_files(model) else f"{name} ({model.path} does not exist)"
    return (
        f"Estimated GiB per GPU for {of}: {network_of(model).parameters / 1e9:.2f}B parameters, "
        f"{model.width}x{model.height}\n"
        "whole: weights gathered, or cast to the products' dtype; kept: activations of the "
        f"update's forward and backward passes of {config.update.micro_batch} evaluations; "
        f"evaluating: sampling {config.sampling.micro_batch} images, or decoding them; peak: the "
        f"larger of sampling and update, with {CONTEXT / GIB:.0f} GiB for CUDA and NCCL"
    )


def table(found: Sequence[Row], gpu_memory: float) -> Iterator[str]:
    """Lines of a Markdown table, in GiB per GPU."""
    yield f"| {' | '.join(_HEADS)} |"
    yield "|---|---|---|" + "---:|" * (len(_PARTS) + 1) + "---|"
    for row in found:
        parts = [f"{getattr(row.memory, part) / GIB:.1f}" for part in _PARTS]
        fits = "yes" if row.memory.peak <= gpu_memory * GIB else "no"
        cells = [row.train, str(row.gpus), row.spread.name, *parts]
        yield f"| {' | '.join(cells)} | {row.memory.peak / GIB:.1f} | {fits} |"


def advice(config: Config, mine: Sequence[Row], gpu_memory: float) -> Iterator[str]:
    """Which engines fit on these GPUs, and what each knob would save for the smallest of them."""
    where = f"{mine[0].train} on {mine[0].gpus} x {gpu_memory:g} GiB"
    fitting = [row.spread.name for row in mine if row.memory.peak <= gpu_memory * GIB]
    least = min(mine, key=lambda row: row.memory.peak)
    if fitting:
        yield f"{where}: fits with {'; '.join(fitting)}"
    else:
        over = least.memory.peak / GIB - gpu_memory
        yield f"{where}: nothing fits; {least.spread.name} exceeds it by {over:.1f} GiB"
    for remedy in remedies(config, least)[:SHOWN]:
        yield f"  {remedy.saved / GIB:6.1f} GiB less with {remedy.knob} ({least.spread.name})"


def _times(
    config: Config, question: Question, counts: Sequence[int], rollout: float, update: float
) -> Iterator[str]:
    share, peak = question.share, question.peak
    yield (
        f"one iteration of {rollout:.2f} + {update:.2f} evaluations per image (rollout + update) "
        f"at {share:.0%} of {peak:g} TFLOP/s, counting only the transformer:"
    )
    for train in TRAINED:
        changed = with_knobs(config, {"model.train": train})
        for gpus in counts:
            found = pace(changed, rollout, update, gpus, share, peak)
            pflop = found.operations / 1e15
            yield f"  {train:<4} on {gpus:>3} GPUs: {pflop:8.2f} PFLOP each, {found.seconds:8.1f} s"
