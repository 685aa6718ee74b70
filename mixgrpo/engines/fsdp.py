"""Fully sharded data parallelism (FSDP2): every process holds a shard of each weight.

Weights, gradient sums and the optimizer's moments are float32. Weights are cast to the model's
dtype before they are gathered for computation. Inputs are not cast, because the model itself
decides which of them keep full precision.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from mixgrpo.config import EngineConfig
from mixgrpo.engines import MakeOptimizer, Network
from mixgrpo.engines.optimized import Optimized
from mixgrpo.engines.shards import copy_part, load_buffers


class FullySharded(Optimized):
    """See ``mixgrpo.engines.Engine``."""

    def __init__(
        self,
        network: Network,
        knobs: EngineConfig,
        device: torch.device,
        make_optimizer: MakeOptimizer,
    ) -> None:
        self.knobs = knobs
        self.mesh = make_mesh(device, knobs.hybrid)
        self.sharded = [_shard(network, self.mesh, knobs.offload, device)]
        self.module = network.module
        super().__init__(network.module, device, make_optimizer)

    def place(self, frozen: Network) -> nn.Module:
        # Gathered weights have the dtype of the products anyway, so they can be stored in it.
        module = nn.Module.to(frozen.module, frozen.dtype)
        network = Network(module, frozen.blocks, frozen.dtype, frozen.stored)
        self.sharded.append(_shard(network, self.mesh, self.knobs.offload, self.device))
        return module

    def refresh(self) -> None:
        """Frees gathered weights, which are out of date."""
        for module in self._groups():
            module.reshard()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        self._reshard_after_forward(self.knobs.gather == "evaluation")
        try:
            yield
        finally:
            self._reshard_after_forward(True)
            self.refresh()

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        trained, keep = self.sharded[0], self.knobs.gather == "once"
        self._reshard_after_forward(not keep)
        trained.set_reshard_after_backward(last or not keep)
        trained.set_requires_gradient_sync(last or self.knobs.reduce == "micro_batch")
        trained.set_requires_all_reduce(last)
        yield

    def _reshard_after_forward(self, reshard: bool) -> None:
        for module in self.sharded:
            module.set_reshard_after_forward(reshard)

    def _groups(self) -> Iterator[FSDPModule]:
        for sharded in self.sharded:
            assert isinstance(sharded, nn.Module)
            yield from (module for module in sharded.modules() if isinstance(module, FSDPModule))


def make_mesh(device: torch.device, hybrid: bool) -> DeviceMesh:
    """A mesh that shards over all processes or, if hybrid, shards within each host and replicates.

    Raises:
        ValueError: if ``hybrid`` and the hosts have different numbers of processes.
    """
    world = torch.distributed.get_world_size()
    if not hybrid:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    counts: list[int] = [0] * world
    torch.distributed.all_gather_object(counts, local)
    if world % local or len(set(counts)) > 1:
        raise ValueError(
            "engine.hybrid needs the same number of processes on every host, but this host has "
            f"{local} of {world} and others have "
            f"{', '.join(map(str, sorted(set(counts) - {local})))}; set --engine.hybrid false"
        )
    shape = (world // local, local)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def _shard(network: Network, mesh: DeviceMesh, offload: bool, device: torch.device) -> FSDPModule:
    """Shards a network in place, and loads its weights if it is on the meta device."""
    policy = MixedPrecisionPolicy(
        param_dtype=network.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    off = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for module in (*network.blocks, network.module):
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=off)
    assert isinstance(network.module, FSDPModule)
    if network.stored is not None:
        network.module.to_empty(device=torch.device("cpu") if offload else device)
        load_buffers(network.module, network.stored, device)
        for name, parameter in network.module.named_parameters():
            copy_part(parameter, network.stored[name])
    return network.module
