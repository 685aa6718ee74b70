"""An untrained Qwen-Image in diffusers' own classes, small enough for many evaluations."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tiny_world import PROMPTS, VALIDATION_PROMPTS, World
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

WIDTH = 64  # of the text
# Qwen-Image's published scheduler/scheduler_config.json
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}


class QwenWorld(World):
    """The world of the tests with a Qwen-Image, guidance and prompts of unequal lengths."""

    @property
    def model(self) -> Path:
        return self.root / "qwen"

    @classmethod
    def build(cls, root: Path) -> QwenWorld:
        world = cls(root)
        qwen_pipeline().save_pretrained(world.model)
        world.prompts.write_text("\n".join(PROMPTS) + "\n")
        world.validation_prompts.write_text("\n".join(VALIDATION_PROMPTS) + "\n")
        return world

    def base(self, folder: Path) -> dict[str, Any]:
        guided = {"guidance__scale": 4.0, "model__text_length": 24, "sampling__shift": 0.0}
        return {**super().base(folder), **guided}


def qwen_pipeline(seed: int = 0, layers: int = 2) -> QwenImagePipeline:
    """A pipeline of 0.6M parameters."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1),
        text_encoder=_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=qwen_transformer(layers),
    )
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        part.eval()
    # Fresh weights draw gray pictures, and hardly look at the text.
    nn.init.normal_(pipeline.transformer.proj_out.weight, std=0.2)
    nn.init.normal_(pipeline.transformer.txt_in.weight, std=0.2)
    for weight in pipeline.vae.decoder.parameters():
        weight.data.mul_(1.3)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def qwen_transformer(layers: int) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
    )


def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config)


@functools.cache
def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte pairs in which each word of the prompts is one token, and so are those of the template.

    The pipeline drops the template's first 34 tokens by their number.
    """
    template = (
        "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
        "spatial relationships of the objects and background:\nuser\nassistant\n"
    )
    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    letters = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    special = ["<|im_start|>", "<|im_end|>"]
    found: Qwen2Tokenizer = letters.train_new_from_iterator(
        [template, *PROMPTS, *VALIDATION_PROMPTS],
        vocab_size=4000,
        new_special_tokens=special,
        show_progress=False,
    )
    found.eos_token = "<|im_end|>"
    return found
