"""Hooks on diffusers' transformers: times keep their precision, and activations are cast once.

The hooks are functions, not methods, so that they are copied with the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn


def keep_times(transformer: Any, names: Sequence[str], factor: float) -> None:
    """Passes times to ``time_text_embed`` as they were given to the transformer.

    diffusers casts them to the dtype of the activations before it embeds them; in bfloat16, sigma
    would keep only 8 bits.

    Args:
        names: the transformer's arguments that are embedded, in the order of the embedding's first
            arguments; those that are not given are left out.
        factor: by which the transformer multiplies them.
    """
    note = partial(_note_times, tuple(names), factor)
    transformer.register_forward_pre_hook(note, with_kwargs=True)
    transformer.time_text_embed.register_forward_pre_hook(_use_noted_times)


def _note_times(
    names: Sequence[str],
    factor: float,
    transformer: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    times = [kwargs.get(name) for name in names]
    transformer.time_text_embed.exact = [factor * time for time in times if time is not None]


def _use_noted_times(embedding: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*embedding.exact, *args[len(embedding.exact) :])


def cast_feed_forward(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts what a feed-forward layer reads, if ``module`` is one, to the dtype of its products.

    The outputs are the same: the blocks' norms return float32 under autocast, which otherwise casts
    it anew for each product, those of adapters included.
    """
    if isinstance(module, FeedForward):
        module.register_forward_pre_hook(partial(_cast_input, dtype))


def _cast_input(dtype: torch.dtype, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].to(dtype),)
