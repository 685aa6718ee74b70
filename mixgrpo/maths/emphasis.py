"""Selection and weighting of the transitions that an iteration trains on: pure functions.

Samples are in prompt-major order, G per group. Advantages are those of all processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixgrpo.maths.schedule import step_at
from mixgrpo.maths.transitions import Transition
from mixgrpo.types import Window


def best_and_worst(advantages: Tensor, samples: int, count: int) -> Tensor:
    """Return the rows of the ``count``/2 best and ``count``/2 worst of each group: [P*count].

    This is DanceGRPO's best-of-N (arXiv 2505.07818): the extremes carry most of the signal, and the
    update becomes cheaper. Every group keeps the same number of samples, so all processes do the
    same amount of work. A failed sample (NaN) is kept only if its group has too few valid ones. The
    rows are in ascending order.

    Args:
        advantages: [P*G].
        count: even, at most ``samples`` = G.
    """
    assert 0 < count <= samples and count % 2 == 0
    kept = [_extremes(group, count) for group in advantages.view(-1, samples)]
    return torch.cat([rows + samples * p for p, rows in enumerate(kept)])


def _extremes(values: Tensor, count: int) -> Tensor:
    order = values.argsort(stable=True)  # NaN comes last
    valid = int((~values.isnan()).sum())
    middle = valid // 2
    order = torch.cat([order[:middle], order[valid:], order[middle:valid]])
    half = count // 2
    return torch.cat([order[:half], order[len(order) - half :]]).sort().values


def without_equal_groups(advantages: Tensor, samples: int) -> Tensor:
    """Return loss weights [P*G] that leave out the groups whose advantages are all zero.

    The weight is 0 in such groups and P / (number of other groups) elsewhere, so the loss is the
    average over the groups with a signal. DAPO's dynamic sampling (arXiv 2503.14476) draws new
    groups in place of those without one. The groups are masked, not dropped, so that every process
    makes the same number of model evaluations as before. The advantages of failed samples (NaN)
    count as zero. If no group has a signal, all weights are 0.
    """
    useful = (advantages.nan_to_num(0.0).view(-1, samples) != 0).any(1, keepdim=True)
    weights = useful * (len(useful) / useful.sum().clamp(min=1))
    return weights.expand(-1, samples).reshape(-1).to(advantages.dtype)


def balanced(advantages: Tensor) -> Tensor:
    """Return [B] advantages scaled so that the positive and negative ones have equal absolute sums.

    Each sign is scaled by one factor for the whole batch, and the sum of the absolute values stays
    the same. Clamping and trimmed means let one sign outweigh the other; BAPO (arXiv 2510.18927)
    compensates by adapting its clip ranges, whereas this function rescales the advantages. If all
    advantages have the same sign, they are returned unchanged.
    """
    up, down = (side.nan_to_num(0.0).clamp(min=0).sum() for side in (advantages, -advantages))
    half = (up + down) / 2
    factor = torch.where(advantages > 0, half / up, half / down)
    return torch.where((up > 0) & (down > 0) & (advantages != 0), advantages * factor, advantages)


def step_weights(
    kind: str | Sequence[float], sigmas: Tensor, window: Window, transition: Transition
) -> Tensor:
    """Return the loss weight of each window step: [w].

    | kind       | weight                                                                       |
    |------------|------------------------------------------------------------------------------|
    | equal      | 1                                                                            |
    | inverse_dt | 1 / (sigma - s'), GRPO-Guard's (arXiv 2510.22319)                            |
    | noise      | std / (mean std of the window), TempFlow-GRPO's (arXiv 2508.04324)           |
    | a sequence | its entries, one per step of the window                                      |

    Args:
        sigmas: [T+1] on the CPU.
        window: indices into ``sigmas``.

    Raises:
        ValueError: for an unknown kind.
    """
    if not isinstance(kind, str):
        return torch.tensor(kind, dtype=torch.float32)
    step = step_at(sigmas, torch.tensor(window.steps))
    if kind == "equal":
        return torch.ones(window.size)
    if kind == "inverse_dt":
        return 1 / (step.sigma - step.sigma_next).flatten()
    if kind == "noise":
        nothing = torch.zeros_like(step.sigma)
        std = transition(nothing, nothing, step).std.flatten()
        return std / std.mean()
    raise ValueError(f"unknown step weight {kind!r}; known: equal, inverse_dt, noise, or a list")


def trained_steps(steps: int, fraction: float) -> int:
    """Return how many of a window's ``steps`` are trained: max(1, floor(steps*fraction)).

    DanceGRPO's fraction of 0.6 gives 14 of 24 steps and 9 of 15.
    """
    # The product may fall just short of an integer: 0.29 * 100 is 28.999999999999996.
    return max(1, int(steps * fraction + 1e-9))
