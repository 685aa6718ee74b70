"""How an engine spreads weights, gradients and optimizer over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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


def _sharded(name: str, over: int, gathered: str = "blocks", **others: Any) -> Spread:
    return Spread(name, over, over, over, gathered, **others)
