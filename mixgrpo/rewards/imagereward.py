"""ImageReward, a BLIP model trained on expert rankings (arXiv 2304.05977)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixgrpo.files.json_files import read_settings
from mixgrpo.files.weight_files import check_finite, check_fits
from mixgrpo.rewards.imagereward_model import (
    ImageRewardModel,
    VisionSize,
    from_imagereward_keys,
    to_imagereward_keys,
    used_keys,
)
from mixgrpo.rewards.images import (
    OPENAI_MEAN,
    OPENAI_STD,
    center_crop,
    normalise,
    resize_shortest,
)
from mixgrpo.rewards.weights import (
    find_file,
    move_frozen,
    parse_dtype,
    read_heads,
    read_state_dict,
    read_tokenizer,
    require_file,
    require_folder,
)

__all__ = ["ImageReward", "ImageRewardModel", "VisionSize", "to_imagereward_keys"]

# Mean and standard deviation of the raw score over the paper's training set.
SCORE_MEAN = 0.16717362830052426
SCORE_STD = 1.0333394966054072
MAX_TOKENS = 35

_WEIGHTS = ("ImageReward.safetensors", "ImageReward.pt")


class ImageReward:
    """The standardised score, with about zero mean and unit variance on the paper's images.

    Args:
        model: folder with ``med_config.json`` (BERT's configuration), optionally
            ``vision_config.json`` (the fields of ``VisionSize``; default: the published ViT-L/16
            at 224 pixels) and, unless given below, the weights and the tokenizer.
        checkpoint: ``ImageReward.pt`` or safetensors with the same names; default: the folder's
            ``ImageReward.safetensors`` or ``ImageReward.pt``.
        tokenizer: folder of ``bert-base-uncased`` (``vocab.txt`` or ``tokenizer.json``); default:
            the model's folder.
        dtype: dtype of the two transformers' weights; the head is always float32.
        device: where the model runs.
    """

    def __init__(
        self,
        *,
        model: str,
        checkpoint: str | None = None,
        tokenizer: str | None = None,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
    ) -> None:
        self.device, self.dtype = torch.device(device), parse_dtype(dtype)
        folder = require_folder(model, "imagereward", "model")
        self.vision = _vision_size(folder)
        med = find_file(folder, ("med_config.json",), "imagereward", "model")
        network = ImageRewardModel(self.vision, read_settings(med))
        _load_weights(network, self.weights_file(model=model, checkpoint=checkpoint))
        self.model = network.to(self.device, self.dtype).eval().requires_grad_(False)
        self.model.head.float()
        source = require_folder(tokenizer or folder, "imagereward", "tokenizer")
        self.tokenizer = _load_tokenizer(source, read_settings(med))

    @staticmethod
    def check_files(
        *,
        model: str,
        checkpoint: str | None = None,
        tokenizer: str | None = None,
        dtype: str = "float32",
    ) -> Path:
        """Compares the names and sizes in the weight file with the model's; returns its path.

        Neither is loaded. Raises the constructor's errors, and NotReadable.
        """
        parse_dtype(dtype)
        folder = require_folder(model, "imagereward", "model")
        med = find_file(folder, ("med_config.json",), "imagereward", "model")
        path = ImageReward.weights_file(model=model, checkpoint=checkpoint)
        with torch.device("meta"):
            network = ImageRewardModel(_vision_size(folder), read_settings(med))
        state = used_keys(read_heads(path))
        check_fits(to_imagereward_keys(network.state_dict()), state, path)
        source = require_folder(tokenizer or folder, "imagereward", "tokenizer")
        _load_tokenizer(source, read_settings(med))
        return path

    @staticmethod
    def weights_file(*, model: str, checkpoint: str | None = None, **others: Any) -> Path:
        """The weight file that these options name; raises the constructor's errors."""
        if checkpoint is not None:
            return require_file(checkpoint, "imagereward", "checkpoint")
        folder = require_folder(model, "imagereward", "model")
        return find_file(folder, _WEIGHTS, "imagereward", "checkpoint")

    @torch.no_grad()
    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1], B texts -> [B] float32."""
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(self.device)
        pixels = self.pixels(images).to(self.dtype)
        raw = self.model(pixels, tokens["input_ids"], tokens["attention_mask"])  # [B]
        return (raw - SCORE_MEAN) / SCORE_STD

    def to(self, device: torch.device) -> None:
        """Moves the model."""
        self.device = device
        move_frozen(self.model, device)

    def pixels(self, images: Tensor) -> Tensor:
        """Preprocessing: shorter edge resized (bicubic), centre cropped, normalised as for CLIP."""
        size = self.vision.image_size
        images = resize_shortest(images.to(self.device), size)
        return normalise(center_crop(images, size, size), OPENAI_MEAN, OPENAI_STD)


def _vision_size(folder: Path) -> VisionSize:
    path = folder / "vision_config.json"
    if not path.is_file():
        return VisionSize()
    values = read_settings(path)
    accepted = [field.name for field in fields(VisionSize)]
    unknown = sorted(set(values) - set(accepted))
    if unknown:
        raise ValueError(f"{path} has unknown keys {unknown}; it accepts {', '.join(accepted)}")
    return VisionSize(**values)


def _load_weights(network: ImageRewardModel, path: Path) -> None:
    state = used_keys(read_state_dict(path))
    # Compared under the published names, which are the ones in the user's file.
    check_fits(to_imagereward_keys(network.state_dict()), state, path)
    network.load_state_dict(from_imagereward_keys(state))
    check_finite(network, path)


def _load_tokenizer(folder: Path, text: dict[str, Any]) -> Any:
    from transformers import BertTokenizer

    # Without these files transformers silently creates an empty tokenizer.
    find_file(folder, ("tokenizer.json", "vocab.txt"), "imagereward", "tokenizer")
    return read_tokenizer(
        partial(BertTokenizer.from_pretrained, folder, local_files_only=True),
        folder,
        text["vocab_size"],
        "imagereward",
        "tokenizer",
    )
