"""Model families: what a policy must offer to be sampled, trained and saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mixgrpo.types import TextEmbedding, Velocity


class Text(Protocol):
    """Where embeddings come from: text encoders, or a folder of stored ones."""

    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        """Embeddings of N prompts, on the policy's device."""
        ...

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than the text encoder takes."""
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
        latent_shape: (S, C) of one picture's latent.
        compute_dtype: of the network's matrix products.
        stored: if the network was loaded without memory (on the meta device), its weights by name,
            of which parts can be read like a tensor's.
    """

    module: nn.Module
    latent_shape: tuple[int, int]
    compute_dtype: torch.dtype
    stored: Mapping[str, Any] | None

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        """The parts of the network, or of a copy, that are evaluated one after the other."""
        ...

    def velocity(self, module: nn.Module) -> Velocity:
        """The velocity through ``module``: the policy's own, wrapped by an engine, or a copy."""
        ...

    def untrained(self) -> nn.Module | None:
        """A frozen copy of the network; None where adapters can be switched off instead."""
        ...

    def without_adapters(self, module: nn.Module) -> Velocity:
        """The velocity through ``module`` of the model beside which the adapters are trained."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, S, C] at sigma 0 -> images [N, 3, H, W] float32 in [0, 1]."""
        ...
