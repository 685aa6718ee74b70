"""Image preprocessing for the rewards, on batched tensors on any device.

All functions except ``normalise`` take [B, 3, H, W] float images in [0, 1]. ``to_uint8`` serves the
rewards that need files or arrays. Resizing is antialiased and clipped as in the published PIL
pipelines, except for their rounding to 8 bits: pixels differ by 0.3/255 on average and by at most
1.1/255 (tests/rewards/test_images.py).
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
    # Bicubic filters overshoot at edges, which 8-bit images cannot represent, so PIL clips after
    # each of its two passes. Before Pillow 13, which no published score has used, the horizontal
    # pass always comes first; Pillow 13 swaps the passes if the height shrinks much more than the
    # width.
    for size in ([images.shape[-2], width], [height, width]):
        if list(images.shape[-2:]) != size:
            images = F.resize(images, size, mode, antialias=True).clamp(0, 1)
    return images


def resize_shortest(images: Tensor, size: int, interpolation: str = "bicubic") -> Tensor:
    """Resizes the shorter edge to ``size`` and the longer one in proportion, rounded down."""
    height, width = images.shape[-2:]
    short = min(height, width)
    return resize(images, size * height // short, size * width // short, interpolation)


def resize_longest_and_pad(
    images: Tensor, size: int, interpolation: str = "bicubic", fill: float = 0.0
) -> Tensor:
    """Resizes the longer edge to ``size`` and centres the image on a square of colour ``fill``."""
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
    """Crops the central [B, 3, height, width]; images must be at least as large.

    ``rounding`` is applied to half the margin, if that is odd: torchvision and open_clip use
    ``round`` (to even), transformers' processors ``math.floor``.
    """
    top = rounding((images.shape[-2] - height) / 2)
    left = rounding((images.shape[-1] - width) / 2)
    return images[..., top : top + height, left : left + width]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std, per channel."""
    return F.normalize(images, list(mean), list(std))


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """[B, 3, H, W] -> [B, H, W, 3], RGB from 0 to 255, on the CPU; NaN becomes 0."""
    pixels = images.float().nan_to_num(0.0).mul(255).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
