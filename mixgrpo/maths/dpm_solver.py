"""Deterministic solvers of the probability-flow ODE: Euler and multistep DPM-Solver++.

A solver stores the predictions of one batch: create a new one for each batch. Its coefficients are
computed as Python floats (float64). Keep the schedule on the CPU, where reading a sigma does not
synchronise with the device; CPU scalars can be combined with latents on any device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from mixgrpo.maths.schedule import Step
from mixgrpo.maths.transitions import euler, predict_data, upcast

VARIANTS = ("midpoint", "heun")
# As in diffusers: with fewer steps than this, the last ones are too coarse for third order.
SHORT_SCHEDULE = 15


class Prediction(NamedTuple):
    """The data prediction ``x0_hat`` [N, S, C] at one noise level ``sigma`` in (0, 1]."""

    x0_hat: Tensor
    sigma: float


class Solver(Protocol):
    """Takes the ODE steps of one batch, and observes the predictions at its other steps."""

    def observe(self, x0_hat: Tensor, sigma: float | Tensor) -> None:
        """Store the data prediction [N, S, C] of a step that another sampler (the SDE) takes."""
        ...

    def step(self, x: Tensor, v: Tensor, step: Step) -> Tensor:
        """Return the latent at ``step.sigma_next`` from x and v [N, S, C] at ``step.sigma``."""
        ...


def make_solver(kind: str, sigmas: Tensor, order: int = 2, variant: str = "midpoint") -> Solver:
    """Return a new solver for one batch that follows the schedule ``sigmas`` [T+1].

    Args:
        kind: "euler", or "dpm" for multistep DPM-Solver++.
        order: 1, 2 or 3, for "dpm".
        variant: "midpoint" or "heun", the second-order correction of "dpm".

    Raises:
        ValueError: for a kind, order or variant that is not listed above.
    """
    if kind == "euler":
        return Euler()
    if kind == "dpm":
        return DPMSolver(sigmas, order, variant)
    raise ValueError(f"unknown solver {kind!r}; known: euler, dpm")


class Euler:
    """First-order solver; it stores no predictions."""

    def observe(self, x0_hat: Tensor, sigma: float | Tensor) -> None:
        """Do nothing: the Euler step uses no earlier predictions."""

    def step(self, x: Tensor, v: Tensor, step: Step) -> Tensor:
        return euler(x, v, step)


class DPMSolver:
    """Multistep DPM-Solver++ (arXiv 2211.01095), which stores the last ``order`` predictions.

    In a schedule of fewer than 15 steps, the second-to-last step is at most of second order, as in
    diffusers (``lower_order_final``). In any schedule the last step, to sigma 0, returns x0_hat.
    """

    def __init__(self, sigmas: Tensor, order: int = 2, variant: str = "midpoint") -> None:
        if order not in (1, 2, 3):
            raise ValueError(f"the order of DPM-Solver++ must be 1, 2 or 3, got {order}")
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
        self.order = order
        self.variant = variant
        self.is_short = len(sigmas) - 1 < SHORT_SCHEDULE
        self.last_sigma = float(sigmas[-2])
        self.history: list[Prediction] = []

    def observe(self, x0_hat: Tensor, sigma: float | Tensor) -> None:
        self.history = [*self.history, Prediction(upcast(x0_hat), float(sigma))][-self.order :]

    def step(self, x: Tensor, v: Tensor, step: Step) -> Tensor:
        self.observe(predict_data(x, v, step), step.sigma)
        return dpm_step(self.history, x, step, self._order_of(step), self.variant)

    def _order_of(self, step: Step) -> int:
        second_to_last = float(step.sigma_next) == self.last_sigma
        return min(self.order, 2) if self.is_short and second_to_last else self.order


def dpm_step(
    history: Sequence[Prediction], x: Tensor, step: Step, order: int, variant: str = "midpoint"
) -> Tensor:
    """Return x' [N, S, C] after one multistep step of DPM-Solver++ with data prediction.

    x' = (s'/sigma)*x - alpha'*(e^-h - 1)*D0 + correction(order), with alpha = 1-sigma,
    lambda = log(alpha/sigma), h = lambda' - lambda and D0 the newest prediction; order 1 is the
    Euler step of a flow. The order is limited by the length of the history. A prediction at
    sigma = 1, where lambda is -inf, is infinitely far away and has weight 0: order 2 then reduces
    to order 1, and order 3 to order 2 (in its "heun" form, the limit of the formula). A step to
    sigma 0 returns D0.

    Args:
        history: oldest first; the last entry is the prediction at ``step.sigma``.
        step: scalar sigmas, which are read as Python floats.
    """
    sigma, after = float(step.sigma), float(step.sigma_next)
    assert history and history[-1].sigma == sigma, "the newest prediction is the step's own"
    newest = history[-1].x0_hat
    if after == 0:
        return newest
    h = _log_snr(after) - _log_snr(sigma)
    x_next = (after / sigma) * upcast(x) - (1 - after) * math.expm1(-h) * newest
    order = min(order, len(history))
    if order == 1:
        return x_next
    if order == 2:
        return x_next + (1 - after) * _second_order(history, h, variant)
    return x_next + (1 - after) * _third_order(history, h)


def _second_order(history: Sequence[Prediction], h: float, variant: str) -> Tensor:
    """-(e^-h - 1)/2 * D1 (midpoint) or ((e^-h - 1)/h + 1) * D1 (heun), D1 = (m0 - m1)*h/h0."""
    (m1, s1), (m0, s0) = history[-2:]
    h0 = _log_snr(s0) - _log_snr(s1)
    weight = -0.5 * math.expm1(-h) if variant == "midpoint" else math.expm1(-h) / h + 1
    return (weight * h / h0) * (m0 - m1)


def _third_order(history: Sequence[Prediction], h: float) -> Tensor:
    """((e^-h - 1)/h + 1) * D1 - ((e^-h - 1 + h)/h^2 - 1/2) * D2, in the paper's D1 and D2.

    D1 is h*m' to second order, but D2 is (h^2/2)*m'' where the Taylor expansion requires h^2*m''.
    We follow the authors' code and diffusers, which both use this D2. The global error is therefore
    of second order, with a smaller constant than that of order 2.
    """
    (m2, s2), (m1, s1), (m0, s0) = history[-3:]
    r0 = (_log_snr(s0) - _log_snr(s1)) / h
    r1 = (_log_snr(s1) - _log_snr(s2)) / h
    newer, older = (m0 - m1) / r0, (m1 - m2) / r1
    d1 = newer + (r0 / (r0 + r1)) * (newer - older)
    d2 = (newer - older) / (r0 + r1)
    first = math.expm1(-h) / h + 1
    second = (math.expm1(-h) + h) / h**2 - 0.5
    return first * d1 - second * d2


def _log_snr(sigma: float) -> float:
    """lambda = log((1-sigma)/sigma), -inf at sigma = 1."""
    return -math.inf if sigma == 1 else math.log1p(-sigma) - math.log(sigma)
