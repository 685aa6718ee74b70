"""Group-relative advantages, computed from the rewards of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# A group whose spread is below this fraction of the rewards' magnitude differs only by float32
# rounding: it carries no signal.
_EQUAL = 4 * torch.finfo(torch.float32).eps
_GROUP_EPS = 1e-8
_GLOBAL_EPS = 1e-4


def group_advantages(
    scores: Mapping[str, Tensor],
    group: Tensor,
    weights: Mapping[str, float],
    kind: str,
    clip: float,
    trim: float = 0.0,
) -> Tensor:
    """Return each sample's advantage over its group, clamped to +-``clip``: [B].

    | kind           | definition                                                                 |
    |----------------|----------------------------------------------------------------------------|
    | advantage_sum  | z-score of each reward in its group (ddof 1, +1e-8), then the weighted sum |
    | reward_sum     | weighted sum of the rewards, then its z-score in the group                 |
    | gdpo           | advantage_sum, divided by its standard deviation over the batch (ddof 1)   |
    | global_std     | weighted sum minus its group mean, over the batch's std (ddof 0, +1e-4)    |

    advantage_sum is MixGRPO's (arXiv 2507.21802), global_std Flow-GRPO's (arXiv 2505.05470). "The
    batch" is what is passed in: with several processes, gather the scores first.

    With ``trim``, the means and standard deviations of a group are trimmed (Tukey's robust
    statistics): the lowest and the highest floor(trim*n) of its n valid rewards are left out, so
    that a single outlier affects neither. The samples left out still get advantages like the
    others. If the remaining rewards of a group are equal, all of its advantages are 0.

    A sample has failed if any reward with a positive weight is NaN or infinite. It is excluded from
    all statistics and its advantage is NaN; the update must give it no gradient (`torch.nan_to_num`
    to 0 before the loss). The advantages of a group are exactly 0 if it has fewer than two valid
    samples, or if its rewards are equal up to float32 rounding (a standard deviation below 5e-7 of
    their magnitude).

    Args:
        scores: reward name -> [B]; rewards without a positive weight are ignored.
        group: [B] int64 in 0..P-1, each sample's prompt, in any order.
        weights: reward name -> weight >= 0; normalised to sum to 1.
        kind: one of the kinds in the table above.
        clip: positive; 5 in the papers.
        trim: in [0, 0.5); 0 uses all rewards.

    Returns:
        [B] float32, or float64 if any of the scores is float64.

    Raises:
        ValueError: if ``kind`` is unknown; if a weight is negative, not finite or has no scores; if
            all weights are zero; if the shape of a reward's scores differs from that of ``group``;
            if ``clip`` <= 0; or if ``trim`` is outside [0, 0.5).
    """
    if kind not in _KINDS:
        raise ValueError(f"unknown advantage kind {kind!r}; known: {', '.join(_KINDS)}")
    if not clip > 0:
        raise ValueError(f"the advantage clip must be positive, got {clip}; 5 is usual")
    if not 0 <= trim < 0.5:
        raise ValueError(f"the trim fraction must be in [0, 0.5), got {trim}; 0 trims nothing")
    used = _used_weights(weights)
    rewards = _stack(scores, list(used), group)
    valid = torch.isfinite(rewards).all(0)
    share = rewards.new_tensor(list(used.values())).double()
    batch = _Batch(
        rewards=torch.where(valid, rewards, 0).double(),
        share=share / share.sum(),
        valid=valid,
        group=group.to(rewards.device),
        prompts=int(group.max()) + 1,
        trim=trim,
    )
    advantages = _KINDS[kind](batch).clamp(-clip, clip)
    return torch.where(valid, advantages, math.nan).to(rewards.dtype)


class _Batch(NamedTuple):
    """R rewards of B samples, with those of failed samples set to 0.

    They are float64, so that sums of scores are exact enough for equal rewards to stay equal.
    """

    rewards: Tensor  # [R, B]
    share: Tensor  # [R], sums to 1
    valid: Tensor  # [B] bool
    group: Tensor  # [B]
    prompts: int
    trim: float

    def counted(self, values: Tensor) -> Tensor:
        """[R, B] bool: the valid samples whose values are not trimmed from their group."""
        counted = self.valid.repeat(len(values), 1)
        if not self.trim:
            return counted
        for prompt in range(self.prompts):
            rows = (self.valid & (self.group == prompt)).nonzero()[:, 0]
            cut = int(self.trim * len(rows))
            order = rows[values[:, rows].argsort(dim=1, stable=True)]
            extremes = torch.cat([order[:, :cut], order[:, len(rows) - cut :]], 1)
            counted.scatter_(1, extremes, False)
        return counted

    def group_sum(self, values: Tensor, counted: Tensor) -> Tensor:
        """[R, B] -> [R, B]: for each sample, the sum over its group's ``counted`` samples."""
        sums = values.new_zeros(values.shape[0], self.prompts)
        return sums.index_add(1, self.group, values * counted)[:, self.group]

    def group_size(self, counted: Tensor) -> Tensor:
        """[R, B]: for each sample, the number of its group's counted samples, at least 1."""
        return self.group_sum(counted.to(self.rewards.dtype), counted).clamp(min=1)

    def centred(self, values: Tensor) -> Tensor:
        """[R, B]: the values minus their group's mean; 0 for failed samples and equal groups."""
        counted = self.counted(values)
        size = self.group_size(counted)
        deviation = values - self.group_sum(values, counted) / size
        spread = (self.group_sum(deviation**2, counted) / size).sqrt()
        scale = (self.group_sum(values**2, counted) / size).sqrt()
        return torch.where(self.valid & (spread > _EQUAL * scale), deviation, 0)

    def deviations(self) -> Tensor:
        """[R, B]: reward minus its group's mean."""
        return self.centred(self.rewards)

    def z_scores(self, deviation: Tensor) -> Tensor:
        """[R, B] deviations divided by their group's standard deviation (ddof 1)."""
        counted = self.counted(deviation)
        freedom = (self.group_size(counted) - 1).clamp(min=1)
        return deviation / ((self.group_sum(deviation**2, counted) / freedom).sqrt() + _GROUP_EPS)

    def total_deviation(self) -> Tensor:
        """[1, B]: the weighted sum of rewards minus its group's mean.

        The deviations are summed, not the rewards, because the deviations of equal groups are
        already exactly 0. A sum of trimmed deviations is centred again, on its own trimmed mean.
        """
        total = (self.share @ self.deviations())[None]
        return self.centred(total) if self.trim else total


