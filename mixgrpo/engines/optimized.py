"""Base class of the engines that use a torch optimizer on plain or DTensor parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from mixgrpo.engines import MakeOptimizer, Read
from mixgrpo.engines.processes import Processes, restore_schedule
from mixgrpo.engines.shards import part_of


class Optimized(Processes):
    """Plain or sharded parameters with their optimizer; see ``mixgrpo.engines.Engine``."""

    def __init__(
        self, module: nn.Module, device: torch.device, make_optimizer: MakeOptimizer
    ) -> None:
        super().__init__(device)
        self.unwrapped = module
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(self.trained.values())
        self.optimizer, self.schedule = make_optimizer(self.parameters)

    @property
    def shards(self) -> list[Tensor]:
        return [part_of(parameter) for parameter in self.parameters]

    def refresh(self) -> None:
        """Does nothing: no other state depends on the shards."""

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_gradients(self, max_norm: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.parameters, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self) -> None:
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.refresh()

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.trained.items()}

    def load_weights(self, read: Read) -> None:
        read(self.weights())
        self.refresh()

    def state(self) -> dict[str, Any]:
        self.optimizer.zero_grad(set_to_none=True)
        state: dict[str, Any] = {"model": self.weights(), "schedule": self.schedule.state_dict()}
        if self.optimizer.state:  # otherwise torch would take a step to create it
            state["optimizer"] = get_optimizer_state_dict(self.unwrapped, self.optimizer)
        return state

    def restore(self, read: Read) -> None:
        self.load_weights(lambda weights: read({"model": weights}))
        if restore_schedule(self.schedule, read):
            self.optimizer.zero_grad(set_to_none=True)
            state = get_optimizer_state_dict(self.unwrapped, self.optimizer)
            read({"optimizer": state})
            set_optimizer_state_dict(self.unwrapped, self.optimizer, state)
