"""Ways to train in parallel, behind one interface; the models know nothing of them."""

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
        module: on its device; or, where an engine shards it, without memory (on the meta device).
        blocks: the parts of it whose weights are gathered together, in the order of evaluation.
        dtype: of its matrix products.
        stored: its weights by name, to fill a module without memory.
    """

    module: nn.Module
    blocks: Sequence[nn.Module]
    dtype: torch.dtype
    stored: Mapping[str, Whole] | None = None


class Engine(Protocol):
    """Holds the trained module and its optimizer, and speaks to the other processes.

    Where weights are sharded, evaluating a module is collective: every process must evaluate
    equally often.

    Attributes:
        rank: this process, 0 .. world_size-1.
        world_size: number of processes.
        device: where this process computes.
        module: the module to call in forward passes (wrapped, if the engine wraps).
        settings: what the library behind the engine was told, if it takes a configuration.
    """

    rank: int
    world_size: int
    device: torch.device
    module: nn.Module
    settings: dict[str, Any]

    @property
    def shards(self) -> list[Tensor]:
        """What this process holds of the trained weights, float32; they share memory."""
        ...

    def refresh(self) -> None:
        """To be called after something else than ``step`` has changed the shards."""
        ...

    def place(self, frozen: Network) -> nn.Module:
        """The module to call of a network that is not trained, held as the trained one is."""
        ...

    def gathered(self) -> AbstractContextManager[Any]:
        """Inside, evaluations without gradients do not gather sharded weights anew each time."""
        ...

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Surrounds one forward and backward of an optimizer step, told which is its last one."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients; to be called inside ``accumulate``."""
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

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name, as in ``state``."""
        ...

    def load_weights(self, read: Read) -> None:
        """Restores the trained weights alone; see ``restore``."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that training changes, for torch.distributed.checkpoint; collective.

        Nested dicts: ``model`` (trained weights by name), ``schedule``, and after the first step
        ``optimizer`` (by the weights' names, as torch's get_optimizer_state_dict gives it). The
        layout is the same for every engine. Sharded tensors are DTensors; where an engine knows
        none, each process holds the whole tensors of some names. Not to be changed. Gradients are
        cleared.
        """
        ...

    def restore(self, read: Read) -> None:
        """Restores what ``state`` returned; collective.

        Args:
            read: fills a nested dict like those of ``state`` from what was saved: tensors in
                place, anything else by putting the saved value there.
        """
        ...
