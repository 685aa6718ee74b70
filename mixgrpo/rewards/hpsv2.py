"""HPS-v2.1, the Human Preference Score (arXiv 2306.09341)."""

from __future__ import annotations

from torch import Tensor

from mixgrpo.rewards.images import normalise, resize_longest_and_pad
from mixgrpo.rewards.open_clip_models import CosineReward


class HPSv2(CosineReward):
    """Cosine of a CLIP fine-tuned on human preferences; good images score 0.25 to 0.35.

    The published checkpoint is ``HPS_v2.1_compressed.pt``.
    """

    kind = "hpsv2"
    architecture = "ViT-H-14"

    def pixels(self, images: Tensor) -> Tensor:
        """HPSv2's preprocessing: the longer edge is resized and the rest is padded with black.

        open_clip's own preprocessing resizes the shorter edge and crops instead; the results are
        the same for square images.
        """
        settings = self.clip.preprocess
        images = resize_longest_and_pad(images, settings["size"][0])
        return normalise(images, settings["mean"], settings["std"])
