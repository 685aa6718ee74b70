"""The training loop that the small models share, and the moving average of their weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def fit(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    rate: float,
    name: str,
    *,
    decay: float,
    warmup: float = 0.05,
    average: bool = False,
) -> None:
    """Trains the model in place with AdamW, gradients clipped to norm 1; leaves it in eval mode.

    Args:
        loss: from the step, counted from 0, to the loss of a batch.
        rate: the highest learning rate, reached after the fraction ``warmup`` of all steps, from
            where a cosine leads to zero.
        name: of the model, for the log.
        decay: weight decay.
        average: whether the model ends with the moving average of its weights, with decay 0.999.
    """
    following = copy.deepcopy(model.train()) if average else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=warmup)
    for step in range(steps):
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if following is not None:
            _follow(following, model, min(0.999, (1 + step) / (10 + step)))
        if step % 100 == 0 or step == steps - 1:
            logger.info("%s step %d loss %.4f", name, step, value.item())
    if following is not None:
        model.load_state_dict(following.state_dict())
    model.eval()


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
