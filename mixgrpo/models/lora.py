"""LoRA adapters as they are read from a file or a checkpoint, before they meet a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class Adapter:
    """The change ``scale * up @ down`` of one layer's weight.

    Attributes:
        down: [rank, in], float32; ``lora_A`` or ``lora_down`` in files.
        up: [out, rank], float32; ``lora_B`` or ``lora_up`` in files.
        scale: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA.
    """

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class Lora:
    """The adapters of a model's layers.

    Attributes:
        adapters: by the name that the file gives to the layer.
        path: the file or the checkpoint, for messages.
        notes: what a user should know about the reading, a sentence each.
    """

    adapters: Mapping[str, Adapter]
    path: Path
    notes: tuple[str, ...] = ()


def fold(up: Tensor, scale: float) -> Tensor:
    """``scale * up``, so that a reader that knows of no scale applies the adapter in full strength.

    For a scale that is a power of two, this is exact. Otherwise, the result is float32 and each
    element is rounded once, by a factor of at most 1 +- 2^-24.
    """
    is_exact = math.frexp(abs(scale))[0] == 0.5
    return up * scale if is_exact else (up.double() * scale).float()
