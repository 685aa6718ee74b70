"""The clipped policy objective and the KL penalty, per sample and step.

The log-ratios come from `mixgrpo.maths.transitions`, averaged over latent elements; that is why
clip ranges are as small as 1e-4, and why everything here compares logarithms: near 1 a float32
ratio has steps of 1e-7, its logarithm has not.
"""

from __future__ import annotations

import math

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


def _log_bounds(clip: float) -> tuple[float, float]:
    """log(1-clip) and log(1+clip)."""
    if not 0 < clip < 1:
        raise ValueError(f"the clip range must be in (0, 1), got {clip}; 1e-4 is usual")
    return math.log1p(-clip), math.log1p(clip)
