"""The policy of any family that diffusers has a pipeline for: loading, training, decoding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixgrpo.config import ModelConfig
from mixgrpo.files.fingerprint import fingerprint
from mixgrpo.files.messages import in_one_line
from mixgrpo.models import Text
from mixgrpo.models.adapters import adapted_layers, streamline, switched_off
from mixgrpo.models.compiled import compile_blocks, repeated_blocks
from mixgrpo.models.family import Family, Setup
from mixgrpo.models.folder import checked_family, open_pipeline, require_parts
from mixgrpo.models.guidance import Guidance, guided
from mixgrpo.models.stored import StoredWeights, draw_adapters, empty_transformer
from mixgrpo.models.text import TextEncoders
from mixgrpo.types import TextEmbedding, Velocity

_COMPILED_TOKENS = 128  # texts get multiples of so many tokens if the blocks are compiled


class DiffusersPolicy:
    """A family's model; see ``mixgrpo.models.Policy``.

    Trained weights are float32, or bfloat16 if ``config.weights`` asks for it, and autocast
    computes in ``compute_dtype``; frozen weights are stored in ``compute_dtype``.
    """

    def __init__(
        self,
        family: Family,
        pipeline: Any,
        config: ModelConfig,
        device: torch.device,
        text: Text | None = None,
    ) -> None:
        self.family = family
        self.pipeline = pipeline
        self.stored: Mapping[str, Any] | None = None
        if pipeline.transformer.device.type != "meta":
            pipeline.transformer.to(device)
        pipeline.vae.to(device)
        self.text = text or TextEncoders(family, pipeline, config.text_length, device, "device")
        self.config = config
        self.device = device
        self.compute_dtype = getattr(torch, config.compute_dtype)
        self.module: nn.Module = pipeline.transformer
        family.mend(self.module, device)
        family.prepare(self.module, self.compute_dtype)
        settings = pipeline.transformer.config
        self.setup = Setup(settings, config.height, config.width, config.guidance)
        self.latent_shape = (
            family.tokens(config.height, config.width),
            family.latent_channels(settings),
        )

    @staticmethod
    def identify(config: ModelConfig) -> dict[str, str]:
        """Digests of the parts of a pipeline folder that training depends on, by their names.

        Raises:
            FileNotFoundError: if the folder or a part is missing.
        """
        family = checked_family(config)
        parts = require_parts(config.path, (*family.weighted, *family.tokenizers))
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
    ) -> DiffusersPolicy:
        """Loads a pipeline folder and makes the weights chosen by ``config.train`` trainable.

        Args:
            text_placement: where the text encoders are kept; see ``TextEncoders``.
            stored: stored embeddings that replace the text encoders, which are then not loaded.
            empty: leaves the transformer on the meta device; the engine that shards it loads the
                weights from the policy's ``stored``.

        Raises:
            FileNotFoundError: if the folder or one of its parts is missing.
            ValueError: if a part is damaged.
        """
        family = checked_family(config)
        require_parts(config.path, family.parts)
        compute = getattr(torch, config.compute_dtype)
        stored_as = trained_dtype(config) if config.train == "full" else compute
        dtypes = {"transformer": stored_as, "default": compute}
        without = family.text_parts if stored else ()
        given = {"transformer": empty_transformer(family, config.path, stored_as)} if empty else {}
        pipeline = open_pipeline(family, config.path, dtypes, without, **given)
        text = stored or TextEncoders(family, pipeline, config.text_length, device, text_placement)
        policy = cls(family, pipeline, config, device, text)
        policy.make_trainable(seed)
        if empty:
            folder = Path(config.path) / "transformer"
            policy.stored = StoredWeights(folder, policy.module, seed, config.lora_init)
        speed_up(policy.module, config)
        return policy

    @classmethod
    def frozen(cls, config: ModelConfig, device: torch.device) -> DiffusersPolicy:
        """Loads a pipeline folder for sampling, with all weights in ``compute_dtype``.

        Raises:
            FileNotFoundError: if the folder or one of its parts is missing.
        """
        family = checked_family(config)
        require_parts(config.path, family.parts)
        dtypes = {"default": getattr(torch, config.compute_dtype)}
        pipeline = open_pipeline(family, config.path, dtypes, without=())
        policy = cls(family, pipeline, config, device)
        for module in (pipeline.transformer, pipeline.vae):
            module.requires_grad_(False).eval()
        return policy

    def make_trainable(self, seed: int) -> None:
        """Makes the weights chosen by ``config.train`` trainable, and freezes all others."""
        transformer = self.pipeline.transformer
        self.pipeline.vae.requires_grad_(False).eval()
        if self.config.gradient_checkpointing:
            chosen = self.blocks(transformer)[:: self.config.checkpoint_every]
            transformer.enable_gradient_checkpointing(recompute(chosen))
        transformer.train()
        if self.config.train == "lora":
            self._add_adapters(transformer, seed)
            return
        for name, parameter in transformer.named_parameters():
            # An engine waits for the gradient of every trained weight.
            parameter.requires_grad_(self.family.uses(name, transformer.config))

    def _add_adapters(self, transformer: Any, seed: int) -> None:
        transformer.requires_grad_(False)
        transformer.add_adapter(
            LoraConfig(
                r=self.config.lora_rank,
                lora_alpha=self.config.lora_alpha,
                target_modules=adapted_layers(
                    self.family, self.config.lora_targets, transformer.config
                ),
            )
        )
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(trained_dtype(self.config))
        draw_adapters(transformer, seed, self.config.lora_init)
        streamline(transformer)

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        return list(repeated_blocks(module))

    def velocity(self, module: nn.Module, guidance: Guidance | None = None) -> Velocity:
        if guidance is not None and guidance.scale > 1:
            return guided(self._branch(module), self.family.guide, guidance)
        return self._branch(module)

    def _branch(self, module: nn.Module) -> Velocity:
        in_few_sizes = self.family.masks and self.config.compile != "off"

        def evaluate(x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
            if in_few_sizes:  # each is compiled anew
                text = text.padded_to(_COMPILED_TOKENS)
            with self._autocast():
                predicted = self.family.predict(module, x, sigma, text, self.setup)
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

    def untrained(self) -> nn.Module | None:
        if self.config.train == "lora":
            return None
        return copy.deepcopy(self.module).requires_grad_(False).eval()

    def without_adapters(self, module: nn.Module, guidance: Guidance | None = None) -> Velocity:
        trained = self.velocity(module, guidance)

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
        decoded = self.family.decode(self.pipeline, latents, self.config.height, self.config.width)
        return (decoded.float() / 2 + 0.5).clamp(0, 1)


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
