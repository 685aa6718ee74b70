"""PickScore, a CLIP model fine-tuned on users' choices between two images (arXiv 2305.01569)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mixgrpo.files.weight_files import check_fits
from mixgrpo.rewards.images import center_crop, normalise, resize, resize_shortest
from mixgrpo.rewards.weights import (
    NotReadable,
    find_file,
    move_frozen,
    parse_dtype,
    read_heads,
    read_json,
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
        self.tokenizer, self.settings = _load_processor(source)
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
        from transformers import CLIPConfig, CLIPModel

        parse_dtype(dtype)
        folder = require_folder(model, "pickscore", "model")
        settings = find_file(folder, ("config.json",), "pickscore", "model")
        path = PickScore.weights_file(model=model)
        with torch.device("meta"):
            network = CLIPModel(CLIPConfig.from_dict(read_json(settings)))
        if path.name.startswith("pytorch_model") and path.suffix == ".json":
            raise NotReadable(f"{path} is an index of several PyTorch files")
        heads = {k: v for k, v in read_heads(path).items() if not k.endswith("position_ids")}
        check_fits(network.state_dict(), heads, path)
        _find_processor(require_folder(processor or folder, "pickscore", "processor"))
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
    from safetensors import SafetensorError
    from transformers import CLIPModel

    find_file(folder, ("config.json",), "pickscore", "model")
    find_file(folder, _WEIGHTS, "pickscore", "model")
    try:
        loaded: Any = CLIPModel.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are reported, and raise an error below
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"pickscore: the weights in {folder} cannot be read ({reason}); fetch them again"
        ) from error
    model, report = loaded
    _check_complete(folder, report)
    return model.eval().requires_grad_(False)


def _check_complete(folder: Path, report: dict[str, Any]) -> None:
    """Raises ValueError if keys do not match; transformers would draw missing weights at random."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # A mismatch is a tuple of the key and both shapes.
        keys = sorted(
            key if isinstance(key, str) else f"{key[0]} {list(key[1])} instead of {list(key[2])}"
            for key in report.get(kind) or ()
        )
        # Older files contain this buffer.
        keys = [key for key in keys if not key.endswith("position_ids")]
        if keys:
            raise ValueError(
                f"pickscore: the weights in {folder} do not fit its config.json, "
                f"{kind.replace('_', ' ')}: {', '.join(keys[:3])}"
            )


def _load_processor(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, CLIPImageProcessor

    _find_processor(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer, CLIPImageProcessor.from_pretrained(folder, local_files_only=True)


def _find_processor(folder: Path) -> None:
    for names in (_TOKENIZER_FILES, _PROCESSOR_FILES):
        find_file(folder, names, "pickscore", "processor")
