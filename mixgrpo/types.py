"""Data types passed between the stages of an iteration: windows, embeddings, trajectories.

Symbols used for shapes throughout: P prompts, G samples per prompt (a group), B = P*G samples in
prompt-major order, T denoising steps, w window size, S latent tokens, C channels per token, L text
tokens. Sigma is 1 at pure noise and 0 at data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """The steps ``start .. stop-1``, which are sampled with the SDE and trained. Never empty."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a window needs 0 <= start < stop, got [{self.start}, {self.stop})")

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def steps(self) -> range:
        return range(self.start, self.stop)

    def __contains__(self, step: int) -> bool:
        return self.start <= step < self.stop

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"


@dataclass(frozen=True)
class TextEmbedding:
    """Encoded prompts: ``tokens`` [N, L, C_text] and ``pooled`` [N, C_pooled]."""

    tokens: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: Tensor | slice) -> TextEmbedding:
        return TextEmbedding(self.tokens[index], self.pooled[index])

    def repeat_each(self, times: int) -> TextEmbedding:
        """[N] -> [N*times], the copies of each prompt next to each other."""
        if times == 1:
            return self
        return TextEmbedding(
            self.tokens.repeat_interleave(times, 0), self.pooled.repeat_interleave(times, 0)
        )

    def to(self, device: torch.device) -> TextEmbedding:
        return TextEmbedding(self.tokens.to(device), self.pooled.to(device))


class Velocity(Protocol):
    """The model as sampling and training see it: predicts v = x1 - x0 at (x, sigma, text)."""

    def __call__(self, x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
        """x [N, S, C] float32, sigma [N] float32 in (0, 1] -> velocity [N, S, C] float32."""
        ...


@dataclass(frozen=True)
class Trajectory:
    """What a rollout keeps for the update: only the window's steps and the final latent.

    Attributes:
        sigmas: [T+1] float32, decreasing from 1 to exactly 0; the tail may be compressed (Flash).
        window: the trained steps, indices into ``sigmas``.
        states: [B, w+1, S, C] float32, the latents at ``window.start .. window.stop``.
        old_means: [B, w, S, C] float32, the rollout policy's mean for each window step.
        final: [B, S, C] float32, the latent at sigma 0.
        text: the B samples' prompts are ``text[group]``; P embeddings.
        group: [B] int64 on the CPU, position of each sample's prompt in ``text``.
        shared: whether a group's samples share the initial noise, and so the state at window.start.
        evaluations: total number of model evaluations of this rollout.
    """

    sigmas: Tensor
    window: Window
    states: Tensor
    old_means: Tensor
    final: Tensor
    text: TextEmbedding
    group: Tensor
    shared: bool
    evaluations: int

    def __len__(self) -> int:
        return self.states.shape[0]

    def select(self, rows: Tensor) -> Trajectory:
        """Selects samples; ``rows`` are ascending, on the CPU, and equally many for each group."""
        here = rows.to(self.states.device)
        return replace(
            self,
            states=self.states[here],
            old_means=self.old_means[here],
            final=self.final[here],
            group=self.group[rows],
        )

    @property
    def evaluations_per_image(self) -> float:
        return self.evaluations / len(self)


# Reward name -> [B] float32 scores; NaN marks a sample whose reward failed.
Scores = Mapping[str, Tensor]

# What a prompt file says about a prompt beside its text: values of JSON by key, never changed.
Metadata = Mapping[str, Any]
