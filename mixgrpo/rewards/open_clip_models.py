"""Loading of open_clip models, and the base class of the rewards that use their cosine similarity.

``model`` is either an architecture in open_clip's list, with its weights in ``checkpoint``, or a
folder that holds ``open_clip_config.json`` (with ``model_cfg`` and ``preprocess_cfg``, as open_clip
writes it), the weights and, if ``text_cfg`` has an ``hf_tokenizer_name``, the files of that
tokenizer.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixgrpo.files.json_files import read_settings
from mixgrpo.files.named_paths import find_path
from mixgrpo.files.weight_files import check_fits
from mixgrpo.rewards.weights import (
    check_pixels,
    find_file,
    load_exactly,
    move_frozen,
    parse_dtype,
    read_heads,
    read_state_dict,
    read_tokenizer,
    require_file,
    require_folder,
)

_CONFIG = "open_clip_config.json"
# In open_clip's own order of preference.
_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
)


@dataclass(frozen=True)
class OpenClip:
    """A loaded model, frozen and in evaluation mode.

    Attributes:
        model: open_clip's module.
        tokenize: texts -> token ids [B, L], padded and truncated to the model's context length.
        preprocess: open_clip's settings: size (height, width), mean, std, interpolation,
            resize_mode, fill_color.
        device: where the model is.
        dtype: dtype of its weights.
    """

    model: nn.Module
    tokenize: Callable[[list[str]], Tensor]
    preprocess: dict[str, Any]
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def cosine(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """Normalised pixels [B, 3, S, S], B texts -> [B] float32, cosine of their features."""
        model: Any = self.model
        tokens = self.tokenize(list(texts)).to(self.device)
        text = model.encode_text(tokens).float()  # [B, C]
        return nn.functional.cosine_similarity(self.image_features(pixels), text)

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> [B, C] float32."""
        model: Any = self.model
        return model.encode_image(pixels.to(self.dtype)).float()


class CosineReward:
    """A reward that is the cosine of image and text features; subclasses define the preprocessing.

    Attributes:
        kind: the reward's name in messages.
        architecture: the architecture of the published weights, used if ``model`` is not given.
    """

    kind: str
    architecture: str

    def __init__(
        self,
        *,
        model: str | None = None,
        checkpoint: str | None = None,
        tokenizer: str | None = None,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            model: open_clip architecture, or a folder (see this module).
            checkpoint: the weight file; required with an architecture.
            tokenizer: folder of a Hugging Face tokenizer; default: the model's own.
            dtype: dtype of the weights; the cosine is always float32.
            device: where the model runs.
        """
        self.clip = load_open_clip(
            self.kind,
            model=model or self.architecture,
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            dtype=dtype,
            device=torch.device(device),
        )
        self.check_preprocess()
        folder = _folder(self.kind, model or self.architecture)
        if folder is not None:
            height, width = self.clip.preprocess["size"]
            check_pixels(self.pixels, (height, width), self.kind, folder / _CONFIG)

    @classmethod
    def check_files(
        cls,
        *,
        model: str | None = None,
        checkpoint: str | None = None,
        tokenizer: str | None = None,
        dtype: str = "float32",
    ) -> Path:
        """Compares the names and sizes in the weight file with the model's; returns its path.

        Neither is loaded. Raises the constructor's errors, and NotReadable.
        """
        parse_dtype(dtype)
        path = cls.weights_file(model=model, checkpoint=checkpoint)
        name = model or cls.architecture
        folder = _folder(cls.kind, name)
        with torch.device("meta"):
            module = _create(f"local-dir:{folder}" if folder else name, folder, "meta")
        check_fits(module.state_dict(), read_heads(path), path)
        _tokenizer(cls.kind, f"local-dir:{folder}" if folder else name, folder, tokenizer)
        return path

    @classmethod
    def weights_file(
        cls, *, model: str | None = None, checkpoint: str | None = None, **others: Any
    ) -> Path:
        """The weight file that these options name; raises the constructor's errors."""
        name = model or cls.architecture
        return _checkpoint(cls.kind, _folder(cls.kind, name), name, checkpoint)

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1], B texts -> [B] float32 in [-1, 1]."""
        return self.clip.cosine(self.pixels(images.to(self.clip.device)), texts)

    def image_features(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B, C] float32 image features, not normalised."""
        return self.clip.image_features(self.pixels(images.to(self.clip.device)))

    def to(self, device: torch.device) -> None:
        """Moves the model."""
        move_frozen(self.clip.model, device)
        self.clip = replace(self.clip, device=device)

    def pixels(self, images: Tensor) -> Tensor:
        """Preprocessing: images [B, 3, H, W] in [0, 1] -> the model's input [B, 3, S, S]."""
        raise NotImplementedError

    def check_preprocess(self) -> None:
        """Raises ValueError for model settings that ``pixels`` does not support."""