def _advantage_sum(batch: _Batch) -> Tensor:
    return batch.share @ batch.z_scores(batch.deviations())


def _reward_sum(batch: _Batch) -> Tensor:
    return batch.z_scores(batch.total_deviation())[0]


def _gdpo(batch: _Batch) -> Tensor:
    advantages = _advantage_sum(batch)
    # The batch mean is zero because every group's mean is: subtracting it would only add rounding.
    freedom = (batch.valid.sum() - 1).clamp(min=1)
    return advantages / ((advantages**2).sum().div(freedom).sqrt() + _GROUP_EPS)


def _global_std(batch: _Batch) -> Tensor:
    total = batch.share @ batch.rewards
    count = batch.valid.sum().clamp(min=1)
    centred = (total - total.sum() / count) * batch.valid
    std = ((centred**2).sum() / count).sqrt()
    return batch.total_deviation()[0] / (std + _GLOBAL_EPS)


_KINDS: dict[str, Callable[[_Batch], Tensor]] = {
    "advantage_sum": _advantage_sum,
    "reward_sum": _reward_sum,
    "gdpo": _gdpo,
    "global_std": _global_std,
}


def _used_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """The positive weights; ValueError if one is negative or not finite, or if none is left."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"reward {name!r} has weight {weight}; weights are finite and >= 0")
    used = {name: weight for name, weight in weights.items() if weight > 0}
    if not used:
        raise ValueError(
            f"no reward has a positive weight in {dict(weights)}; give at least one a positive "
            "weight"
        )
    return used


def _stack(scores: Mapping[str, Tensor], names: list[str], group: Tensor) -> Tensor:
    """Scores of ``names`` as [R, B], float32 (float64 if one is)."""
    for name in names:
        if name not in scores:
            raise ValueError(
                f"reward {name!r} has a positive weight but no scores; there are scores for "
                f"{', '.join(scores) or 'no reward'}"
            )
        if scores[name].shape != group.shape:
            raise ValueError(
                f"reward {name!r} has scores of shape {tuple(scores[name].shape)} for "
                f"{tuple(group.shape)} samples; give one score per sample"
            )
    stacked = torch.stack([scores[name] for name in names])
    return stacked if stacked.dtype == torch.float64 else stacked.float()
