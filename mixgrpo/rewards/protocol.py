"""The interface of a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Reward(Protocol):
    """Scores images: the higher the score, the better the image matches its text."""

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] float in [0, 1] on any device, B texts -> [B] float32.

        The score of a sample that could not be scored is NaN, never 0, so that the sample is
        excluded from the statistics of its group.
        """
        ...
