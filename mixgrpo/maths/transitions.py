"""Denoising steps, deterministic and stochastic, and their log-probabilities: pure functions.

Every stochastic step returns a `Normal`. Sampling from it, its density and the ratio of two
densities are separate functions, which the rollout and the update share. x and v are [N, S, C] in
any float dtype; results are float32, or float64 if x is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mixgrpo.maths.schedule import Step


class Normal(NamedTuple):
    """A diagonal normal: ``mean`` [N, S, C], ``std`` broadcastable to it ([] or [N, 1, 1])."""

    mean: Tensor
    std: Tensor


Transition = Callable[[Tensor, Tensor, Step], Normal]
LogRatio = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def upcast(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or unchanged if it is float64: half precision biases the ratio."""
    return x if x.dtype == torch.float64 else x.float()


def predict_data(x: Tensor, v: Tensor, step: Step) -> Tensor:
    """Return x0_hat = x - sigma*v, the data that the velocity points away from."""
    return upcast(x) - step.sigma * upcast(v)


def predict_noise(x: Tensor, v: Tensor, step: Step) -> Tensor:
    """Return x1_hat = x + (1-sigma)*v, the noise that the velocity points to."""
    return upcast(x) + (1 - step.sigma) * upcast(v)


def euler(x: Tensor, v: Tensor, step: Step) -> Tensor:
    """Return the deterministic step x + v*dt of the probability-flow ODE."""
    return upcast(x) + upcast(v) * (step.sigma_next - step.sigma)


def flow_sde(x: Tensor, v: Tensor, step: Step, eta: float) -> Normal:
    """Flow-SDE of Flow-GRPO (arXiv 2505.05470) and MixGRPO: g = eta*sqrt(sigma/(1-sigma~)).

    sigma~ is sigma, or ``step.sigma_after_one`` where sigma is exactly 1 and g would be infinite.
    """
    sigma = step.sigma
    below_one = torch.where(sigma == 1, step.sigma_after_one, sigma)
    return _euler_maruyama(x, v, step, eta * torch.sqrt(sigma / (1 - below_one)))


def dance_sde(x: Tensor, v: Tensor, step: Step, eta: float) -> Normal:
    """Dance-SDE of DanceGRPO (arXiv 2505.07818): a constant diffusion coefficient, g = eta."""
    return _euler_maruyama(x, v, step, torch.full_like(step.sigma, eta))


def cps(x: Tensor, v: Tensor, step: Step, eta: float) -> Normal:
    """Coefficient-preserving sampling (arXiv 2509.05952): std = s'*sin(eta*pi/2), eta in [0, 1].

    The noise does not shrink with the step size: eta controls how much of the noise at level s' is
    redrawn at each step.
    """
    angle = eta * math.pi / 2
    kept, std = step.sigma_next * math.cos(angle), step.sigma_next * math.sin(angle)
    return _coefficient_preserving(x, v, step, kept, std)


def precise(x: Tensor, v: Tensor, step: Step, eta: float) -> Normal:
    """Coefficient-preserving step (arXiv 2605.23522): std = s'*sqrt(1 - rho^(eta^2)).

    rho = s'(1-sigma) / (sigma(1-s')). The noise equals Flow-SDE's to first order in dt, without the
    excess variance at finite dt. At sigma = 1, rho is 0: all noise is redrawn and
    mean = (1-s')*x0_hat.
    """
    sigma, after = step.sigma, step.sigma_next
    # Logarithms keep the precision of rho near 1, and rho = 0 gives exp(-inf) = 0 without a branch.
    log_rho = torch.log(after * (1 - sigma)) - torch.log(sigma * (1 - after))
    kept = after * torch.exp(0.5 * eta**2 * log_rho)
    std = after * torch.sqrt(-torch.expm1(eta**2 * log_rho))
    return _coefficient_preserving(x, v, step, kept, std)


def _euler_maruyama(x: Tensor, v: Tensor, step: Step, diffusion: Tensor) -> Normal:
    """mean = x + (v + g^2/(2 sigma) * x1_hat) * dt, std = g*sqrt(-dt).

    The second term of the drift compensates, in distribution, for the added noise: -x1_hat/sigma is
    the score, so the marginals remain those of the ODE (Song et al., arXiv 2011.13456).
    """
    dt = step.sigma_next - step.sigma
    correction = diffusion**2 / (2 * step.sigma) * predict_noise(x, v, step)
    return Normal(upcast(x) + (upcast(v) + correction) * dt, diffusion * torch.sqrt(-dt))


def _coefficient_preserving(x: Tensor, v: Tensor, step: Step, kept: Tensor, std: Tensor) -> Normal:
    """mean = (1-s')*x0_hat + kept*x1_hat with kept^2 + std^2 = s'^2, so the noise level is s'.

    ``kept`` is passed in rather than computed as sqrt(s'^2 - std^2), to avoid cancellation.
    """
    data, noise = predict_data(x, v, step), predict_noise(x, v, step)
    return Normal((1 - step.sigma_next) * data + kept * noise, std)


