"""PickScore, a CLIP model fine-tuned on users' choices between two images (arXiv 2305.01569)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mixgrpo.files.json_files import read_settings
from mixgrpo.files.weight_files import check_finite, check_fits
from mixgrpo.rewards.images import center_crop, normalise, resize, resize_shortest
from mixgrpo.rewards.weights import (
    check_pixels,
    find_file,
    move_frozen,
    parse_dtype,
    read_heads,
    read_state_dict,
    read_tokenizer,
    require_folder,
)

_WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class PickScore:
    """exp(logit_scale) * cosine: about 18 to 24 with the published weights.

    The returned value is (score - shift) / scale. MixGRPO's sum of raw rewards uses shift 18 and
    scale 8; if each reward is normalised within its group, they have no effect.

    Args:
        model: folder of a transformers CLIPModel (``yuvalkirstain/PickScore_v1``).
        processor: folder of its tokenizer and preprocessor
            (``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``); default: the model's folder.
        shift: subtracted from the score.
        scale: the shifted score is divided by it.
        dtype: dtype of the weights; the cosine is always float32.
        device: where the model runs.
    """

    def __init__(
        self,
        *,
        model: str,
        processor: str | None = None,
        shift: float = 0.0,
        scale: float = 1.0,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
    ) -> None:
        if scale == 0:
            raise ValueError("pickscore: scale divides the score and cannot be 0; set it to 1")
        self.shift, self.scale = shift, scale
        self.device, self.dtype = torch.device(device), parse_dtype(dtype)
        folder = require_folder(model, "pickscore", "model")
        network = _load_model(folder)
        # Computed before the cast: a bfloat16 logarithm would make the scale wrong by a percent.
        self.logit_scale = network.logit_scale.exp().item()
        self.model = network.to(self.device, self.dtype)
        source = require_folder(processor or folder, "pickscore", "processor")
        self.tokenizer, self.settings = _load_processor(source, self.model.config)
        _check_settings(self.pixels, source, self.model.config)
        self.max_length = self.model.config.text_config.max_position_embeddings

    @staticmethod
    def check_files(
        *,
        model: str,
        processor: str | None = None,
        shift: float = 0.0,
        scale: float = 1.0,
        dtype: str = "float32",
    ) -> Path:
        """Compares the names and sizes in the weight file with the model's; returns its path.

        Neither is loaded. Raises the constructor's errors, and NotReadable.
        """
        parse_dtype(dtype)
        folder = require_folder(model, "pickscore", "model")
        network = _empty(_configuration(folder))
        path = PickScore.weights_file(model=model)
        check_fits(network.state_dict(), _used_keys(read_heads(path)), path)
        source = require_folder(processor or folder, "pickscore", "processor")
        _load_processor(source, network.config)
        return path

    @staticmethod
    def weights_file(*, model: str, **others: Any) -> Path:
        """The weight file, or index of several, that these options name.

        Raises the constructor's errors.
        """
        folder = require_folder(model, "pickscore", "model")
        return find_file(folder, _WEIGHTS, "pickscore", "model")

    @torch.no_grad()
    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1], B texts -> [B] float32."""
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self.device)
        pixels = self.pixels(images).to(self.dtype)
        image = _features(self.model.get_image_features(pixel_values=pixels))  # [B, C]
        text = _features(
            self.model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
        )
        score = self.logit_scale * cosine_similarity(image, text)
        return (score - self.shift) / self.scale

    def to(self, device: torch.device) -> None:
        """Moves the model."""
        self.device = device
        move_frozen(self.model, device)

    def pixels(self, images: Tensor) -> Tensor:
        """The processor's preprocessing: shorter edge resized, centre cropped, normalised."""
        size, crop = dict(self.settings.size), dict(self.settings.crop_size)
        images = images.to(self.device)
        if "shortest_edge" in size:
            images = resize_shortest(images, size["shortest_edge"])
        else:
            images = resize(images, size["height"], size["width"])
        images = center_crop(images, crop["height"], crop["width"], math.floor)
        return normalise(images, self.settings.image_mean, self.settings.image_std)


def _features(output: Any) -> Tensor:
    """[B, C] float32; transformers >= 5 wraps the projected features in an output object."""
    return (output if isinstance(output, Tensor) else output.pooler_output).float()


def _load_model(folder: Path) -> Any:
    from transformers import CLIPModel

    config = _configuration(folder)
    path = PickScore.weights_file(model=str(folder))
    state = _used_keys(read_state_dict(path))
    # transformers would draw missing weights at random.
    check_fits(_empty(config).state_dict(), state, path)
    # Without a folder, transformers only creates the model and copies these weights into it.
    model: Any = CLIPModel.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32
    )
    check_finite(model, path)
    return model.eval().requires_grad_(False)


def _configuration(folder: Path) -> Any:
    from transformers import CLIPConfig

    return CLIPConfig.from_dict(
        read_settings(find_file(folder, ("config.json",), "pickscore", "model"))
    )


def _empty(config: Any) -> Any:
    from transformers import CLIPModel

    with torch.device("meta"):
        return CLIPModel(config)


def _used_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without a buffer that older files contain."""
    return {key: value for key, value in state.items() if not key.endswith("position_ids")}


def _load_processor(folder: Path, config: Any) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, CLIPImageProcessor

    find_file(folder, _TOKENIZER_FILES, "pickscore", "processor")
    settings = find_file(folder, _PROCESSOR_FILES, "pickscore", "processor")
    # Without trust_remote_code=False, transformers asks on the terminal whether to run code there.
    tokenizer = read_tokenizer(
        partial(
            AutoTokenizer.from_pretrained, folder, local_files_only=True, trust_remote_code=False
        ),
        folder,
        config.text_config.vocab_size,
        "pickscore",
        "processor",
    )
    read_settings(settings)
    return tokenizer, CLIPImageProcessor.from_pretrained(folder, local_files_only=True)


def _check_settings(pixels: Callable[[Tensor], Tensor], folder: Path, config: Any) -> None:
    side = config.vision_config.image_size
    path = find_file(folder, _PROCESSOR_FILES, "pickscore", "processor")
    check_pixels(pixels, (side, side), "pickscore", path)
