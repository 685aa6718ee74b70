"""A flow whose answers are known in closed form: data x0 ~ N(MEAN, STD^2), noise x1 ~ N(0, 1).

x = (1-sigma)*x0 + sigma*x1 is normal with mean (1-sigma)*MEAN and `variance(sigma)`; the ideal
model's velocity E[x1 - x0 | x] is affine in x. So every transition maps a normal to a normal whose
mean and variance follow from the transition's values at two points, without any sampling.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixgrpo.maths.schedule import Step, step_at
from mixgrpo.maths.transitions import Transition

MEAN = 0.5
STD = 0.3


def variance(sigma: Tensor, std: float = STD) -> Tensor:
    return ((1 - sigma) * std) ** 2 + sigma**2


def velocity(x: Tensor, sigma: Tensor, std: float = STD) -> Tensor:
    slope = (sigma - (1 - sigma) * std**2) / variance(sigma, std)
    return -MEAN + slope * (x - (1 - sigma) * MEAN)


def ode_solution(x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Where the exact probability-flow ODE carries ``x``: it keeps the number of deviations."""
    scale = (variance(sigma_next) / variance(sigma)).sqrt()
    return (1 - sigma_next) * MEAN + scale * (x - (1 - sigma) * MEAN)


def marginal(sigma: Tensor, std: float = STD) -> tuple[float, float]:
    """Mean and variance of x at ``sigma``."""
    return float((1 - sigma) * MEAN), float(variance(sigma, std))


def propagate(
    moments: tuple[float, float], sigmas: Tensor, transition: Transition, std: float = STD
) -> tuple[float, float]:
    """Mean and variance of x after all steps of ``sigmas`` (float64), exactly."""
    mean, var = moments
    points = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1)
    for index in range(len(sigmas) - 1):
        step = step_at(sigmas, index)
        normal = transition(points, velocity(points, step.sigma, std), step)
        offset, slope = float(normal.mean[0]), float(normal.mean[1] - normal.mean[0])
        mean, var = offset + slope * mean, slope**2 * var + float(normal.std) ** 2
    return mean, var


def integrate(
    x: Tensor, sigmas: Tensor, advance: Callable[[Tensor, Tensor, Step], Tensor]
) -> Tensor:
    """Carry ``x`` through all steps of ``sigmas`` with ``advance(x, v, step)``."""
    for index in range(len(sigmas) - 1):
        step = step_at(sigmas, index)
        x = advance(x, velocity(x, step.sigma), step)
    return x
