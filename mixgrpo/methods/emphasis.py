"""What of a rollout the update trains on, and how much of the loss each transition is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixgrpo.config import Config
from mixgrpo.maths.emphasis import (
    best_and_worst,
    step_weights,
    trained_steps,
    without_equal_groups,
)
from mixgrpo.maths.transitions import make_transition
from mixgrpo.noise import drawn_steps
from mixgrpo.types import Trajectory, Window


@dataclass(frozen=True)
class Emphasis:
    """The transitions that are trained, and their weights in the loss.

    Attributes:
        trained: [world*B, w] bool on the CPU: every process knows what all of them evaluate, and
            makes as many evaluations as the one with most. Each sample trains equally many steps.
        weights: [B, w] factors of this process's losses.
    """

    trained: Tensor
    weights: Tensor


def whole(trajectory: Trajectory, world_size: int = 1) -> Emphasis:
    """Every transition of this process's trajectory and of the others' equal ones, all alike."""
    count, size = len(trajectory), trajectory.window.size
    weights = torch.ones(count, size, device=trajectory.states.device)
    return Emphasis(torch.ones(world_size * count, size, dtype=torch.bool), weights)


def emphasize(
    config: Config,
    iteration: int,
    window: Window,
    trajectory: Trajectory,
    advantages: Tensor,
    rank: int,
    world_size: int,
) -> tuple[Trajectory, Tensor, Emphasis]:
    """What the update gets: the trajectory of the samples that are trained, advantages, emphasis.

    Args:
        window: the iteration's, in the whole schedule; the trajectory's lies at earlier steps
            where those before it were compressed.
        trajectory: this process's, of B samples.
        advantages: [world*B], of all samples; returned are those of this process's trained ones.
    """
    samples = config.batch.samples
    trained = _drawn(config, iteration, trajectory.window.size)
    weights = torch.ones_like(advantages)
    if config.advantage.skip_equal:
        weights = without_equal_groups(advantages, samples)
    if config.advantage.best_of:
        rows = best_and_worst(advantages.cpu(), samples, config.advantage.best_of)
        mine = rows.chunk(world_size)[rank] - rank * len(trajectory)
        trajectory, trained = trajectory.select(mine), trained[rows]
        rows = rows.to(advantages.device)
        advantages, weights = advantages[rows], weights[rows]
    advantages, weights = (part.chunk(world_size)[rank] for part in (advantages, weights))
    transition = make_transition(config.sampling.transition, config.sampling.eta)
    kind = config.update.step_weight
    if not isinstance(kind, str):
        kind = kind[window.start : window.stop]
    steps = step_weights(kind, trajectory.sigmas, trajectory.window, transition)
    return trajectory, advantages, Emphasis(trained, weights[:, None] * steps.to(weights.device))


def _drawn(config: Config, iteration: int, size: int) -> Tensor:
    """[world*B, w] bool: the same on every process."""
    prompts, samples = config.batch.prompts, config.batch.samples
    count = trained_steps(size, config.update.step_fraction)
    if count == size:
        return torch.ones(prompts * samples, size, dtype=torch.bool)
    return drawn_steps(config.run.seed, iteration, prompts, samples, size, count)
