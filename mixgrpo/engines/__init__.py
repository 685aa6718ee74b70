"""Ways to train in parallel, behind one interface; the models know nothing of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Engine(Protocol):
    """Holds the trained module and its optimizer, and speaks to the other processes.

    Attributes:
        rank: this process, 0 .. world_size-1.
        world_size: number of processes.
        device: where this process computes.
        module: the module to call in forward passes (wrapped, if the engine wraps).
    """

    rank: int
    world_size: int
    device: torch.device
    module: nn.Module

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Surrounds one forward and backward; gradients are exchanged only in the last one."""
        ...

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scales the gradients down to ``max_norm``; returns their norm before, on every rank."""
        ...

    def step(self) -> None:
        """One optimizer and schedule step; gradients are cleared."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """[n, ...] on every rank -> [world_size*n, ...] in rank order, the same on every rank."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        ...

    def barrier(self) -> None:
        """Waits for every rank."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, nested: "model", "optimizer" and "schedule", by full names.

        Called by all processes together. Sharded tensors are DTensors; under one name all
        processes hold the same, and a name may be one process's alone.
        """
        ...

    def restore(self, read: Callable[[dict[str, Any]], None]) -> None:
        """Continues from a checkpoint, which another number of processes may have written.

        Args:
            read: fills the tensors of a nested dict, as ``state`` returns one, in place, and
                replaces its other leaves; called by all processes together.
        """
        ...
