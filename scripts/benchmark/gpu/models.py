"""FLUX.1-dev's size with random weights, which time and memory do not depend on.

The weights are drawn on the device in the dtype in which they are kept; the CPU never holds them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn

from mixgrpo.config import ModelConfig
from mixgrpo.models.flux import FLUX
from mixgrpo.models.policy import DiffusersPolicy, speed_up, trained_dtype
from mixgrpo.planning.network import Network, Size
from mixgrpo.planning.operations import Products
from mixgrpo.types import TextEmbedding

TRANSFORMER: dict[str, Any] = dict(FLUX.published.settings["transformer"])
VAE: dict[str, Any] = dict(FLUX.published.settings["vae"])
SMALL_TRANSFORMER: dict[str, Any] = {
    **TRANSFORMER,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [8, 12, 12],
}
SMALL_VAE: dict[str, Any] = {**VAE, "block_out_channels": [16] * 4, "norm_num_groups": 8}


@dataclass(frozen=True)
class Scale:
    """A task's sizes.

    Attributes:
        transformer, vae: configurations.
        pixels: height and width of the images.
        text_length: tokens of a prompt.
        samples: images of the prompt, in one iteration; a multiple of the optimizer steps.
        steps, window, start: denoising steps, those of the window, and its first one.
        lora_rank: rank of the adapters.
    """

    transformer: dict[str, Any] = field(default_factory=lambda: dict(TRANSFORMER))
    vae: dict[str, Any] = field(default_factory=lambda: dict(VAE))
    pixels: int = 720
    text_length: int = 512
    samples: int = 12
    optimizer_steps: int = 4
    steps: int = 25
    window: int = 4
    start: int = 5
    lora_rank: int = 64

    @property
    def products(self) -> Products:
        size = Size(self.pixels, self.pixels, self.text_length)
        return Network(FLUX, self.transformer).products(size)

    def knobs(self, **knobs: Any) -> ModelConfig:
        """A model's configuration at this scale."""
        sides = {"height": self.pixels, "width": self.pixels, "text_length": self.text_length}
        return ModelConfig(**{"path": "", "lora_rank": self.lora_rank, **sides, **knobs})

    def write_folder(self, folder: Path) -> Path:
        """Writes the configurations as a model folder without weights, which a plan can read."""
        for part, config in (("transformer", self.transformer), ("vae", self.vae)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / "config.json").write_text(json.dumps(config))
        return folder


# The mean window of a run of 300 iterations starts at step 5.5.
FULL = Scale()
SMALL = Scale(
    transformer=SMALL_TRANSFORMER,
    vae=SMALL_VAE,
    pixels=32,
    text_length=16,
    samples=4,
    optimizer_steps=2,
    steps=6,
    window=2,
    start=1,
    lora_rank=4,
)


class NoText:
    """Replaces the text encoders: the embeddings here are random."""


def build(scale: Scale, knobs: ModelConfig, device: torch.device) -> DiffusersPolicy:
    """The policy with random weights, trained or frozen as ``knobs`` say."""
    compute, before = getattr(torch, knobs.compute_dtype), torch.get_default_dtype()
    stored = trained_dtype(knobs) if knobs.train == "full" else compute
    torch.manual_seed(0)
    try:
        with torch.device(device):
            torch.set_default_dtype(stored)
            transformer = FluxTransformer2DModel(**scale.transformer)
            torch.set_default_dtype(compute)
            vae = AutoencoderKL(**scale.vae)
    finally:
        torch.set_default_dtype(before)
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = FluxPipeline(
        transformer=transformer, vae=vae, scheduler=scheduler, **dict.fromkeys(names)
    )
    policy = DiffusersPolicy(FLUX, pipeline, knobs, device, text=NoText())  # type: ignore[arg-type]
    policy.make_trainable(seed=0)
    speed_up(policy.module, knobs)
    return policy


def text_for(policy: DiffusersPolicy, count: int) -> TextEmbedding:
    """Random embeddings of ``count`` prompts."""
    config, length = policy.pipeline.transformer.config, policy.config.text_length
    tokens = torch.randn(count, length, config.joint_attention_dim, device=policy.device)
    pooled = torch.randn(count, config.pooled_projection_dim, device=policy.device)
    return TextEmbedding(tokens.to(policy.compute_dtype), pooled.to(policy.compute_dtype))


def move_adapters(module: nn.Module) -> None:
    """Gives adapters, whose second halves are zero at first, weights that have an effect."""
    for name, parameter in module.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.01)