def load_open_clip(
    reward: str,
    *,
    model: str,
    checkpoint: str | None,
    tokenizer: str | None,
    dtype: str,
    device: torch.device,
) -> OpenClip:
    """Loads the model that a reward's options name; the checkpoint must fit it exactly.

    Raises:
        FileNotFoundError: if the folder, checkpoint or tokenizer is missing.
        ValueError: if the architecture is unknown or the checkpoint does not fit.
    """

    precision = parse_dtype(dtype)
    folder = _folder(reward, model)
    path = _checkpoint(reward, folder, model, checkpoint)
    name = f"local-dir:{folder}" if folder else model
    module = _create(name, folder)
    load_exactly(module, read_state_dict(path), path)
    module = module.to(device, precision).eval().requires_grad_(False)
    tokenize = _tokenizer(reward, name, folder, tokenizer)
    return OpenClip(module, tokenize, _preprocess(module, folder, model), device, precision)


def _folder(reward: str, model: str) -> Path | None:
    """The folder that ``model`` names, or None if it names an architecture of open_clip."""
    import open_clip

    known = open_clip.list_models()
    if model in known:
        return None
    found = find_path(model)
    if os.sep in model or (found and found.is_dir()):
        folder = require_folder(model, reward, "model")
        find_file(folder, (_CONFIG,), reward, "model")
        return folder
    nearest = difflib.get_close_matches(model, known, n=3)
    hint = f" (nearest: {', '.join(nearest)})" if nearest else ""
    raise ValueError(
        f"{reward}: {model!r} is neither an architecture of open_clip{hint} nor an existing "
        "folder; set the reward's `model` to one of these"
    )


def _checkpoint(reward: str, folder: Path | None, model: str, checkpoint: str | None) -> Path:
    if checkpoint is not None:
        return require_file(checkpoint, reward, "checkpoint")
    if folder is not None:
        return find_file(folder, _WEIGHTS, reward, "checkpoint")
    raise FileNotFoundError(
        f"{reward}: the architecture {model!r} comes without weights; set the reward's "
        "`checkpoint` to the path of the weight file"
    )


def _create(name: str, folder: Path | None, device: str = "cpu") -> nn.Module:
    """Creates the model with random weights; ``pretrained_text=False`` prevents downloads."""
    import open_clip

    if folder is not None and "model_cfg" not in read_settings(folder / _CONFIG):
        raise ValueError(
            f"{folder / _CONFIG} lacks `model_cfg`; it must have the format that open_clip writes"
        )
    with _quiet():
        return open_clip.create_model(
            name, device=device, load_weights=False, pretrained_text=False
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses open_clip's warning about random weights, which are loaded right afterwards."""

    def weights_come_later(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    # open_clip logs to the root logger; a filter there leaves every other logger alone.
    root = logging.getLogger()
    root.addFilter(weights_come_later)
    try:
        yield
    finally:
        root.removeFilter(weights_come_later)


def _preprocess(module: Any, folder: Path | None, model: str) -> dict[str, Any]:
    """The preprocessing settings of the folder, or of an architecture's published weights.

    open_clip stores the latter with the tags of the weights. Where the tags of an architecture
    disagree, open_clip's defaults are used, which are OpenAI's.
    """
    import open_clip

    settings = dict(module.visual.preprocess_cfg)
    if folder is None:
        tags = open_clip.list_pretrained_tags_by_model(model)
        published = [open_clip.get_pretrained_cfg(model, tag) for tag in tags]
        for key in ("mean", "std", "interpolation", "resize_mode"):
            values = [cfg[key] for cfg in published if key in cfg]
            if values and all(value == values[0] for value in values):
                settings[key] = values[0]
    size = settings["size"]
    settings["size"] = (size, size) if isinstance(size, int) else tuple(size)
    return settings


def _tokenizer(reward: str, name: str, folder: Path | None, given: str | None) -> Any:
    """The tokenizer in the folder ``given``, or else the model's own.

    A folder whose configuration names no tokenizer would get CLIP's, and fail far from the cause.
    """
    import open_clip

    text = open_clip.get_model_config(name)["text_cfg"]
    rows, context = text.get("vocab_size", 49408), text.get("context_length", 77)
    source = folder if given is None else require_folder(given, reward, "tokenizer")
    if source is not None and (given is not None or "hf_tokenizer_name" in text):
        load = partial(open_clip.get_tokenizer, name)
        if given is not None:
            load = partial(open_clip.tokenizer.HFTokenizer, str(source), context_length=context)
        return read_tokenizer(load, source, rows, reward, "tokenizer")
    tokenize = open_clip.get_tokenizer(name)
    words = len(tokenize.tokenizer) if hasattr(tokenize, "tokenizer") else tokenize.vocab_size
    if words > rows:
        raise ValueError(
            f"{reward}: the tokenizer has {words} tokens, but the model's embedding has {rows}; "
            f"set `hf_tokenizer_name` in text_cfg of {_CONFIG}, or set the reward's `tokenizer`"
        )
    return tokenize
