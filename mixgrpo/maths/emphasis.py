"""Which of an iteration's transitions are trained, and how much each counts: pure functions.

Samples are in prompt-major order, G of each group; advantages are those of all processes together.
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

    DanceGRPO's best-of-N (arXiv 2505.07818): the extremes teach most, and the update gets cheaper.
    Every group keeps as many, so processes stay in step; a failed sample (NaN) is kept only where
    valid ones do not suffice. Rows ascend.

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
    """Return loss weights [P*G]: 0 in groups without any advantage, P / (groups with some) else.

    The loss then is the average over the groups that have something to say, as in DAPO's dynamic
    sampling (arXiv 2503.14476), which draws others in their place. Masked, not dropped: every
    process evaluates as before. Failed samples (NaN) say nothing. All 0 if no group does.
    """
    useful = (advantages.nan_to_num(0.0).view(-1, samples) != 0).any(1, keepdim=True)
    weights = useful * (len(useful) / useful.sum().clamp(min=1))
    return weights.expand(-1, samples).reshape(-1).to(advantages.dtype)


def balanced(advantages: Tensor) -> Tensor:
    """Return advantages whose positive and negative ones have equal sums, of unchanged total: [B].

    Both signs are scaled, each by one factor for the whole batch. The clamp and a trimmed mean
    leave one sign with the larger say; BAPO (arXiv 2510.18927) adapts its clip ranges to that,
    here it is scaled away. With one sign alone, unchanged.
    """
    up, down = (side.nan_to_num(0.0).clamp(min=0).sum() for side in (advantages, -advantages))
    half = (up + down) / 2
    factor = torch.where(advantages > 0, half / up, half / down)
    return torch.where((up > 0) & (down > 0) & (advantages != 0), advantages * factor, advantages)


def step_weights(
    kind: str | Sequence[float], sigmas: Tensor, window: Window, transition: Transition
) -> Tensor:
    """Return the weight of each window step's loss: [w].

    | kind       | weight                                                                       |
    |------------|------------------------------------------------------------------------------|
    | equal      | 1                                                                            |
    | inverse_dt | 1 / (sigma - s'), GRPO-Guard's (arXiv 2510.22319)                            |
    | noise      | std over its mean in the window, TempFlow-GRPO's (arXiv 2508.04324)          |
    | a sequence | its entries, one for each of the window's steps                              |

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
    """Return how many of a window's ``steps`` are trained: the whole part of the share, at least 1.

    DanceGRPO's 0.6 makes 14 of 24 and 9 of 15.
    """
    # The share may fall just short of a whole number: 0.29 * 100 is 28.999999999999996.
    return max(1, int(steps * fraction + 1e-9))
