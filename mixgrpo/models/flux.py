"""FLUX.1: CLIP and T5, packed latents, an embedding of distilled guidance."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from mixgrpo.files.json_files import read_settings
from mixgrpo.maths.schedule import Spacing, dynamic_shift
from mixgrpo.models import flux_names
from mixgrpo.models.family import JOINT_ATTENTION, Family, Published, Settings, Setup
from mixgrpo.models.files import check_axes
from mixgrpo.models.precision import cast_feed_forward, keep_times
from mixgrpo.types import TextEmbedding

_BLOCKS = r"(single_)?transformer_blocks\.\d+\."
_FEED_FORWARD = r"(ff|ff_context)\.net\.(0\.proj|2)|proj_mlp|proj_out"


class Flux(Family):
    """FLUX.1; see ``Family``."""

    name = "flux"
    title = "FLUX"
    pipeline = FluxPipeline
    weighted: ClassVar = {
        "transformer": (FluxTransformer2DModel, None),
        "vae": (AutoencoderKL, None),
        "text_encoder": (CLIPTextModel, CLIPTextConfig),
        "text_encoder_2": (T5EncoderModel, T5Config),
    }
    tokenizers: ClassVar = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
    main_tokenizer = "tokenizer_2"
    unused = ("image_encoder", "feature_extractor")  # for images as prompts
    shared = (
        ("joint_attention_dim", "text_encoder_2", "d_model", 1),
        ("pooled_projection_dim", "text_encoder", "hidden_size", 1),
        ("in_channels", "vae", "latent_channels", 4),
    )
    # Patterns of full paths: the bare name "proj_out" would also match the model's output layer.
    lora_targets: ClassVar = {
        "attention": f"{_BLOCKS}({JOINT_ATTENTION})",
        "all": f"{_BLOCKS}({JOINT_ATTENTION}|{_FEED_FORWARD})",
    }
    lora_marks = r"single_transformer_blocks|single_blocks|double_blocks"

    published = Published(
        "FLUX.1-dev",
        settings={
            "transformer": {"guidance_embeds": True},
            "vae": {
                "block_out_channels": [128, 256, 512, 512],
                "down_block_types": ["DownEncoderBlock2D"] * 4,
                "up_block_types": ["UpDecoderBlock2D"] * 4,
                "layers_per_block": 2,
                "latent_channels": 16,
                "use_quant_conv": False,
                "use_post_quant_conv": False,
                "scaling_factor": 0.3611,
                "shift_factor": 0.1159,
            },
        },
        encoders={"text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656},
    )

    def latent_channels(self, transformer: Settings) -> int:
        return int(transformer["in_channels"])

    def text_widths(self, transformer: Settings) -> tuple[int, int]:
        return int(transformer["joint_attention_dim"]), int(transformer["pooled_projection_dim"])

    def spacing(self, scheduler: Settings, tokens: int, steps: int) -> Spacing:
        return Spacing(dynamic_shift(tokens))

    def embedding_values(self, settings: Mapping[str, Settings], length: int) -> int:
        pooled = settings["text_encoder"]["hidden_size"]
        return int(length * settings["text_encoder_2"]["d_model"] + pooled)

    def check(self, folder: Path, without: Sequence[str]) -> None:
        if "transformer" not in without:
            check_axes(folder)
        if "vae" not in without:
            check_factors(folder)

    def layers_of(self, name: str) -> tuple[str, ...]:
        return flux_names.layers_of(name)

    def is_swapped(self, name: str) -> bool:
        return flux_names.is_swapped(name)

    def encode(
        self, pipeline: Any, prompt: str, length: int, device: torch.device
    ) -> TextEmbedding:
        tokens, pooled, _ = pipeline.encode_prompt(
            prompt=[prompt], device=device, max_sequence_length=length
        )
        return TextEmbedding(tokens, pooled)

    def count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        return list(map(len, tokenizer(list(prompts), verbose=False).input_ids))

    def prepare(self, module: Any, dtype: torch.dtype) -> None:
        keep_times(module, ("timestep", "guidance"), 1000)
        if dtype != torch.float32:
            cast_once(module, dtype)

    def predict(
        self, module: nn.Module, x: Tensor, sigma: Tensor, text: TextEmbedding, setup: Setup
    ) -> Tensor:
        guided = setup.transformer["guidance_embeds"]
        rows, columns = setup.height // self.side, setup.width // self.side
        predicted: Tensor = module(
            hidden_states=x,
            timestep=sigma,
            guidance=torch.full_like(sigma, setup.guidance) if guided else None,
            pooled_projections=text.pooled,
            encoder_hidden_states=text.tokens,
            txt_ids=x.new_zeros(text.tokens.shape[1], 3),
            img_ids=_image_ids(rows, columns, x.device),
            return_dict=False,
        )[0]
        return predicted

    def decode(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        vae = pipeline.vae
        unpacked = FluxPipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
        z = unpacked / vae.config.scaling_factor + vae.config.shift_factor
        decoded: Tensor = vae.decode(z.to(vae.dtype), return_dict=False)[0]
        return decoded


FLUX = Flux()


@functools.lru_cache
def _image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """[S, 3] the position of every latent token: an unused axis, its row and its column."""
    row, column = (torch.arange(n, device=device, dtype=torch.float32) for n in (rows, columns))
    grid = torch.cartesian_prod(row, column)
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)


def check_factors(folder: Path) -> None:
    """Raises OSError, ValueError: the VAE's configuration lacks what turns latents into images."""
    path = folder / "vae" / "config.json"
    config = read_settings(path)
    for key, least in (("scaling_factor", 0.0), ("shift_factor", -math.inf)):
        value = config.get(key, None if key == "shift_factor" else 1.0)
        if not isinstance(value, int | float) or not least < value < math.inf:
            raise ValueError(f"{path} has {key} {value}, which cannot be; fetch it again")


def cast_once(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Casts what several matrix products read to their dtype; the outputs are the same.

    The blocks' norms return float32 under autocast, which otherwise casts it anew for each of up to
    eight products: the projections and the adapters beside them.
    """
    for module in transformer.modules():
        if isinstance(module, (AdaLayerNormZero, AdaLayerNormZeroSingle)):
            module.register_forward_hook(partial(_cast_first_output, dtype))
        cast_feed_forward(module, dtype)


def _cast_first_output(
    dtype: torch.dtype, module: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return (outputs[0].to(dtype), *outputs[1:])