_TRANSITIONS: dict[str, Callable[..., Normal]] = {
    "flow_sde": flow_sde,
    "dance_sde": dance_sde,
    "cps": cps,
    "precise": precise,
}


def make_transition(kind: str, eta: float) -> Transition:
    """Return the stochastic step ``kind`` ("flow_sde", "dance_sde", "cps", "precise") at ``eta``.

    Raises:
        ValueError: for an unknown kind, eta <= 0, or eta > 1 with "cps".
    """
    if kind not in _TRANSITIONS:
        raise ValueError(f"unknown transition {kind!r}; known: {', '.join(_TRANSITIONS)}")
    if not 0 < eta < math.inf:
        raise ValueError(
            f"eta must be a positive number, got {eta}; at eta 0 the step is deterministic and has "
            "no log-probability to train on: use the ODE for steps without noise"
        )
    if kind == "cps" and eta > 1:
        raise ValueError(f"cps needs eta in (0, 1], got {eta}; at 1 all noise is redrawn")
    return partial(_TRANSITIONS[kind], eta=eta)


def sample(normal: Normal, noise: Tensor) -> Tensor:
    """Return mean + std*noise for standard normal ``noise`` of the mean's shape."""
    return normal.mean + normal.std * upcast(noise)


def log_prob(x_next: Tensor, normal: Normal) -> Tensor:
    """Return the log-density of ``x_next`` averaged over the D elements of a sample: [N], nats.

    mean_D[-(x'-mean)^2/(2 std^2) - log std - log sqrt(2 pi)]. Averaging makes exp(difference) the
    true ratio to the power 1/D, which is why published clip ranges are 1e-6..1e-4.
    """
    deviation = (upcast(x_next) - normal.mean) / normal.std
    density = -0.5 * deviation**2 - torch.log(normal.std) - 0.5 * math.log(2 * math.pi)
    return mean_per_sample(density)


def unscaled_log_prob(x_next: Tensor, normal: Normal) -> Tensor:
    """Return mean_D[-(x'-mean)^2], [N]: used in place of a log-density in published CPS code.

    It lacks 1/(2 std^2) and the constants, so its clip ranges are not comparable to `log_prob`'s.
    """
    return mean_per_sample(-((upcast(x_next) - normal.mean) ** 2))


def log_ratio(x_next: Tensor, new_mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """Return log_prob(x', new) - log_prob(x', old) for a common ``std``, from the means: [N].

    mean_D[(mean_new - mean_old) * (2x' - mean_new - mean_old)] / (2 std^2), which is exactly zero
    for equal means and, unlike the difference of two log-densities, stays precise near zero.
    """
    return mean_per_sample(_square_difference(x_next, new_mean, old_mean) / (2 * std**2))


def unscaled_log_ratio(x_next: Tensor, new_mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """Return the difference of two `unscaled_log_prob` values: [N]; ``std`` is ignored."""
    return mean_per_sample(_square_difference(x_next, new_mean, old_mean))


def guarded_log_ratio(x_next: Tensor, new_mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """Return (log rho + mean_D[(new-old)^2]/(2 std^2)) * std, GRPO-Guard's (arXiv 2510.22319): [N].

    This equals mean_D[(new - old) * (x' - old)] / std. It removes the quadratic term, which biases
    log rho below zero, and the spread no longer grows as std shrinks: a single clip range then acts
    equally on both sides and at every step. That range is about std times the one for `log_ratio`.
    """
    new, old = upcast(new_mean), upcast(old_mean)
    return mean_per_sample((new - old) * (upcast(x_next) - old) / std)


def make_log_ratio(kind: str) -> LogRatio:
    """Return the log-ratio function "normal", "unscaled" or "guard"; else raise ValueError."""
    known: dict[str, LogRatio] = {
        "normal": log_ratio,
        "unscaled": unscaled_log_ratio,
        "guard": guarded_log_ratio,
    }
    if kind not in known:
        raise ValueError(f"unknown log-ratio {kind!r}; known: {', '.join(known)}")
    return known[kind]


def mean_per_sample(values: Tensor) -> Tensor:
    """[N, ...] -> [N]: the mean over all elements of each sample."""
    return values.flatten(1).mean(1)


def _square_difference(x_next: Tensor, new_mean: Tensor, old_mean: Tensor) -> Tensor:
    """(x' - old)^2 - (x' - new)^2, factored to avoid cancellation."""
    new, old = upcast(new_mean), upcast(old_mean)
    return (new - old) * (2 * upcast(x_next) - new - old)
