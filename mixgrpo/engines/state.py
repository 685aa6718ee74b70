"""What an engine with one AdamW saves, by the weights' names, whole or as DTensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def training_state(
    trained: Mapping[str, nn.Parameter], optimizer: Optimizer, schedule: LRScheduler
) -> dict[str, Any]:
    """Weights, moments and schedule; the tensors are the run's own, no copies."""
    return {
        "model": {name: parameter.detach() for name, parameter in trained.items()},
        "optimizer": {name: _moments(optimizer, p) for name, p in trained.items()},
        "schedule": {"last_epoch": schedule.last_epoch, "_last_lr": schedule.get_last_lr()},
    }


def restore_training(
    trained: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    schedule: LRScheduler,
    read: Callable[[dict[str, Any]], None],
) -> None:
    """Fills weights and moments in place, and puts the schedule where it was."""
    state = training_state(trained, optimizer, schedule)
    read(state)
    schedule.load_state_dict({**schedule.state_dict(), **state["schedule"]})
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate


def _moments(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's state of a weight. Before its first step there is none: zeros say the same."""
    moments = optimizer.state[parameter]
    if not moments:
        on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
        moments["step"] = torch.zeros((), device=parameter.device if on_device else "cpu")
        moments["exp_avg"] = torch.zeros_like(parameter)
        moments["exp_avg_sq"] = torch.zeros_like(parameter)
    return moments
