"""Data parallelism (DDP): every process holds the whole model, and gradients are averaged.

With a single process the module is not wrapped and nothing is communicated.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mixgrpo.engines import MakeOptimizer, Network
from mixgrpo.engines.optimized import Optimized


class DataParallel(Optimized):
    """See ``mixgrpo.engines.Engine``."""

    def __init__(
        self, module: nn.Module, device: torch.device, make_optimizer: MakeOptimizer
    ) -> None:
        super().__init__(module, device, make_optimizer)
        self.module = module
        if self.world_size > 1:
            self.module = DistributedDataParallel(module, gradient_as_bucket_view=True)

    def place(self, frozen: Network) -> nn.Module:
        return frozen.module

    def gathered(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        if last or not isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()
