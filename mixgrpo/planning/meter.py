"""Counts operations and bytes of a network on the meta device, block by block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

F = nn.functional

# What autocast on a GPU computes in the lower precision, and what in float32, as far as networks
# use it ("Autocast Op Reference" in PyTorch's documentation).
_LOWER = (
    *(F.linear, F.scaled_dot_product_attention, F.conv1d, F.conv2d, F.conv3d),
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm),
    *(torch.addmm, torch.baddbmm, torch.einsum),
)
_FLOAT = (
    *(F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, torch.sum, Tensor.sum),
    *(torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.exp, Tensor.exp),
)


@dataclass
class Section:
    """A block, or all that is outside of blocks.

    Attributes:
        weights: floating-point operations in products with weights.
        attention: those in products between tokens.
        kept: bytes that the backward pass needs and that no earlier section keeps, without weights
            and their casts.
        inputs: bytes of the inputs, without those of earlier sections.
    """

    weights: int = 0
    attention: int = 0
    kept: int = 0
    inputs: int = 0


class Meter(TorchDispatchMode):
    """Context in which a network on the meta device is measured.

    Attributes:
        sections: what was measured, by the names of the blocks and "" for what is outside.
        peak: the most bytes that were alive at the same time, without weights and their casts.
        largest: bytes of the largest tensor.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.sections: defaultdict[str, Section] = defaultdict(Section)
        self.peak = self.largest = 0
        self._section = ""
        # Storages: those of weights and of what is computed from weights alone, and others.
        self._of_weights = WeakIdKeyDictionary()
        self._alive, self._saved, self._passed = (WeakIdKeyDictionary() for _ in range(3))
        for tensor in (*network.parameters(), *network.buffers()):
            self._of_weights[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        inputs = list(_storages((args, kwargs)))
        from_weights = [storage in self._of_weights for storage in inputs]
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            operations = count(*args, **(kwargs or {}), out_val=outputs)
            section = self.sections[self._section]
            if any(from_weights):
                section.weights += operations
            else:
                section.attention += operations
        for storage in _storages(outputs):
            if from_weights and all(from_weights):
                self._of_weights[storage] = True
            elif storage not in self._of_weights:
                self._alive[storage] = storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(self._alive.values()))
        return outputs

    def keep(self, tensor: Tensor) -> Tensor:
        """Counts what autograd saves; a hook for ``torch.autograd.graph.saved_tensors_hooks``."""
        storage = tensor.untyped_storage()
        if storage not in self._of_weights and storage not in self._saved:
            self._saved[storage] = True
            self.sections[self._section].kept += storage.nbytes()
        return tensor

    def watch(self, name: str, block: nn.Module) -> None:
        """Gives a block a section of its own."""

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._section = name
            for storage in _storages((args, kwargs)):
                if storage not in self._of_weights and storage not in self._passed:
                    self._passed[storage] = True
                    self.sections[name].inputs += storage.nbytes()

        def leave(_: nn.Module, args: Any, outputs: Any) -> None:
            self._section = ""

        block.register_forward_pre_hook(enter, with_kwargs=True)
        block.register_forward_hook(leave)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


class LikeGpu(TorchFunctionMode):
    """Context in which the meta device keeps what a GPU keeps, with fused kernels and autocast.

    Args:
        dtype: that of autocast, which float32 turns off.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.casts: dict[Any, torch.dtype] = {}
        if dtype != torch.float32:
            self.casts = {**dict.fromkeys(_LOWER, dtype), **dict.fromkeys(_FLOAT, torch.float32)}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if (dtype := self.casts.get(func)) is not None:
            args, kwargs = tree_map_only(Tensor, lambda x: _cast(x, dtype), (args, kwargs))
        return _FUSED.get(func, func)(*args, **kwargs)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


class _Attention(torch.autograd.Function):
    """A fused kernel, which keeps its inputs and output but no product of queries and keys."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, tokens, _ = query.shape
        # In the memory, the heads of a token are next to each other, as they are in the inputs.
        out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, mask, out)
        return out


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
) -> Any:
    return _Attention.apply(query, key, value, attn_mask)


class _Norm(torch.autograd.Function):
    """A fused norm, which keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)


def _rms_norm(
    x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Any:
    if weight is None or weight.dtype == x.dtype:
        return _Norm.apply(x, weight)
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + (eps or 0.0))
    return (normal * weight).to(x.dtype)


_FUSED = {F.scaled_dot_product_attention: _attention, F.rms_norm: _rms_norm}
