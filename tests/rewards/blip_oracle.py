"""ImageReward written out in plain PyTorch, from PIL images and its published key names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear
from torchvision import transforms

from mixgrpo.rewards.images import OPENAI_MEAN, OPENAI_STD


def imagereward_by_hand(
    images: Sequence[Image.Image], texts: Sequence[str], *, model: Path
) -> Tensor:
    """torchvision's transforms on PIL, WordPiece by hand, a plain forward pass."""
    sizes = json.loads((model / "vision_config.json").read_text())
    preprocess = transforms.Compose(
        [
            transforms.Resize(sizes["image_size"], transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(sizes["image_size"]),
            transforms.ToTensor(),
            transforms.Normalize(OPENAI_MEAN, OPENAI_STD),
        ]
    )
    pixels = torch.stack([preprocess(image) for image in images])
    pieces = (model / "vocab.txt").read_text().split("\n")
    ids = torch.tensor([word_pieces(text, pieces) for text in texts])
    heads = json.loads((model / "med_config.json").read_text())["num_attention_heads"]
    stored = load_file(model / "ImageReward.safetensors")
    state = {key: value.float() for key, value in stored.items()}
    raw = Blip(state, sizes["heads"], heads)(pixels, ids, (ids != 0).long())
    return (raw - 0.16717362830052426) / 1.0333394966054072


def word_pieces(text: str, vocabulary: Sequence[str]) -> list[int]:
    """[CLS] words [SEP] and padding to 35; a plural is its word and ##s."""
    index = {piece: position for position, piece in enumerate(vocabulary)}
    ids = []
    for word in text.lower().split():
        pieces = [word] if word in index else [word.removesuffix("s"), "##s"]
        known = all(piece in index for piece in pieces)
        ids += [index[piece] for piece in (pieces if known else ["[UNK]"])]
    ids = [index["[CLS]"], *ids[:33], index["[SEP]"]]
    return ids + [0] * (35 - len(ids))


class Blip:
    """The raw score from a state dict with the names of ``ImageReward.pt``."""

    def __init__(self, state: Mapping[str, Tensor], vision_heads: int, text_heads: int) -> None:
        self.state = state
        self.vision_heads, self.text_heads = vision_heads, text_heads

    def __call__(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        state = self.text(ids, mask, self.image(pixels))[:, 0]
        for index in (0, 2, 4, 6, 7):
            state = self.linear(f"mlp.layers.{index}", state)
        return state[:, 0]

    def image(self, pixels: Tensor) -> Tensor:
        name = "blip.visual_encoder"
        kernel = self.state[f"{name}.patch_embed.proj.weight"]
        bias = self.state[f"{name}.patch_embed.proj.bias"]
        x = conv2d(pixels, kernel, bias, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
        x = torch.cat([self.state[f"{name}.cls_token"].expand(len(x), -1, -1), x], 1)
        x = x + self.state[f"{name}.pos_embed"]
        for index in range(self.count(f"{name}.blocks")):
            block = f"{name}.blocks.{index}"
            q, k, v = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(
                3, -1
            )
            x = x + self.linear(f"{block}.attn.proj", attend(q, k, v, self.vision_heads))
            hidden = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))
            x = x + self.linear(f"{block}.mlp.fc2", gelu(hidden))
        return self.norm(f"{name}.norm", x, 1e-6)

    def text(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        name = "blip.text_encoder"
        x = self.state[f"{name}.embeddings.word_embeddings.weight"][ids]
        x = x + self.state[f"{name}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(f"{name}.embeddings.LayerNorm", x, 1e-12)
        for index in range(self.count(f"{name}.encoder.layer")):
            layer = f"{name}.encoder.layer.{index}"
            x = self.residual_attention(f"{layer}.attention", x, x, mask)
            x = self.residual_attention(f"{layer}.crossattention", x, image, None)
            hidden = gelu(self.linear(f"{layer}.intermediate.dense", x))
            x = x + self.linear(f"{layer}.output.dense", hidden)
            x = self.norm(f"{layer}.output.LayerNorm", x, 1e-12)
        return x

    def residual_attention(self, name: str, x: Tensor, to: Tensor, mask: Tensor | None) -> Tensor:
        q = self.linear(f"{name}.self.query", x)
        k, v = self.linear(f"{name}.self.key", to), self.linear(f"{name}.self.value", to)
        out = self.linear(f"{name}.output.dense", attend(q, k, v, self.text_heads, mask))
        return self.norm(f"{name}.output.LayerNorm", out + x, 1e-12)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return layer_norm(x, weight.shape, weight, bias, eps)

    def count(self, prefix: str) -> int:
        found = {key[len(prefix) + 1 :].split(".")[0] for key in self.state if prefix in key}
        return len(found)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention; q [B, L, C], k and v [B, M, C], mask [B, M] of 0 and 1."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        weights = weights.masked_fill(mask[:, None, None] == 0, float("-inf"))
    return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)
