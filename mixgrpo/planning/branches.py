"""What classifier-free guidance, with its two branches, does to memory and time."""

from __future__ import annotations

from dataclasses import dataclass

from mixgrpo.config import Config
from mixgrpo.models.guidance import Guides


@dataclass(frozen=True)
class Branches:
    """The branches of guidance; everything is 1 without it.

    Attributes:
        sampled: images that are evaluated together for each image that is sampled.
        updated: the same in the update.
        kept: branches whose activations the update keeps.
        differentiated: fraction of the update's evaluations that have a backward pass.
        waiting: backward passes whose gradients wait for that of another branch.
    """

    sampled: int
    updated: int
    kept: int
    differentiated: float
    waiting: int

    @classmethod
    def of(cls, config: Config) -> Branches:
        knobs = config.guidance
        guides = Guides.of(knobs)
        update = guides.update.passes
        kept = update if knobs.unconditional_gradient else 1
        return cls(
            sampled=max(guides.rollout.passes, guides.validation.passes) if knobs.batched else 1,
            updated=update if knobs.batched else 1,
            kept=kept,
            differentiated=kept / update,
            waiting=0 if knobs.batched else kept - 1,
        )
