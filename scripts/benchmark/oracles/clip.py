"""HPS-v2.1, CLIP score and PickScore by open_clip and transformers, from PIL images to scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

Images = Sequence[Image.Image]


def hpsv2(
    images: Images, texts: Sequence[str], *, model: str | Path, checkpoint: str | Path | None = None
) -> Tensor:
    """The longer edge to the model's size, centred on black, by PIL; open_clip's own model."""
    name, module = _load(model, checkpoint)
    settings = module.visual.preprocess_cfg
    size = settings["size"] if isinstance(settings["size"], int) else settings["size"][0]
    to_pixels = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(settings["mean"], settings["std"])]
    )
    pixels = torch.stack([to_pixels(on_black(image, size)) for image in images])
    return _cosines(name, module, pixels, texts)


def on_black(image: Image.Image, size: int) -> Image.Image:
    """The image as large as fits a black square, in its middle."""
    scale = size / max(image.size)
    small = image.resize([round(e * scale) for e in image.size], Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size, size))
    square.paste(small, tuple((size - edge) // 2 for edge in small.size))
    return square


def clip_score(
    images: Images, texts: Sequence[str], *, model: str | Path, checkpoint: str | Path | None = None
) -> Tensor:
    """open_clip's own model and preprocessing."""
    name, module = _load(model, checkpoint)
    settings = dict(module.visual.preprocess_cfg)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if len(tags) == 1:  # for weights in a file open_clip does not look how they were trained
        published = open_clip.get_pretrained_cfg(name, tags[0])
        settings |= {key: published[key] for key in settings if key in published}
    preprocess = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**settings), is_train=False
    )
    pixels = torch.stack([preprocess(image) for image in images])
    return _cosines(name, module, pixels, texts)


def _load(model: str | Path, checkpoint: str | Path | None) -> tuple[str, nn.Module]:
    """open_clip's name of an architecture or a folder, and its module with the weights."""
    name = f"local-dir:{model}" if Path(model).is_dir() else str(model)
    weights = None if checkpoint is None else str(checkpoint)
    return name, open_clip.create_model(name, pretrained=weights, pretrained_text=False).eval()


@torch.no_grad()
def _cosines(name: str, module: nn.Module, pixels: Tensor, texts: Sequence[str]) -> Tensor:
    """One image at a time: a batch is ours to get right, and large models need the memory."""
    tokens = open_clip.get_tokenizer(name)(list(texts))
    scores = []
    for image, text in zip(pixels.split(1), tokens.split(1), strict=True):
        features = module.encode_image(image, normalize=True)
        scores.append((features @ module.encode_text(text, normalize=True).T)[0, 0])
    return torch.stack(scores)


@torch.no_grad()
def pickscore(
    images: Images, texts: Sequence[str], *, model: str | Path, processor: str | Path | None = None
) -> Tensor:
    """transformers' processor and ``CLIPModel.forward``, whose logits are the score."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor

    source = processor or model
    prepare = CLIPProcessor(
        CLIPImageProcessor.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    )
    module = CLIPModel.from_pretrained(model, dtype=torch.float32).eval()
    scores = []
    for image, text in zip(images, texts, strict=True):
        inputs = prepare(
            text=[text],
            images=[image],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=module.config.text_config.max_position_embeddings,
        )
        inputs.pop("token_type_ids", None)
        scores.append(module(**inputs).logits_per_image[0, 0])
    return torch.stack(scores)
