"""The clipped policy objective and the KL penalty, per sample and step.

The log-ratios come from `mixgrpo.maths.transitions`, averaged over latent elements; that is why
clip ranges are as small as 1e-4, and why everything here compares logarithms: near 1 a float32
ratio has steps of 1e-7, its logarithm has not.
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
    # Choosing the branch by logarithm: two exponentials that round to the same float32 would tie in
    # torch.maximum, and a clipped sample would keep half of its gradient.
    active = torch.where(is_clipped(log_ratio, advantages, clip), clipped, log_ratio)
    return -advantages * active.exp()


def is_clipped(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Return where the clip bites, [N] bool: the sample moved beyond it, and gets no gradient.

    That is rho > 1+clip for a positive advantage and rho < 1-clip for a negative one; on the other
    side the unclipped branch is the larger loss, and advantage 0 has no gradient to lose.
    """
    low, high = _log_bounds(clip)
    return ((advantages > 0) & (log_ratio > high)) | ((advantages < 0) & (log_ratio < low))


def kl_to_reference(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """Return KL(policy | reference) of two normals of one ``std``, averaged over D: [N], nats.

    mean_D[(mean - mean_ref)^2] / (2 std^2), as Flow-GRPO (arXiv 2505.05470); means [N, S, C].
    """
    return mean_per_sample((upcast(mean) - upcast(mean_ref)) ** 2 / (2 * std**2))


class Prediction(NamedTuple):
    """A policy at N states: velocity ``v`` and the step's ``mean`` [N, S, C], ``std`` [N, 1, 1]."""

    v: Tensor
    mean: Tensor
    std: Tensor


KL = Callable[[Prediction, Prediction], Tensor]


def kl_in_mean(policy: Prediction, reference: Prediction) -> Tensor:
    """Return `kl_to_reference` of the two policies' steps: [N]."""
    return kl_to_reference(policy.mean, reference.mean, policy.std)


def kl_in_velocity(policy: Prediction, reference: Prediction) -> Tensor:
    """Return mean_D[(v - v_ref)^2]: [N].

    The KL in the mean up to a factor that depends on the step alone; without it every step is held
    to the reference equally, those of little noise not more than others.
    """
    return mean_per_sample((upcast(policy.v) - upcast(reference.v)) ** 2)


def make_kl(kind: str) -> KL:
    """Return the penalty of the kind "mean" or "velocity", else ValueError."""
    known: dict[str, KL] = {"mean": kl_in_mean, "velocity": kl_in_velocity}
    if kind not in known:
        raise ValueError(f"unknown form of the KL {kind!r}; known: {', '.join(known)}")
    return known[kind]


_FARTHEST = 2.0**10


def adapted_kl_weight(weight: float, kl: float, target: float, first: float) -> float:
    """Return the weight for the next iteration, from the KL of this one (PPO, arXiv 1707.06347).

    Doubled where the KL is above 1.5 times its target, halved where it is below the 1.5th part; at
    a KL of exactly 0, where the policy is the reference still, it stays. It goes no farther than
    1024 times up or down from the ``first`` one: from there it is ten iterations back.
    """
    if kl > 1.5 * target:
        return min(2 * weight, first * _FARTHEST)
    return max(weight / 2, first / _FARTHEST) if 0 < kl < target / 1.5 else weight


def _log_bounds(clip: float) -> tuple[float, float]:
    """log(1-clip) and log(1+clip)."""
    if not 0 < clip < 1:
        raise ValueError(f"the clip range must be in (0, 1), got {clip}; 1e-4 is usual")
    return math.log1p(-clip), math.log1p(clip)
