"""HPS-v2.1, the Human Preference Score (arXiv 2306.09341)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixgrpo.rewards.images import normalise, resize_longest_and_pad
from mixgrpo.rewards.open_clip_models import load_open_clip


class HPSv2:
    """Cosine of CLIP features fine-tuned on human choices; good images score 0.25 to 0.35.

    Args:
        model: open_clip architecture, or a folder (see ``open_clip_models``).
        checkpoint: ``HPS_v2.1_compressed.pt``, needed with an architecture.
        tokenizer: folder of a Hugging Face tokenizer; default: the model's own.
        dtype: of the weights; the cosine is float32 always.
        device: where the model runs.
    """

    def __init__(
        self,
        *,
        model: str = "ViT-H-14",
        checkpoint: str | None = None,
        tokenizer: str | None = None,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
    ) -> None:
        self.clip = load_open_clip(
            "hpsv2",
            model=model,
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            dtype=dtype,
            device=torch.device(device),
        )

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1], B texts -> [B] float32 in [-1, 1]."""
        return self.clip.cosine(self.pixels(images), texts)

    def pixels(self, images: Tensor) -> Tensor:
        """HPSv2's preprocessing: the longer edge resized, the rest padded with black.

        open_clip's own resizes the shorter edge and crops instead; square images are the same.
        """
        settings = self.clip.preprocess
        images = resize_longest_and_pad(images.to(self.clip.device), settings["size"][0])
        return normalise(images, settings["mean"], settings["std"])
