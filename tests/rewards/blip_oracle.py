"""ImageReward's forward pass written out in plain PyTorch, from its published key names."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear


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
