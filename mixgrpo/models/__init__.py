"""Model families: the interface of a policy that can be sampled, trained and saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mixgrpo.models.guidance import Guidance
from mixgrpo.types import TextEmbedding, Velocity


class Text(Protocol):
    """A source of text embeddings: text encoders, or a folder of stored embeddings."""

    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        """Embeddings of N prompts, on the policy's device."""
        ...

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many of the prompts exceed the length that the text encoder accepts."""
        ...


class TextEncoder(Text, Protocol):
    """Text encoders."""

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Each prompt's tokens before truncation."""
        ...


class Policy(Text, Protocol):
    """A generative model with its text and decoder.

    Attributes:
        module: the trained network; an engine may wrap it.
        latent_shape: (S, C) of one image's latent.
        compute_dtype: dtype of the network's matrix products.
        stored: if the network is on the meta device, its weights by name, which can be sliced like
            tensors.
    """

    module: nn.Module
    latent_shape: tuple[int, int]
    compute_dtype: torch.dtype
    stored: Mapping[str, Any] | None

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        """The blocks of the network, or of a copy of it, in the order of evaluation."""
        ...

    def velocity(self, module: nn.Module, guidance: Guidance | None = None) -> Velocity:
        """The velocity predicted by ``module``: the policy's own, a wrapped module, or a copy."""
        ...

    def untrained(self) -> nn.Module | None:
        """A frozen copy of the network; None if adapters can be switched off instead."""
        ...

    def without_adapters(self, module: nn.Module, guidance: Guidance | None = None) -> Velocity:
        """The velocity predicted by ``module`` with its adapters switched off."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, S, C] at sigma 0 -> images [N, 3, H, W] float32 in [0, 1]."""
        ...
