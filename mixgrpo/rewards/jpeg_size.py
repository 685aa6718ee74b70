"""JPEG compressibility, a reward that needs no model (DDPO, arXiv 2305.13301)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixgrpo.rewards.images import to_uint8


class JpegSize:
    """The negative size of the image as a JPEG file, in kB (1000 bytes); the text is ignored.

    Args:
        compressible: True rewards small files; False flips the sign and rewards large ones.
        quality: JPEG quality, 1 to 95.
    """

    def __init__(self, *, compressible: bool = True, quality: int = 95) -> None:
        if not 1 <= quality <= 95:
            raise ValueError(f"jpeg_size: quality must be in 1..95, got {quality}")
        self.sign = -1.0 if compressible else 1.0
        self.quality = quality

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1], B texts -> [B] float32."""
        sizes = [self.sign * self._bytes(array) / 1000 for array in to_uint8(images)]
        return torch.tensor(sizes, dtype=torch.float32, device=images.device)

    def _bytes(self, array: Any) -> int:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell()
