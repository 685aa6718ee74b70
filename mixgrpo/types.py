"""Data types passed between the stages of an iteration: windows, embeddings, trajectories.

Symbols used for shapes throughout: P prompts, G samples per prompt (a group), B = P*G samples in
prompt-major order, T denoising steps, w window size, S latent tokens, C channels per token, L text
tokens. Sigma is 1 at pure noise and 0 at data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad


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
    """Encoded prompts.

    Attributes:
        tokens: [N, L, C_text].
        pooled: [N, C_pooled]; None if the model's text encoders make no such vector.
        lengths: [N] int64 on the CPU, the tokens of each prompt, behind which zeros are padding
            that the model must not see; None if nothing is padding.
        negative: the prompts of the unconditional branch of classifier-free guidance, one for all N
            or one for each; None without guidance.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    lengths: Tensor | None = None
    negative: TextEmbedding | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> TextEmbedding:
        """The prompts at these positions, a slice or int64 on the CPU."""
        there = rows if isinstance(rows, slice) else rows.to(self.tokens.device, non_blocking=True)
        negative = self.negative
        if negative is not None and len(negative) > 1:
            negative = negative[rows]
        return TextEmbedding(
            self.tokens[there],
            None if self.pooled is None else self.pooled[there],
            None if self.lengths is None else self.lengths[rows],
            negative,
        )

    def repeat_each(self, times: int) -> TextEmbedding:
        """[N] -> [N*times], the copies of each prompt next to each other."""
        if times == 1:
            return self
        return self[torch.arange(len(self)).repeat_interleave(times)]

    def to(self, device: torch.device) -> TextEmbedding:
        return self.moved(lambda values: values.to(device))

    def moved(self, move: Callable[[Tensor], Tensor]) -> TextEmbedding:
        """With ``move`` applied to every tensor but the lengths, which stay on the CPU."""
        return TextEmbedding(
            move(self.tokens),
            None if self.pooled is None else move(self.pooled),
            self.lengths,
            None if self.negative is None else self.negative.moved(move),
        )

    @property
    def positive(self) -> TextEmbedding:
        """The prompts without those of the unconditional branch."""
        return replace(self, negative=None)

    @staticmethod
    def join(parts: Sequence[TextEmbedding]) -> TextEmbedding:
        """All prompts of several embeddings; the shorter ones are padded with zeros.

        Negative prompts are left out. Whether there are lengths depends on the parts' shapes, never
        on their values: a model may compute differently with a mask, and must do so in the rollout
        and the update alike.
        """
        widths = {part.tokens.shape[1] for part in parts}
        longest = max(widths)
        padded = len(widths) > 1 or any(part.lengths is not None for part in parts)
        lengths = torch.cat([part.true_lengths for part in parts])
        pooled = [part.pooled for part in parts if part.pooled is not None]
        missing = [longest - part.tokens.shape[1] for part in parts]
        tokens = [pad(part.tokens, (0, 0, 0, n)) for part, n in zip(parts, missing, strict=True)]
        return TextEmbedding(
            torch.cat(tokens),
            torch.cat(pooled) if pooled else None,
            lengths if padded else None,
        )

    def padded_to(self, multiple: int) -> TextEmbedding:
        """The same with lengths, and with padding up to a multiple of so many tokens."""
        missing = -self.tokens.shape[1] % multiple
        return replace(self, tokens=pad(self.tokens, (0, 0, 0, missing)), lengths=self.true_lengths)

    @property
    def true_lengths(self) -> Tensor:
        """[N] int64 on the CPU, the tokens of each prompt."""
        if self.lengths is not None:
            return self.lengths
        return torch.full((len(self),), self.tokens.shape[1])


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
