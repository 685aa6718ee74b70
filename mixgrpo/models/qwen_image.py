"""Qwen-Image: Qwen2.5-VL, packed latents, guidance that keeps the norm of every token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenEmbedRope,
)
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mixgrpo.files.json_files import is_number, read_settings
from mixgrpo.files.messages import shortened
from mixgrpo.maths.schedule import Spacing
from mixgrpo.models.family import JOINT_ATTENTION, Family, Published, Settings, Setup
from mixgrpo.models.files import check_axes, part_settings
from mixgrpo.models.precision import cast_feed_forward, keep_times
from mixgrpo.models.spacing import spacing_from
from mixgrpo.types import TextEmbedding

_BLOCKS = r"transformer_blocks\.\d+\."
_FEED_FORWARD = r"(img_mlp|txt_mlp)\.net\.(0\.proj|2)"
_SCHEDULER = {  # Qwen-Image's own, for a folder that has none
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
}
# Of transformers that take more than noise and text, such as those that edit images.
_VARIANTS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
_LAYERS = 60
# Behind the prompt, the pipeline's template has these tokens, which its embedding contains.
_END = "<|im_end|>\n<|im_start|>assistant\n"


class QwenImage(Family):
    """Qwen-Image, arXiv 2508.02324; see ``Family``."""

    name = "qwen_image"
    title = "Qwen-Image"
    pipeline = QwenImagePipeline
    weighted: ClassVar = {
        "transformer": (QwenImageTransformer2DModel, None),
        "vae": (AutoencoderKLQwenImage, None),
        "text_encoder": (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig),
    }
    tokenizers: ClassVar = {"tokenizer": "text_encoder"}
    main_tokenizer = "tokenizer"
    shared = (
        ("joint_attention_dim", "text_encoder", "hidden_size", 1),
        ("in_channels", "vae", "z_dim", 4),
    )
    longest_text = 1024
    masks = True
    negative = " "
    lora_targets: ClassVar = {
        "attention": f"{_BLOCKS}{JOINT_ATTENTION}",
        "all": f"{_BLOCKS}({JOINT_ATTENTION}|{_FEED_FORWARD})",
    }
    lora_marks = r"(img|txt)_(mlp[._]net|mod[._]1)"

    # Its transformer and VAE have the defaults of their classes.
    published = Published(
        "Qwen-Image",
        settings={"transformer": {}, "vae": {}},
        encoders={"text_encoder": 8_292_166_656},
    )

    def latent_channels(self, transformer: Settings) -> int:
        return int(transformer["in_channels"])

    def text_widths(self, transformer: Settings) -> tuple[int, int]:
        return int(transformer["joint_attention_dim"]), 0

    def spacing(self, scheduler: Settings, tokens: int, steps: int) -> Spacing:
        defaults = FlowMatchEulerDiscreteScheduler().config
        settings = {**defaults, **scheduler} if scheduler else _SCHEDULER
        return spacing_from(settings, tokens)

    def embedding_values(self, settings: Mapping[str, Settings], length: int) -> int:
        return int(length * settings["text_encoder"]["hidden_size"])

    def check(self, folder: Path, without: Sequence[str]) -> None:
        if "transformer" not in without:
            check_axes(folder)
            check_variant(folder)
        if "vae" not in without:
            check_statistics(folder)
        if "text_encoder" not in without:
            check_positions(folder, part_settings(self, folder / "text_encoder"))

    def encode(
        self, pipeline: Any, prompt: str, length: int, device: torch.device
    ) -> TextEmbedding:
        tokens, _ = pipeline.encode_prompt(
            prompt=[prompt], device=device, max_sequence_length=length
        )
        return TextEmbedding(tokens)

    def count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        ended = [prompt + _END for prompt in prompts]
        return list(map(len, tokenizer(ended, verbose=False).input_ids))

    def prepare(self, module: Any, dtype: torch.dtype) -> None:
        module.set_attn_processor({name: TextMasked() for name in module.attn_processors})
        keep_times(module, ("timestep",), 1)
        if dtype != torch.float32:
            cast_once(module, dtype)

    def mend(self, module: Any, device: torch.device) -> None:
        old = module.pos_embed
        # A new module, because the old one caches what it has computed.
        module.pos_embed = QwenEmbedRope(old.theta, old.axes_dim, old.scale_rope)
        module.pos_embed.pos_freqs = module.pos_embed.pos_freqs.to(device)
        module.pos_embed.neg_freqs = module.pos_embed.neg_freqs.to(device)

    def unused_weights(self, transformer: Settings) -> list[str]:
        """What the last block computes for the text alone, which nothing reads."""
        last = f"transformer_blocks.{transformer.get('num_layers', _LAYERS) - 1}."
        names = ("attn.add_q_proj.", "attn.norm_added_q.", "attn.to_add_out.", "txt_mlp.")
        return [last + name for name in names]

    def predict(
        self, module: nn.Module, x: Tensor, sigma: Tensor, text: TextEmbedding, setup: Setup
    ) -> Tensor:
        size = (1, setup.height // self.side, setup.width // self.side)
        predicted: Tensor = module(
            hidden_states=x,
            encoder_hidden_states=text.tokens,
            timestep=sigma,
            img_shapes=[[size]] * len(x),
            attention_kwargs={"text_mask": _mask(text, x.device)},
            return_dict=False,
        )[0]
        return predicted

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """The guided velocity, each token of which gets the norm of the conditional one's."""
        guided = super().guide(conditional, unconditional, scale)
        wanted = torch.linalg.vector_norm(conditional, dim=-1, keepdim=True)
        norm = torch.linalg.vector_norm(guided, dim=-1, keepdim=True)
        return guided * (wanted / norm.clamp(min=torch.finfo(norm.dtype).tiny))

    def decode(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        vae = pipeline.vae
        unpacked = QwenImagePipeline._unpack_latents(
            latents, height, width, pipeline.vae_scale_factor
        )
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(latents.device, non_blocking=True)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        z = unpacked * std + mean  # [N, 16, 1, h, w]: a film of one picture
        decoded: Tensor = vae.decode(z.to(vae.dtype), return_dict=False)[0]
        return decoded[:, :, 0]


QWEN_IMAGE = QwenImage()


class TextMasked(QwenDoubleStreamAttnProcessor2_0):
    """The attention, with the mask of the text's tokens among the arguments of attention.

    The transformer's own argument for the mask makes the host wait for the GPU: the transformer
    computes from it how long the texts are.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        text_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor] = super().__call__(
            attn,
            hidden_states,
            encoder_hidden_states,
            encoder_hidden_states_mask if text_mask is None else text_mask,
            attention_mask,
            image_rotary_emb,
        )
        return outputs


def _mask(text: TextEmbedding, device: torch.device) -> Tensor | None:
    """[N, L] bool, true where a token is not padding; None if nothing is padding."""
    if text.lengths is None:
        return None
    positions = torch.arange(text.tokens.shape[1], device=device)
    return positions < text.lengths.to(device, non_blocking=True)[:, None]


def check_variant(folder: Path) -> None:
    """Raises OSError, ValueError: the transformer takes other inputs, or makes other outputs."""
    path = folder / "transformer" / "config.json"
    defaults = {"in_channels": 64, "out_channels": 16, "patch_size": 2}
    config = {**defaults, **read_settings(path)}
    for key in _VARIANTS:
        if config.get(key):
            raise ValueError(
                f"{path} has {key} {config[key]}, as transformers that need more than a prompt do; "
                "fetch one that makes images from text, such as Qwen/Qwen-Image"
            )
    if config.get("num_layers", _LAYERS) < 1:
        raise ValueError(f"{path} has num_layers {config['num_layers']}; fetch it again")
    channels = [config[key] for key in defaults]
    if channels[0] != (channels[1] or channels[0]) * channels[2] ** 2:
        raise ValueError(
            f"{path} has in_channels {channels[0]}, out_channels {channels[1]} and patch_size "
            f"{channels[2]}, so that its output is not a latent; fetch it again"
        )


def check_positions(folder: Path, settings: Settings) -> None:
    """Raises ValueError: the text encoder's rotary positions do not fill its heads."""
    half = settings["hidden_size"] // settings["num_attention_heads"] // 2
    sections = (settings.get("rope_parameters") or {}).get("mrope_section")
    whole = isinstance(sections, list) and all(type(size) is int for size in sections)
    if not whole or sum(sections or []) != half:
        raise ValueError(
            f"{folder / 'text_encoder' / 'config.json'} has mrope_section {sections}, but it must "
            f"be whole numbers whose sum is half the width of a head, {half}; fetch it again"
        )


def check_statistics(folder: Path) -> None:
    """Raises OSError, ValueError: the VAE's configuration lacks what turns latents into images."""
    path = folder / "vae" / "config.json"
    config = read_settings(path)
    channels = config.get("z_dim", 16)
    wanted = (("latents_mean", -math.inf, "numbers"), ("latents_std", 0.0, "positive numbers"))
    for key, least, kind in wanted:
        values = config.get(key)
        if key not in config:
            continue  # the library's own are Qwen-Image's
        whole = isinstance(values, list) and len(values) == channels
        if not whole or not all(is_number(value) and value > least for value in values or []):
            raise ValueError(
                f"{path} has {key} {shortened(str(values))}, but it must be a list of {channels} "
                f"{kind}, one for each channel of the latents; fetch it again"
            )


def cast_once(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Casts what several matrix products read to their dtype; the outputs are the same.

    The norms of the blocks return float32 under autocast, as do their modulations.
    """
    for module in transformer.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(partial(_cast_both, dtype), with_kwargs=True)
        cast_feed_forward(module, dtype)


def _cast_both(
    dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    names = ("hidden_states", "encoder_hidden_states")
    return args, {**kwargs, **{name: kwargs[name].to(dtype) for name in names}}
