"""Plain data parallelism: every process holds the whole model; gradients are averaged (DDP).

With one process there is nothing to wrap and nothing to exchange.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mixgrpo.engines.state import restore_training, training_state


class DataParallel:
    """See ``mixgrpo.engines.Engine``."""

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        make_optimizer: Callable[[list[nn.Parameter]], tuple[Optimizer, LRScheduler]],
    ) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.device = device
        self.module = module
        if self.world_size > 1:
            self.module = DistributedDataParallel(module, gradient_as_bucket_view=True)
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(self.trained.values())
        self.optimizer, self.schedule = make_optimizer(self.parameters)

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        if last or not isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def clip_gradients(self, max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(self.parameters, max_norm)

    def step(self) -> None:
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gather(self, values: Tensor) -> Tensor:
        if self.world_size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def any(self, flag: bool) -> bool:
        if self.world_size == 1:
            return flag
        raised = torch.tensor(float(flag))  # on the CPU: see mixgrpo.distributed
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised.item())

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def state(self) -> dict[str, Any]:
        return training_state(self.trained, self.optimizer, self.schedule)

    def restore(self, read: Callable[[dict[str, Any]], None]) -> None:
        restore_training(self.trained, self.optimizer, self.schedule, read)
