"""The four published rewards at their published sizes and file formats, with seeded random weights.

Each function fills an empty folder and returns the options with which the reward is built from it.
The weights are drawn on ``device``, which gives other numbers on a GPU, in a fraction of the time.
"""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from torch import nn

Options = dict[str, str]

# BERT's configuration beside ImageReward.pt, and the words of a small vocabulary: the published one
# has 30,522 entries, as many as the embedding has rows but for two tokens of BLIP's own.
MED_CONFIG = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "encoder_width": 768,
    "add_cross_attention": True,
}
WORDS = "a red green blue yellow circle square triangle cross left right of above below on"
PICKSCORE_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
PICKSCORE_VISION = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
}


def hpsv2(folder: Path, seed: int, device: str = "cpu") -> Options:
    """``HPS_v2.1_compressed.pt``: open_clip's ViT-H-14 in half precision, under ``state_dict``."""
    path = folder / "HPS_v2.1_compressed.pt"
    state = _open_clip("ViT-H-14", seed, device).state_dict()
    torch.save({"epoch": 1, "state_dict": state}, path)
    return {"model": "ViT-H-14", "checkpoint": str(path)}


def clip_score(folder: Path, seed: int, device: str = "cpu") -> Options:
    """``open_clip_pytorch_model.bin`` of DFN5B-CLIP-ViT-H-14-384, whose images are 378 pixels."""
    path = folder / "open_clip_pytorch_model.bin"
    torch.save(_open_clip("ViT-H-14-378-quickgelu", seed, device).state_dict(), path)
    return {"model": "ViT-H-14-378-quickgelu", "checkpoint": str(path)}


def _open_clip(architecture: str, seed: int, device: str) -> nn.Module:
    torch.manual_seed(seed)
    with torch.device(device):
        model = open_clip.create_model(architecture, load_weights=False, device=device)
        return shaken(model).half().cpu()


def pickscore(folder: Path, seed: int, device: str = "cpu") -> Options:
    """A folder of transformers' CLIPModel with the sizes of PickScore_v1."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(seed)
    config = CLIPConfig(
        text_config=PICKSCORE_TEXT, vision_config=PICKSCORE_VISION, projection_dim=1024
    )
    with torch.device(device):
        model = shaken(CLIPModel(config)).half().cpu()
    model.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    clip_tokenizer(folder)
    return {"model": str(folder)}


def clip_tokenizer(folder: Path) -> None:
    """CLIP's own tokenizer, which open_clip carries, as transformers' files."""
    own = open_clip.tokenizer.SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(token, token): index for token, index in own.encoder.items()}
    merges = [" ".join(pair) for pair in sorted(own.bpe_ranks, key=own.bpe_ranks.__getitem__)]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 77,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def imagereward(folder: Path, seed: int, device: str = "cpu") -> Options:
    """``ImageReward.pt`` with the configuration of its BERT and a vocabulary."""
    from mixgrpo.rewards.imagereward import ImageRewardModel, VisionSize, to_imagereward_keys

    imagereward_files(folder)
    torch.manual_seed(seed)
    with torch.device(device):
        model = shaken(ImageRewardModel(VisionSize(), MED_CONFIG)).cpu()
    torch.save(to_imagereward_keys(model.state_dict()), folder / "ImageReward.pt")
    return {"model": str(folder)}


def imagereward_files(folder: Path) -> None:
    """All but the weights."""
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG, indent=1))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    """With weights under which every part counts.

    Fresh biases are zero and would hide a key mixed up; fresh matrices are so small that all
    pictures are scored alike, and any two implementations agree.
    """
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.05 * torch.randn_like(parameter))
        elif parameter.ndim == 3:  # tokens and places
            parameter.normal_(std=0.5)
        elif parameter.ndim:  # the scale of a cosine stays
            inputs = parameter[0].numel()
            parameter.normal_(std=0.8 * inputs**-0.5)
    return model
