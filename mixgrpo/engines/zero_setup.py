"""DeepSpeed setup: its configuration, and the initialisation of modules."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mixgrpo.config import EngineConfig
from mixgrpo.engines import Network
from mixgrpo.engines.shards import copy_part, load_buffers


def settings(knobs: EngineConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration that is passed to DeepSpeed."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # micro-batches are formed here, not by DeepSpeed
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
        "zero_optimization": {
            "stage": knobs.zero_stage,
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,
        },
        "torch_autocast": {
            "enabled": dtype != torch.float32,
            "dtype": str(dtype).removeprefix("torch."),
        },
    }


def import_deepspeed(device: torch.device) -> Any:
    """Imports DeepSpeed for this device; it logs warnings only and compiles nothing."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    if device.type == "cpu":
        # It would probe compilers and compile its own collectives; gloo's are sufficient.
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    return deepspeed


def initialize(module: nn.Module, config: dict[str, Any], **more: Any) -> Any:
    import deepspeed

    return deepspeed.initialize(model=module, config=config, dist_init_required=False, **more)[0]


def partition(network: Network, config: dict[str, Any], device: torch.device) -> None:
    """Loads weights that are on the meta device block by block, and partitions them."""
    import deepspeed

    if network.stored is None:
        return  # DeepSpeed partitions weights that are already in memory
    load_buffers(network.module, network.stored, device)
    for part in chain(network.blocks, [network.module]):
        fresh = []
        for module in part.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    full = torch.empty_like(parameter, device=device)
                    fresh.append(nn.Parameter(full, requires_grad=parameter.requires_grad))
                    setattr(module, name, fresh[-1])
        names = {id(p): name for name, p in network.module.named_parameters()}
        for parameter in fresh:
            copy_part(parameter, network.stored[names[id(parameter)]])
        deepspeed.zero.Init(module=nn.ParameterList(fresh), config_dict_or_path=config)


@contextmanager
def no_learning(optimizer: Optimizer) -> Iterator[None]:
    """Context in which an optimizer step with zero gradients changes no weight."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
