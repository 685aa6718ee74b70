"""CLIP score: image-text alignment as the cosine similarity of a CLIP model (arXiv 2104.08718).

Publications report it with ``apple/DFN5B-CLIP-ViT-H-14-384`` (arXiv 2309.17425).
"""

from __future__ import annotations

from torch import Tensor

from mixgrpo.rewards.images import (
    center_crop,
    normalise,
    resize,
    resize_longest_and_pad,
    resize_shortest,
)
from mixgrpo.rewards.open_clip_models import CosineReward


class ClipScore(CosineReward):
    """The plain cosine in [-1, 1], neither clipped at 0 nor multiplied by 100.

    Images that match their text well score about 0.4. The checkpoint of the model above is
    ``open_clip_pytorch_model.bin``.
    """

    kind = "clip_score"
    architecture = "ViT-H-14-378-quickgelu"

    def pixels(self, images: Tensor) -> Tensor:
        """open_clip's evaluation preprocessing, according to the model's settings."""
        settings = self.clip.preprocess
        height, width = settings["size"]
        filter_name = settings["interpolation"]
        if settings["resize_mode"] == "squash":
            images = resize(images, height, width, filter_name)
        elif settings["resize_mode"] == "longest":
            fill = settings["fill_color"] / 255
            images = resize_longest_and_pad(images, height, filter_name, fill)
        else:
            images = center_crop(resize_shortest(images, height, filter_name), height, width)
        return normalise(images, settings["mean"], settings["std"])

    def check_preprocess(self) -> None:
        settings = self.clip.preprocess
        height, width = settings["size"]
        if settings["resize_mode"] not in ("shortest", "longest", "squash"):
            raise ValueError(
                f"clip_score: resize_mode must be shortest, longest or squash, got "
                f"{settings['resize_mode']!r}: correct preprocess_cfg in open_clip_config.json"
            )
        if settings["interpolation"] not in ("bicubic", "bilinear"):
            raise ValueError(
                f"clip_score: interpolation must be bicubic or bilinear, got "
                f"{settings['interpolation']!r}: correct preprocess_cfg in open_clip_config.json"
            )
        if height != width and settings["resize_mode"] != "squash":
            raise ValueError(
                f"clip_score: an input size of {height}x{width} requires resize_mode squash, got "
                f"{settings['resize_mode']!r}: correct preprocess_cfg in open_clip_config.json"
            )
