"""Classifier-free guidance: two branches of the network as one velocity."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mixgrpo.config import GuidanceConfig
from mixgrpo.types import TextEmbedding, Velocity

Combine = Callable[[Tensor, Tensor, float], Tensor]
"""From the conditional and the unconditional velocity, and the scale, to the guided one."""


@dataclass(frozen=True)
class Guidance:
    """How the branches are evaluated and combined.

    Attributes:
        scale: w; 1 is no guidance.
        batched: evaluate both branches in one batch of twice the size.
        unconditional_gradient: let gradients flow through the unconditional branch.
    """

    scale: float = 1.0
    batched: bool = False
    unconditional_gradient: bool = True

    @property
    def passes(self) -> int:
        """Model evaluations per velocity."""
        return 2 if self.scale > 1 else 1


@dataclass(frozen=True)
class Guides:
    """The guidance of each phase of a run."""

    rollout: Guidance
    update: Guidance
    validation: Guidance

    @property
    def are_used(self) -> bool:
        """Whether any phase has guidance."""
        return any(guide.passes > 1 for guide in (self.rollout, self.update, self.validation))

    @classmethod
    def of(cls, knobs: GuidanceConfig) -> Guides:
        """As the knobs say; the update and validations follow the rollout's scale by default."""
        scales = (knobs.scale, knobs.update_scale, knobs.validation_scale)
        return cls(
            *(
                Guidance(
                    knobs.scale if scale is None else scale,
                    knobs.batched,
                    knobs.unconditional_gradient,
                )
                for scale in scales
            )
        )


def guided(velocity: Velocity, combine: Combine, guidance: Guidance) -> Velocity:
    """The guided velocity, for texts with negative prompts.

    Args:
        velocity: of the model without guidance.
        combine: the family's way to combine the branches.
    """

    def evaluate(x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
        assert text.negative is not None, "guidance needs negative prompts"
        negative = text.negative.repeat_each(len(text) // len(text.negative))
        if guidance.batched:
            both = TextEmbedding.join([text.positive, negative])
            branches = velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), both)
            conditional, unconditional = branches.chunk(2)
        else:
            conditional = velocity(x, sigma, text.positive)
            with nullcontext() if guidance.unconditional_gradient else torch.no_grad():
                unconditional = velocity(x, sigma, negative)
        return combine(conditional, unconditional, guidance.scale)

    return evaluate
