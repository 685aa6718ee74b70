"""Exponential moving average (EMA) of the trained weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


class Ema:
    """Keeps a float32 average of ``parameters``, with decay min((1+n)/(10+n), decay) at update n.

    The small early decays let the average move away from its initial value quickly (Flow-GRPO,
    arXiv 2505.05470).

    Args:
        parameters: the weights, or this process's shards of them.
        changed: called after the weights and their averages have been swapped.
        on_cpu: keep the average on the CPU.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        decay: float,
        changed: Callable[[], None] = lambda: None,
        on_cpu: bool = False,
    ) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.changed = changed
        self.updates = 0
        self.average = [
            p.detach().to("cpu" if on_cpu else p.device, copy=True) for p in self.parameters
        ]

    @torch.no_grad()
    def update(self) -> None:
        decay = min((1 + self.updates) / (10 + self.updates), self.decay)
        self.updates += 1
        for average, parameter in zip(self.average, self.parameters, strict=True):
            average.lerp_(parameter.detach().to(average.device), 1 - decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Context in which the parameters hold their averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.average, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)
        self.changed()
