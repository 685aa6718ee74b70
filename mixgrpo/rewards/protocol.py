"""What the rest of the package knows of a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Reward(Protocol):
    """A judge of images: the higher the score, the better the image answers its text."""

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] float in [0, 1] on any device, B texts -> [B] float32.

        A sample that could not be scored is NaN, never 0: it must leave its group's statistics.
        """
        ...
