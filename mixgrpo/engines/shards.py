"""Helpers for tensors that may be sharded (DTensor): local parts, and filling them from a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class Whole(Protocol):
    """A whole tensor that can be sliced, in memory or in a file (safetensors slices)."""

    def __getitem__(self, index: Any, /) -> Tensor: ...


def part_of(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; it shares the tensor's memory."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


@torch.no_grad()
def load_buffers(module: nn.Module, stored: Mapping[str, Whole], device: torch.device) -> None:
    """Replaces the buffers of a module, which may have no memory, by the stored ones.

    Every process holds them whole: engines shard only parameters.
    """
    for path, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            whole = torch.empty_like(buffer, device=device)
            copy_part(whole, stored[f"{path}.{name}" if path else name])
            setattr(owner, name, whole)


def copy_part(into: Tensor, whole: Whole) -> None:
    """Fills this process's part of ``into`` from ``whole``, of which only that part is read."""
    part, place = part_of(into), tuple(slice(0, size) for size in into.shape)
    if isinstance(into, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            into.shape, into.device_mesh, into.placements
        )
        place = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
    if part.numel():
        part.copy_(whole[place])
