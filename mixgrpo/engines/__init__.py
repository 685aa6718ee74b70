"""Engines for parallel training, behind one interface that the models need not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mixgrpo.engines.shards import Whole

MakeOptimizer = Callable[[list[nn.Parameter]], tuple[Optimizer, LRScheduler]]
Read = Callable[[Any], None]


@dataclass(frozen=True)
class Network:
    """A module and what an engine needs to know to place it.

    Attributes:
        module: the module on its device or, if an engine will shard it, on the meta device.
        blocks: the submodules whose weights are gathered together, in the order of evaluation.
        dtype: dtype of its matrix products.
        stored: its weights by name, used to fill a module on the meta device.
    """

    module: nn.Module
    blocks: Sequence[nn.Module]
    dtype: torch.dtype
    stored: Mapping[str, Whole] | None = None


class Engine(Protocol):
    """Holds the trained module and its optimizer, and communicates with the other processes.

    If weights are sharded, evaluating a module is a collective operation: every process must
    evaluate it equally often.

    Attributes:
        rank: rank of this process, 0 .. world_size-1.
        world_size: number of processes.
        device: device of this process.
        module: the module to call in forward passes, wrapped if the engine wraps it.
        settings: the configuration passed to the library behind the engine, if it takes one.
    """

    rank: int
    world_size: int
    device: torch.device
    module: nn.Module
    settings: dict[str, Any]

    @property
    def shards(self) -> list[Tensor]:
        """This process's shards of the trained weights, float32; they share memory."""
        ...

    def refresh(self) -> None:
        """Must be called after the shards have been changed by anything other than ``step``."""
        ...

    def place(self, frozen: Network) -> nn.Module:
        """Places a network that is not trained like the trained one; returns the module to call."""
        ...

    def gathered(self) -> AbstractContextManager[Any]:
        """Context in which evaluations without gradients share one gathering of sharded weights."""
        ...

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Context for a forward and backward pass; ``last`` marks the last of an optimizer step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients; must be called inside ``accumulate``."""
        ...

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Clips the gradient norm to ``max_norm``; returns the norm before that, on every rank."""
        ...

    def step(self) -> None:
        """Takes one optimizer and scheduler step, and clears the gradients."""
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

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name, in the layout of ``state``."""
        ...

    def load_weights(self, read: Read) -> None:
        """Restores only the trained weights; see ``restore``."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that training changes, for torch.distributed.checkpoint; collective.

        Returns nested dicts: ``model`` (trained weights by name), ``schedule``, and after the first
        step ``optimizer`` (keyed by the names of the weights, as torch's get_optimizer_state_dict
        returns it). The layout is the same for every engine. Sharded tensors are DTensors; in an
        engine without DTensors, each process holds the whole tensors of some names. The returned
        tensors must not be modified. Clears the gradients.
        """
        ...

    def restore(self, read: Read) -> None:
        """Restores a saved ``state``; collective.

        Args:
            read: fills a nested dict with the layout of ``state`` from the saved state: tensors
                in place, anything else by assigning the saved value.
        """
        ...
