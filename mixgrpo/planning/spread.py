"""How an engine spreads weights, gradients and optimizer over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mixgrpo.config import EngineConfig


@dataclass(frozen=True)
class Spread:
    """Each is divided by the number of processes that share it.

    Attributes:
        name: as the plan's table shows it.
        weights, gradients, optimizer: processes that hold a part each; 1: everyone holds all.
        gathered: of sharded weights, what is held whole while they are computed with: "all" for a
            whole phase, or those of the "blocks" at hand and next; "" where nothing is gathered.
        sums_whole: gradients are summed up whole, in float32, up to the optimizer step.
        half: sharded weights rest in bfloat16, the optimizer holds float32 ones beside (ZeRO).
        offload: weights, gradients and optimizer rest on the CPU.
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
    """Every way to spread a run over so many GPUs, the one that holds most first."""
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
    """The one that a run's knobs ask for.

    Args:
        per_node: processes on one machine.
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
