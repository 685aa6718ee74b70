"""Selects the transitions of a rollout that the update trains on, and weights their losses."""

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
    """The transitions that are trained on, and their weights in the loss.

    Attributes:
        trained: [world*B, w] bool on the CPU, True for each transition that is trained on. The
            number of trained steps is the same for every sample. The mask covers the samples of
            all processes because every process must make as many model evaluations as the one
            that needs the most.
        weights: [B, w] factors of the losses of this process's transitions.
    """

    trained: Tensor
    weights: Tensor


def whole(trajectory: Trajectory, world_size: int = 1) -> Emphasis:
    """Selects every transition of every process, all with weight 1.

    All processes have trajectories of the same size.
    """
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
    """Returns the inputs of the update: trajectory and advantages of the trained samples, emphasis.

    Args:
        window: the window of this iteration in the uncompressed schedule. ``trajectory.window``
            starts earlier if the steps before the window were compressed.
        trajectory: this process's trajectory, of B samples.
        advantages: [world*B], the advantages of the samples of all processes. The returned ones
            are those of this process's trained samples.
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
    """Draws the steps that each sample trains on: [world*B, w] bool, the same on every process."""
    prompts, samples = config.batch.prompts, config.batch.samples
    count = trained_steps(size, config.update.step_fraction)
    if count == size:
        return torch.ones(prompts * samples, size, dtype=torch.bool)
    return drawn_steps(config.run.seed, iteration, prompts, samples, size, count)
