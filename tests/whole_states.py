"""An engine's state in whole tensors, however many processes share it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mixgrpo.engines.shards import copy_part


def whole(state: Any) -> Any:
    """Copies of all of a nested state, on every process, which all must call."""
    copied = map_tensors(state, lambda tensor: whole_of(tensor, keep=True))
    if not dist.is_initialized():
        return copied
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, copied)
    return _merged(parts)


def whole_of(tensor: Tensor, keep: bool) -> Tensor:
    """A copy of the whole tensor on the CPU, empty if not kept; every process must call."""
    detached = tensor.detach()
    if isinstance(detached, DTensor):
        detached = detached.full_tensor()
    return detached.to("cpu", copy=True) if keep else torch.empty(0)


def map_tensors(value: Any, do: Callable[[Tensor], Any]) -> Any:
    """Nested dicts and lists with ``do`` done to every tensor in them."""
    if isinstance(value, Tensor):
        return do(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, do) for key, item in value.items()}
    if isinstance(value, list):
        return [map_tensors(item, do) for item in value]
    return value


def read_from(saved: Any) -> Callable[[Any], None]:
    """What fills a nested state from a saved one of whole tensors: see ``Engine.restore``."""
    return lambda state: _fill(state, saved)


def _merged(parts: list[Any]) -> Any:
    """Of processes of which each may hold some names alone."""
    if not isinstance(parts[0], dict):
        return parts[0]
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: _merged([part[key] for part in parts if key in part]) for key in keys}


def _fill(state: Any, saved: Any) -> None:
    for key in state if isinstance(state, dict) else range(len(state)):
        if isinstance(state[key], Tensor):
            copy_part(state[key], saved[key])
        elif isinstance(state[key], dict | list):
            _fill(state[key], saved[key])
        else:
            state[key] = saved[key]
