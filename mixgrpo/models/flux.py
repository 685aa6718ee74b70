"""The FLUX policy, from a diffusers pipeline folder: velocity, decoding and adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixgrpo.config import ModelConfig
from mixgrpo.files.fingerprint import fingerprint
from mixgrpo.files.messages import in_one_line
from mixgrpo.models import Text
from mixgrpo.models.compiled import compile_blocks
from mixgrpo.models.flux_folder import open_pipeline
from mixgrpo.models.flux_lora import streamline, switched_off
from mixgrpo.models.flux_stored import StoredFlux, draw_adapters, empty_transformer
from mixgrpo.models.flux_text import TEXT_PARTS, FluxText, require_parts
from mixgrpo.types import TextEmbedding, Velocity

PARTS = ("transformer", "vae", *TEXT_PARTS, "scheduler")
_BLOCKS = r"(single_)?transformer_blocks\.\d+\."
_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_FEED_FORWARD = r"(ff|ff_context)\.net\.(0\.proj|2)|proj_mlp|proj_out"
# Patterns of full paths: the bare name "proj_out" would also match the model's output layer.
LORA_TARGETS = {
    "attention": f"{_BLOCKS}({_ATTENTION})",
    "all": f"{_BLOCKS}({_ATTENTION}|{_FEED_FORWARD})",
}


class Flux:
    """The FLUX policy; see ``mixgrpo.models.Policy``.

    Trained weights are float32, or bfloat16 if ``config.weights`` asks for it, and autocast
    computes in ``compute_dtype``; frozen weights are stored in ``compute_dtype``.
    """

    def __init__(
        self,
        pipeline: FluxPipeline,
        config: ModelConfig,
        device: torch.device,
        text: Text | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.stored: Mapping[str, Any] | None = None
        if pipeline.transformer.device.type != "meta":
            pipeline.transformer.to(device)
        pipeline.vae.to(device)
        self.text = text or FluxText(pipeline, config.text_length, device, "device")
        self.config = config
        self.device = device
        self.compute_dtype = getattr(torch, config.compute_dtype)
        self.module: nn.Module = pipeline.transformer
        self.module.register_forward_pre_hook(_note_times, with_kwargs=True)
        self.module.time_text_embed.register_forward_pre_hook(_use_noted_times)
        if self.compute_dtype != torch.float32:
            cast_once(self.module, self.compute_dtype)
        side = pipeline.vae_scale_factor * 2
        self.grid = (config.height // side, config.width // side)
        self.latent_shape = (self.grid[0] * self.grid[1], pipeline.transformer.config.in_channels)
        self._image_ids = FluxPipeline._prepare_latent_image_ids(
            1, *self.grid, device, torch.float32
        )

    @staticmethod
    def identify(config: ModelConfig) -> dict[str, str]:
        """Digests of the parts of a pipeline folder that training depends on, by their names.

        Raises:
            FileNotFoundError: if the folder or a part is missing.
        """
        parts = require_parts(config.path, ("transformer", "vae", *TEXT_PARTS))
        return {part.name: fingerprint(part) for part in parts}

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        device: torch.device,
        seed: int,
        text_placement: str = "device",
        stored: Text | None = None,
        empty: bool = False,
    ) -> Flux:
        """Loads a pipeline folder and makes the weights chosen by ``config.train`` trainable.

        Args:
            text_placement: where the text encoders are kept; see ``FluxText``.
            stored: stored embeddings that replace the text encoders, which are then not loaded.
            empty: leaves the transformer on the meta device; the engine that shards it loads the
                weights from the policy's ``stored``.

        Raises:
            FileNotFoundError: if the folder or one of its parts is missing.
            ValueError: if a part is damaged.
        """
        require_parts(config.path, PARTS)
        compute = getattr(torch, config.compute_dtype)
        stored_as = trained_dtype(config) if config.train == "full" else compute
        dtypes = {"transformer": stored_as, "default": compute}
        without = TEXT_PARTS if stored else ()
        given = {"transformer": empty_transformer(config.path, stored_as)} if empty else {}
        pipeline = open_pipeline(config.path, dtypes, without, **given)
        text = stored or FluxText(pipeline, config.text_length, device, text_placement)
        policy = cls(pipeline, config, device, text)
        policy._make_trainable(seed)
        if empty:
            policy.stored = StoredFlux(Path(config.path) / "transformer", policy.module, seed)
        speed_up(policy.module, config)
        return policy

    @classmethod
    def frozen(cls, config: ModelConfig, device: torch.device) -> Flux:
        """Loads a pipeline folder for sampling, with all weights in ``compute_dtype``.

        Raises:
            FileNotFoundError: if the folder or one of its parts is missing.
        """
        require_parts(config.path, PARTS)
        dtypes = {"default": getattr(torch, config.compute_dtype)}
        policy = cls(open_pipeline(config.path, dtypes, without=()), config, device)
        for module in (policy.pipeline.transformer, policy.pipeline.vae):
            module.requires_grad_(False).eval()
        return policy

    def _make_trainable(self, seed: int) -> None:
        transformer = self.pipeline.transformer
        self.pipeline.vae.requires_grad_(False).eval()
        if self.config.gradient_checkpointing:
            chosen = self.blocks(transformer)[:: self.config.checkpoint_every]
            transformer.enable_gradient_checkpointing(recompute(chosen))
        transformer.train()
        if self.config.train == "full":
            transformer.requires_grad_(True)
            return
        transformer.requires_grad_(False)
        transformer.add_adapter(
            LoraConfig(
                r=self.config.lora_rank,
                lora_alpha=self.config.lora_alpha,
                target_modules=LORA_TARGETS[self.config.lora_targets],
            )
        )
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(trained_dtype(self.config))
        draw_adapters(transformer, seed)
        streamline(transformer)

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        transformer: Any = module
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def velocity(self, module: nn.Module) -> Velocity:
        def evaluate(x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
            with self._autocast():
                predicted = module(
                    hidden_states=x,
                    timestep=sigma,
                    guidance=self._guidance(sigma),
                    pooled_projections=text.pooled,
                    encoder_hidden_states=text.tokens,
                    txt_ids=x.new_zeros(text.tokens.shape[1], 3),
                    img_ids=self._image_ids,
                    return_dict=False,
                )[0]
            return predicted.float()

        return evaluate

    def _autocast(self) -> torch.autocast:
        # An evaluation uses each weight once: a cache would only keep the casts of all of them.
        return torch.autocast(
            self.device.type,
            self.compute_dtype,
            enabled=self.compute_dtype != torch.float32,
            cache_enabled=False,
        )

    def _guidance(self, sigma: Tensor) -> Tensor | None:
        if not self.pipeline.transformer.config.guidance_embeds:
            return None
        return torch.full_like(sigma, self.config.guidance)

    def untrained(self) -> nn.Module | None:
        if self.config.train == "lora":
            return None
        return copy.deepcopy(self.module).requires_grad_(False).eval()

    def without_adapters(self, module: nn.Module) -> Velocity:
        trained = self.velocity(module)

        def evaluate(x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
            with switched_off(self.module):
                return trained(x, sigma, text)

        return evaluate

    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        return self.text.encode(prompts)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return self.text.count_truncated(prompts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        unpacked = FluxPipeline._unpack_latents(
            latents, self.config.height, self.config.width, self.pipeline.vae_scale_factor
        )
        z = unpacked / vae.config.scaling_factor + vae.config.shift_factor
        decoded = vae.decode(z.to(vae.dtype), return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)


def cast_once(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Casts what several matrix products read to their dtype; the outputs are the same.

    The blocks' norms return float32 under autocast, which otherwise casts it anew for each of up to
    eight products: the projections and the adapters beside them.
    """
    for module in transformer.modules():
        if isinstance(module, (AdaLayerNormZero, AdaLayerNormZeroSingle)):
            module.register_forward_hook(partial(_cast_first_output, dtype))
        elif isinstance(module, FeedForward):
            module.register_forward_pre_hook(partial(_cast_input, dtype))


