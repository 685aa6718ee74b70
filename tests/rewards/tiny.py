"""Tiny random reward models in the real rewards' own file formats, and smooth test images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

COLOURS = ["red", "green", "blue", "yellow", "gray"]
WORDS = [*COLOURS, "a", "circle", "square", "triangle", "left", "right", "of", "above", "on"]
TEXTS = [
    "a red circle left of a blue square",
    "a green triangle",
    "a yellow square above a red circle on gray",
    "purple elephants",
    "a blue circle right of a green square on gray",
]
SIZE = 32


def images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """[count, 3, height, width] smooth, and exact multiples of 1/255 as a file would hold."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 7, 7, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return fine.clamp(0, 1).mul(255).round() / 255


def to_pil(image: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] -> PIL."""
    array = image.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(array))


def word_tokenizer(folder: Path) -> int:
    """A WordLevel tokenizer in Hugging Face's format; its end token has the largest id.

    Returns the size of the vocabulary.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<unk>", "<start>", *WORDS, "<end>"]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>",
        special_tokens=[(name, vocabulary[name]) for name in ("<start>", "<end>")],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
    ).save_pretrained(folder)
    return len(names)


def open_clip_config(vocabulary: int, **preprocess: Any) -> dict[str, Any]:
    return {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {
                "image_size": SIZE,
                "layers": 2,
                "width": 32,
                "head_width": 16,
                "patch_size": 8,
            },
            "text_cfg": {
                "context_length": 16,
                "vocab_size": vocabulary,
                "width": 32,
                "heads": 2,
                "layers": 2,
                "hf_tokenizer_name": "in this folder",
            },
        },
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], **preprocess},
    }


def open_clip_folder(folder: Path, seed: int = 0, **preprocess: Any) -> Path:
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = open_clip_config(word_tokenizer(folder), **preprocess)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(_contiguous(_shaken(model)), folder / "open_clip_model.safetensors")
    return folder


def pickscore_folder(folder: Path, seed: int = 0) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder.mkdir(parents=True)
    vocabulary = word_tokenizer(folder)
    shared = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {
        **shared,
        "vocab_size": vocabulary,
        "max_position_embeddings": 16,
        "eos_token_id": vocabulary - 1,
        "bos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {**shared, "image_size": SIZE, "patch_size": 8}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.load_state_dict(_shaken(model))
    model.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    ).save_pretrained(folder)
    return folder


VISION = {"image_size": SIZE, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}
HEADS = 4
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s", "purple", "elephant"]
MED = {
    "vocab_size": len(PIECES),
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 40,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "encoder_width": 7,  # wrong, as in the published file: the vision width counts
    "add_cross_attention": True,
}


def imagereward_folder(folder: Path, seed: int = 0) -> Path:
    from safetensors.torch import save_file

    from mixgrpo.rewards.imagereward import ImageRewardModel, VisionSize, to_imagereward_keys

    folder.mkdir(parents=True)
    (folder / "med_config.json").write_text(json.dumps(MED))
    (folder / "vision_config.json").write_text(json.dumps(VISION))
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    torch.manual_seed(seed)
    model = ImageRewardModel(VisionSize(**VISION), MED)
    state = to_imagereward_keys(_shaken(model))
    save_file(_contiguous(state), folder / "ImageReward.safetensors")
    return folder


def _shaken(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state dict with every parameter disturbed: zero biases would hide a key mixed up."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for key, value in state.items():
        if key != "logit_scale" and value.is_floating_point():
            value.add_(0.05 * torch.randn_like(value))
    return state


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.contiguous() for key, value in state.items()}
