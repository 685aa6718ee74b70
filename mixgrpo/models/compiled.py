"""Compiles a transformer's repeated blocks so that rollout and update run the same code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

# Limit on graphs per block type: one per batch size and length of texts, twice as many if adapters
# are switched off.
_GRAPHS = 128


def compile_blocks(transformer: Any, backend: str | Callable[..., Any]) -> None:
    """Compiles the blocks of a diffusers transformer in place; blocks of a type share their code.

    A graph is compiled for static shapes, at the first evaluation of each batch size. A compiler
    generates different code with and without gradients, which rounds differently: the ratio of an
    unchanged policy would not be 1. Blocks therefore always run the code that saves activations for
    the backward pass; without gradients these are freed after each block.
    """
    # The code is shared by all blocks, and all batch sizes count against the same limit.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    # DDP would split a graph where its buckets of gradients end. A block's graph is small enough
    # for communication to overlap with the other blocks' backward passes.
    torch._dynamo.config.optimize_ddp = False
    forwards: dict[type, Callable[..., Any]] = {}
    for block in repeated_blocks(transformer):
        kind = type(block)
        if kind not in forwards:
            code = torch.compile(kind.forward, backend=backend, fullgraph=True, dynamic=False)
            forwards[kind] = _with_gradients(code)
        # A bound method, not a closure over the block: a copy of the block gets its own.
        block.forward = MethodType(forwards[kind], block)


def repeated_blocks(transformer: Any) -> Iterator[nn.Module]:
    """The blocks of a diffusers transformer, in the order of evaluation: the modules that diffusers
    never splits over devices."""
    kinds = set(transformer._no_split_modules)
    for module in transformer.modules():
        # An engine may have put a class of its own before the block's.
        if kinds.intersection(kind.__name__ for kind in type(module).__mro__):
            yield module


def _with_gradients(code: Callable[..., Any]) -> Callable[..., Any]:
    def forward(block: nn.Module, *args: Any, **named: Any) -> Any:
        wanted = torch.is_grad_enabled()
        args = tuple(map(_differentiable, args))
        named = {name: _differentiable(value) for name, value in named.items()}
        with torch.enable_grad():
            outputs = code(block, *args, **named)
        return outputs if wanted else tree_map_only(Tensor, Tensor.detach, outputs)

    return forward


def _differentiable(value: Any) -> Any:
    """Activations as they are in training; positions are in tuples, and masks are not floats."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.requires_grad:
        return value
    return value.detach().requires_grad_()
