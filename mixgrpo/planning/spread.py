"""How an engine shards weights, gradients and optimizer state over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mixgrpo.config import EngineConfig


@dataclass(frozen=True)
class Spread:
    """Over how many processes each part of the training state is sharded.

    Attributes:
        name: as the plan's table shows it.
        weights, gradients, optimizer: number of processes that hold one shard each; 1 means that
            every process holds everything.
        gathered: which sharded weights are gathered for computing: "all" for a whole phase, or
            those of the current and next "blocks"; "" where nothing is gathered.
        sums_whole: whether full float32 gradients are accumulated until the optimizer step.
        half: whether sharded weights are stored in bfloat16 and the optimizer holds additional
            float32 weights (ZeRO).
        offload: whether weights, gradients and optimizer are stored on the CPU.
    """

    name: str
    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    gathered: str = ""
    sums_whole: bool = False
    half: bool = False
    offload: bool = False


def spreads(gpus: int, gpus_per_node: int) -> list[Spread]:
    """Every engine for this many GPUs, the one that needs the most memory first."""
    if gpus == 1:
        return [Spread("single")]
    found = [
        Spread("ddp"),
        _sharded("fsdp, gather once", gpus, gathered="all", sums_whole=True),
        _sharded("fsdp", gpus),
    ]
    if gpus > gpus_per_node:
        found.append(_sharded("fsdp, hybrid", gpus_per_node))
    return [
        *found,
        _sharded("fsdp, offload", gpus, offload=True),
        Spread("zero2", gradients=gpus, optimizer=gpus, half=True),
        _sharded("zero3", gpus, half=True),
    ]


def spread_of(engine: EngineConfig, processes: int, per_node: int) -> Spread:
    """The sharding that a run's knobs select.

    Args:
        per_node: processes per machine.
    """
    if processes == 1:
        return Spread("single")
    gathered = "blocks" if engine.gather == "evaluation" else "all"
    sums_whole = engine.reduce == "once"
    if engine.kind == "fsdp":
        over = min(processes, per_node) if engine.hybrid else processes
        return _sharded("fsdp", over, gathered, sums_whole=sums_whole, offload=engine.offload)
    if engine.kind == "deepspeed" and engine.zero_stage == 3:
        return _sharded("zero3", processes, gathered, sums_whole=sums_whole, half=True)
    if engine.kind == "deepspeed":
        return Spread(
            "zero2", gradients=processes, optimizer=processes, sums_whole=sums_whole, half=True
        )
    return Spread("ddp")


def _sharded(name: str, over: int, gathered: str = "blocks", **others: Any) -> Spread:
    return Spread(name, over, over, over, gathered, **others)
