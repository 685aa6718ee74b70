"""The small untrained Qwen-Image, in diffusers' own classes, and its tokenizer."""

from __future__ import annotations

import re

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from mixgrpo.shapes.architecture import merge_whole
from mixgrpo.words.signs import VOCABULARY

TEXT_WIDTH = 128
HEAD = 32
# The words of the template into which the pipeline puts every prompt. It drops the template's
# first 34 tokens by number, so each of these words must be one token, as it is for Qwen-Image.
_TEMPLATE = (
    "system Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background: user assistant"
)
_BARE = ("system", "Describe", "user", "assistant")  # first in their line, so without a space
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def qwen_image_pipeline(seed: int = 0) -> QwenImagePipeline:
    """An untrained Qwen-Image: 2.5M parameters in the transformer, 1.1M in the other parts."""
    torch.manual_seed(seed)
    tokenizer = qwen_words()
    return QwenImagePipeline(
        scheduler=_scheduler(),
        vae=_vae(),
        text_encoder=_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=_transformer(),
    )


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Qwen-Image's: a time shift that depends on the picture's size, sigmas that end at 0.02."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def _transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=4,
        attention_head_dim=HEAD,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
    )


def _vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8, num_res_blocks=1, latents_mean=[0.0] * 16, latents_std=[1.0] * 16
    )


def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """The language model is what counts; no picture ever passes the vision tower."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": TEXT_WIDTH // HEAD,
        "num_key_value_heads": TEXT_WIDTH // HEAD,
        "max_position_embeddings": 1024 + 34,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 6, 6],  # half of a head in all
        },
        "tie_word_embeddings": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id),
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": TEXT_WIDTH,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen_words() -> Qwen2Tokenizer:
    """A byte-pair tokenizer that knows the words of captions and template; all else is bytes."""
    tokens = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    template = [word for word in re.findall(r"\w+", _TEMPLATE) if word not in _BARE]
    spaced = [f"\u0120{word}" for word in (*VOCABULARY, *template, '"')]
    for word in dict.fromkeys([*_BARE, *spaced]):
        tokens += merge_whole(list(word), merges)
    tokens += _SPECIAL
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        additional_special_tokens=list(_SPECIAL[1:]),
        model_max_length=1024 + 34,
    )
