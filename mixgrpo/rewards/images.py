"""The rewards' image preprocessing, on batched tensors wherever they live.

All functions take [B, 3, H, W] float images in [0, 1] (``normalise`` aside). ``to_uint8`` is for
the rewards that look at files or arrays. Resizing is
antialiased and clipped as in the published PIL pipelines, but for their rounding to 8 bits:
pixels differ by 0.3/255 on average and 1.1/255 at most (tests/rewards/test_images.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

# Mean and standard deviation of each channel, as published with OpenAI's CLIP.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

_INTERPOLATION = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


def resize(images: Tensor, height: int, width: int, interpolation: str = "bicubic") -> Tensor:
    """[B, 3, H, W] -> [B, 3, height, width] float32, aspect ratio ignored."""
    images, mode = images.float().clamp(0, 1), _INTERPOLATION[interpolation]
    # Bicubic filters overshoot at edges and 8-bit images cannot, so PIL clips after each of its
    # two passes: along the rows first, always so before Pillow 13, with which no published score
    # was made. Pillow 13 turns the passes round where the height shrinks much more than the width.
    for size in ([images.shape[-2], width], [height, width]):
        if list(images.shape[-2:]) != size:
            images = F.resize(images, size, mode, antialias=True).clamp(0, 1)
    return images


def resize_shortest(images: Tensor, size: int, interpolation: str = "bicubic") -> Tensor:
    """The shorter edge becomes ``size``, the longer one follows, rounded down."""
    height, width = images.shape[-2:]
    short = min(height, width)
    return resize(images, size * height // short, size * width // short, interpolation)


def resize_longest_and_pad(
    images: Tensor, size: int, interpolation: str = "bicubic", fill: float = 0.0
) -> Tensor:
    """The longer edge becomes ``size``; the shorter one is centred on a square filled with fill."""
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    new_height, new_width = (max(1, round(edge * scale)) for edge in (height, width))
    images = resize(images, new_height, new_width, interpolation)
    rest_h, rest_w = size - new_height, size - new_width
    edges = (rest_w // 2, rest_w - rest_w // 2, rest_h // 2, rest_h - rest_h // 2)
    return torch.nn.functional.pad(images, edges, value=fill)


def center_crop(
    images: Tensor, height: int, width: int, rounding: Callable[[float], int] = round
) -> Tensor:
    """The central [B, 3, height, width]; images must be at least as large.

    ``rounding`` of an odd margin's half: torchvision and open_clip ``round`` it (to even),
    transformers' processors take the ``math.floor``.
    """
    top = rounding((images.shape[-2] - height) / 2)
    left = rounding((images.shape[-1] - width) / 2)
    return images[..., top : top + height, left : left + width]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std, per channel."""
    return F.normalize(images, list(mean), list(std))


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """[B, H, W, 3], RGB from 0 to 255, on the CPU; a pixel that is no number becomes 0."""
    pixels = images.float().nan_to_num(0.0).mul(255).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
