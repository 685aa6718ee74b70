"""A model family as a user would add it: Stable Diffusion 3, in one file and a line of registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from mixgrpo.maths.schedule import Spacing
from mixgrpo.models.family import Family, Published, Settings, Setup
from mixgrpo.models.flux import FLUX
from mixgrpo.types import TextEmbedding

_CLIP = (CLIPTextModelWithProjection, CLIPTextConfig)
_PROJECTIONS = r"to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out"


class StableDiffusion3(Family):
    """SD3 and SD3.5; latents are flattened from [N, 16, h, w] to [N, h w, 16]."""

    name = "sd3"
    title = "Stable Diffusion 3"
    pipeline = StableDiffusion3Pipeline
    weighted: ClassVar = {
        "transformer": (SD3Transformer2DModel, None),
        "vae": (AutoencoderKL, None),
        "text_encoder": _CLIP,
        "text_encoder_2": _CLIP,
        "text_encoder_3": (T5EncoderModel, T5Config),
    }
    tokenizers: ClassVar = {
        "tokenizer": "text_encoder",
        "tokenizer_2": "text_encoder_2",
        "tokenizer_3": "text_encoder_3",
    }
    main_tokenizer = "tokenizer_3"
    unused = ("image_encoder", "feature_extractor")
    shared = (
        ("joint_attention_dim", "text_encoder_3", "d_model", 1),
        ("in_channels", "vae", "latent_channels", 1),
    )
    side = 8
    lora_targets: ClassVar = dict.fromkeys(
        ("attention", "all"), rf"transformer_blocks\.\d+\.attn2?\.({_PROJECTIONS})"
    )
    negative = ""
    published = Published(
        "Stable Diffusion 3.5 Medium",
        settings={
            "transformer": {
                "sample_size": 128,
                "num_layers": 24,
                "num_attention_heads": 24,
                "attention_head_dim": 64,
                "caption_projection_dim": 1536,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 2048,
                "pos_embed_max_size": 384,
                "dual_attention_layers": list(range(13)),
                "qk_norm": "rms_norm",
            },
            "vae": FLUX.published.settings["vae"],  # with other factors
        },
        encoders={
            "text_encoder": 123_650_304,
            "text_encoder_2": 694_659_840,
            "text_encoder_3": 4_762_310_656,
        },
    )

    def latent_channels(self, transformer: Settings) -> int:
        return int(transformer["in_channels"])

    def text_widths(self, transformer: Settings) -> tuple[int, int]:
        return int(transformer["joint_attention_dim"]), int(transformer["pooled_projection_dim"])

    def spacing(self, scheduler: Settings, tokens: int, steps: int) -> Spacing:
        shift = float(scheduler.get("shift", 3.0))
        least = 1 / float(scheduler.get("num_train_timesteps", 1000))
        # The pipeline's steps run evenly to the last training sigma, which is shifted already.
        return Spacing(shift, smallest=shift * least / (1 + (shift - 1) * least))

    def embedding_values(self, settings: Mapping[str, Settings], length: int) -> int:
        clips = [settings[part] for part in ("text_encoder", "text_encoder_2")]
        pooled = sum(clip["projection_dim"] for clip in clips)
        return int((77 + length) * settings["text_encoder_3"]["d_model"] + pooled)

    def encode(
        self, pipeline: Any, prompt: str, length: int, device: torch.device
    ) -> TextEmbedding:
        tokens, _, pooled, _ = pipeline.encode_prompt(
            *([prompt], None, None),
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
        )
        return TextEmbedding(tokens, pooled)

    def count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        return list(map(len, tokenizer(list(prompts), verbose=False).input_ids))

    def predict(
        self, module: nn.Module, x: Tensor, sigma: Tensor, text: TextEmbedding, setup: Setup
    ) -> Tensor:
        predicted: Tensor = module(
            hidden_states=_unflattened(x, setup.height, setup.width),
            timestep=1000 * sigma,
            encoder_hidden_states=text.tokens,
            pooled_projections=text.pooled,
            return_dict=False,
        )[0]
        return predicted.flatten(2).transpose(1, 2)

    def decode(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        vae = pipeline.vae
        z = _unflattened(latents, height, width) / vae.config.scaling_factor
        decoded: Tensor = vae.decode((z + vae.config.shift_factor).to(vae.dtype))[0]
        return decoded


def _unflattened(x: Tensor, height: int, width: int) -> Tensor:
    return x.transpose(1, 2).unflatten(2, (height // 8, width // 8))


SD3 = StableDiffusion3()
