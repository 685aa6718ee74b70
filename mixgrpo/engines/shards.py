"""Tensors of which each process may hold a part (DTensor): their parts, the whole, filling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class Whole(Protocol):
    """A whole tensor of which parts can be taken, in memory or in a file (safetensors' slices)."""

    def __getitem__(self, index: Any, /) -> Tensor: ...


def part_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; it shares its memory."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


@torch.no_grad()
def copy_part(into: Tensor, whole: Whole) -> None:
    """Fills this process's part of ``into`` with that of ``whole``; nothing else of it is read."""
    part, place = part_of(into), tuple(slice(0, size) for size in into.shape)
    if isinstance(into, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            into.shape, into.device_mesh, into.placements
        )
        place = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
    if part.numel():
        part.copy_(whole[place])


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


def _fill(state: Any, saved: Any) -> None:
    for key in state if isinstance(state, dict) else range(len(state)):
        if isinstance(state[key], Tensor):
            copy_part(state[key], saved[key])
        elif isinstance(state[key], dict | list):
            _fill(state[key], saved[key])
        else:
            state[key] = saved[key]