def _cast_first_output(
    dtype: torch.dtype, module: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return (outputs[0].to(dtype), *outputs[1:])


def _cast_input(dtype: torch.dtype, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].to(dtype),)


def recompute(chosen: Sequence[nn.Module]) -> Callable[..., Any]:
    """A function that runs a block of a diffusers model, and recomputes the chosen ones."""
    identities = {id(block) for block in chosen}

    def run(block: nn.Module, *inputs: Any) -> Any:
        if id(block) not in identities:
            return block(*inputs)
        # Nothing in a block is random, so no state of a generator needs to be saved.
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)

    return run


def trained_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype in which trained weights are stored."""
    return torch.float32 if config.weights == "float32" else torch.bfloat16


def speed_up(transformer: Any, config: ModelConfig) -> None:
    """Applies the knobs that affect only speed.

    Raises:
        ValueError: if the attention backend cannot be used here.
    """
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    if config.attention != "native":
        try:
            transformer.set_attention_backend(config.attention)
        except (RuntimeError, ImportError, ValueError) as error:
            raise ValueError(
                f"model.attention is {config.attention!r}, which cannot be used here "
                f"({in_one_line(error)}); install its package, or set "
                "--model.attention native"
            ) from error
    if config.compile != "off":
        compile_blocks(transformer, config.compile)


# diffusers casts sigma and guidance to the dtype of the activations before embedding them; in
# bfloat16, sigma would keep only 8 bits. These two hooks pass the exact values to the embedding.
# They are functions, not methods, so that they are copied with the module.


def _note_times(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    times = (kwargs["timestep"], kwargs.get("guidance"))
    transformer.time_text_embed.exact = [1000 * time for time in times if time is not None]


def _use_noted_times(embedding: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (*embedding.exact, args[-1])
