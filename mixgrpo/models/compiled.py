"""Compiles a transformer's repeated blocks so that rollout and update run the same code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

# Limit on graphs per block type: one per batch size, twice as many if adapters are switched off.
_GRAPHS = 64


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
    """The modules whose types diffusers lists as repeated blocks."""
    kinds = transformer._repeated_blocks
    return (module for module in transformer.modules() if type(module).__name__ in kinds)


def _with_gradients(code: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    def forward(
        block: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, ...]:
        wanted = torch.is_grad_enabled()
        inputs = (_differentiable(x) for x in (hidden_states, encoder_hidden_states, temb))
        with torch.enable_grad():
            outputs = code(block, *inputs, image_rotary_emb, joint_attention_kwargs)
        return outputs if wanted else tuple(output.detach() for output in outputs)

    return forward


def _differentiable(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.detach().requires_grad_()
