"""The small untrained models: a FLUX pipeline and its tokenizers, in diffusers' own classes."""

from __future__ import annotations

import itertools

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from mixgrpo.shapes.scenes import VOCABULARY

TEXT_LENGTH = 16  # the longest caption has 12 words


def flux_pipeline(seed: int = 0) -> FluxPipeline:
    """An untrained FLUX pipeline: about 2.4M parameters in the transformer, 1.6M in other parts."""
    torch.manual_seed(seed)
    t5_tokenizer, clip_tokenizer = t5_words(), clip_words()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False),
        vae=_vae(),
        text_encoder=_clip_text(clip_tokenizer),
        tokenizer=clip_tokenizer,
        text_encoder_2=_t5(t5_tokenizer),
        tokenizer_2=t5_tokenizer,
        transformer=_transformer(),
    )


def _transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def _t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def _clip_text(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(**clip_text_sizes(tokenizer, width=64)))


def clip_text_sizes(tokenizer: CLIPTokenizer, width: int) -> dict[str, object]:
    """The sizes of a small CLIP's text encoder, with the names of transformers' configuration."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 32,
        "max_position_embeddings": TEXT_LENGTH,
        "projection_dim": width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def t5_words() -> T5Tokenizer:
    """A T5 tokenizer that knows this world's words; any other word is <unk>."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [("\u2581" + word, -2.0) for word in VOCABULARY]
    return T5Tokenizer(vocab=special + words, extra_ids=0, model_max_length=TEXT_LENGTH)


def clip_words() -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer whose merges build each of this world's words into one token."""
    letters = list("abcdefghijklmnopqrstuvwxyz")
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in VOCABULARY:
        tokens += merge_whole([*word[:-1], word[-1] + "</w>"], merges)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        model_max_length=TEXT_LENGTH,
    )


def merge_whole(symbols: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Appends to the merges of a byte-pair encoding what makes one token of the symbols.

    Returns the tokens that this adds to the vocabulary.
    """
    added = []
    symbols = _merge(symbols, merges)
    while len(symbols) > 1:
        merges.append((symbols[0], symbols[1]))
        symbols = [symbols[0] + symbols[1], *symbols[2:]]
        added.append(symbols[0])
    return added


def _merge(symbols: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding: always applies the earliest possible merge, leftmost first.

    New merges are appended after all others, so the tokens of earlier words do not change.
    """
    while found := set(itertools.pairwise(symbols)).intersection(merges):
        first, second = min(found, key=merges.index)
        at = next(i for i in range(len(symbols)) if symbols[i : i + 2] == [first, second])
        symbols = [*symbols[:at], first + second, *symbols[at + 2 :]]
    return symbols
