"""Base class of all engines: the communication that they have in common."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from mixgrpo.engines import Read


class Processes:
    """This process within the group of processes that train together."""

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.device = device
        self.settings: dict[str, Any] = {}

    def gather(self, values: Tensor) -> Tensor:
        if self.world_size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def any(self, flag: bool) -> bool:
        if self.world_size == 1:
            return flag
        raised = torch.tensor(float(flag))  # on the CPU: see mixgrpo.engines.distributed
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised.item())

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def restore_schedule(schedule: LRScheduler, read: Read) -> bool:
    """Restores the schedule; returns whether steps were taken, so that optimizer state exists."""
    saved = {"schedule": schedule.state_dict()}
    read(saved)
    schedule.load_state_dict(saved["schedule"])
    return schedule.last_epoch > 0
