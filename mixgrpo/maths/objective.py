"""The clipped policy objective and the KL penalty, per sample and step.

The log-ratios come from `mixgrpo.maths.transitions` and are averaged over the latent elements,
which is why clip ranges are as small as 1e-4. Comparisons are made between logarithms: near 1 a
float32 ratio has a resolution of 1e-7, whereas its logarithm resolves far smaller differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mixgrpo.maths.transitions import mean_per_sample, upcast


def clipped_loss(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Return PPO's loss max(-A*rho, -A*clamp(rho, 1-clip, 1+clip)), rho = exp(log_ratio): [N].

    The derivative with respect to ``log_ratio`` is -A*rho, or 0 where `is_clipped`. A NaN
    advantage gives a NaN loss: set failed samples' advantages to 0 first.

    Raises:
        ValueError: if ``clip`` is outside (0, 1).
    """
    clipped = log_ratio.clamp(*_log_bounds(clip))
    # The branch is chosen by comparing logarithms: two exponentials that round to the same float32
    # would tie in torch.maximum, and a clipped sample would keep half of its gradient.
    active = torch.where(is_clipped(log_ratio, advantages, clip), clipped, log_ratio)
    return -advantages * active.exp()


def is_clipped(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Return where clipping is active, [N] bool: there the gradient is zero.

    It is active at rho > 1+clip for a positive advantage and at rho < 1-clip for a negative one. On
    the other side the unclipped branch has the larger loss, and at advantage 0 the gradient is zero
    anyway.
    """
    low, high = _log_bounds(clip)
    return ((advantages > 0) & (log_ratio > high)) | ((advantages < 0) & (log_ratio < low))


def kl_to_reference(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """Return KL(policy | reference) of two normals with equal ``std``, averaged over D: [N], nats.

    mean_D[(mean - mean_ref)^2] / (2 std^2), as in Flow-GRPO (arXiv 2505.05470); means [N, S, C].
    """
    return mean_per_sample((upcast(mean) - upcast(mean_ref)) ** 2 / (2 * std**2))


class Prediction(NamedTuple):
    """A policy's predictions at N states: ``v`` and ``mean`` [N, S, C], ``std`` [N, 1, 1]."""

    v: Tensor
    mean: Tensor
    std: Tensor


KL = Callable[[Prediction, Prediction], Tensor]


def kl_in_mean(policy: Prediction, reference: Prediction) -> Tensor:
    """Return `kl_to_reference` of the two policies' steps: [N]."""
    return kl_to_reference(policy.mean, reference.mean, policy.std)


def kl_in_velocity(policy: Prediction, reference: Prediction) -> Tensor:
    """Return mean_D[(v - v_ref)^2]: [N].

    This equals the KL in the mean up to a factor that depends only on the step. Without that factor
    all steps are penalised equally, rather than those with little noise more than the others.
    """
    return mean_per_sample((upcast(policy.v) - upcast(reference.v)) ** 2)


def make_kl(kind: str) -> KL:
    """Return the KL penalty of kind "mean" or "velocity"; raise ValueError for any other kind."""
    known: dict[str, KL] = {"mean": kl_in_mean, "velocity": kl_in_velocity}
    if kind not in known:
        raise ValueError(f"unknown KL form {kind!r}; known: {', '.join(known)}")
    return known[kind]


_FARTHEST = 2.0**10


def adapted_kl_weight(weight: float, kl: float, target: float, first: float) -> float:
    """Return the next iteration's KL weight, given this iteration's KL (PPO, arXiv 1707.06347).

    The weight is doubled if the KL is above 1.5 * target and halved if it is below target / 1.5. It
    is unchanged at a KL of exactly 0, where the policy still equals the reference. It stays within
    a factor of 1024 of the ``first`` weight, so that it can return to it in ten iterations.
    """
    if kl > 1.5 * target:
        return min(2 * weight, first * _FARTHEST)
    return max(weight / 2, first / _FARTHEST) if 0 < kl < target / 1.5 else weight


def _log_bounds(clip: float) -> tuple[float, float]:
    """log(1-clip) and log(1+clip)."""
    if not 0 < clip < 1:
        raise ValueError(f"the clip range must be in (0, 1), got {clip}; 1e-4 is usual")
    return math.log1p(-clip), math.log1p(clip)
