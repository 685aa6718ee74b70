"""The knobs of image generation, documented where they are defined, checked before use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal

from mixgrpo.checks import SAMPLING_BOUNDS, check_bounds, guidance_complaints
from mixgrpo.config import FilePath, ModelConfig, flatten


@dataclass
class SampledModelConfig:
    """The base model: which diffusers pipeline folder it comes from and how it is run."""

    family: str = "auto"
    """model family: auto, the one whose pipeline model_index.json names, or its name in
    mixgrpo/models/registry.py"""
    path: FilePath = "data/models/FLUX.1-dev"
    """diffusers pipeline folder"""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of the weights and matrix products; latents and step arithmetic stay in float32"""
    guidance: float = 3.5
    """value of the distilled guidance embedding; no effect on models without one"""
    height: int = 1024
    """image height in pixels, a multiple of 16"""
    width: int = 1024
    """image width in pixels, a multiple of 16"""
    text_length: int = 512
    """maximum number of tokens of a prompt; longer prompts are truncated with a warning"""


@dataclass
class SampledGuidanceConfig:
    """Classifier-free guidance, for families that have it."""

    scale: float = 1.0
    """scale w of u + w (c - u), of the conditional and the unconditional velocity; 1 evaluates no
    unconditional branch"""
    negative_prompt: str | None = None
    """prompt of the unconditional branch, for prompts whose line of JSONL has no key
    `negative_prompt`; null uses the family's own"""
    batched: bool = False
    """evaluate both branches in one batch of twice the size instead of one after the other"""


@dataclass
class InferenceConfig:
    """How images are generated from a file of prompts."""

    model: SampledModelConfig = field(default_factory=SampledModelConfig)
    guidance: SampledGuidanceConfig = field(default_factory=SampledGuidanceConfig)
    prompts_file: FilePath = "data/prompts_test.txt"
    """file of prompts, UTF-8: one per line, or JSONL with a key `prompt`"""
    folder: FilePath = "runs/pictures"
    """output folder for the images and manifest.json; existing images are not generated again"""
    checkpoint: FilePath | None = None
    """tuned weights: a run's model folder or one of its checkpoints/iteration_N folders, a
    transformer folder or weight file, or a LoRA; null uses the base model only"""
    weights: Literal["plain", "ema"] = "plain"
    """which weights of a checkpoints/iteration_N folder to use: plain, the trained weights; ema,
    their moving average"""
    lora_scale: float = 1.0
    """strength of a LoRA; 0 is the base model"""
    hybrid: float = 1.0
    """fraction of the steps, from the first, that the tuned model computes; the base model computes
    the others"""
    only_base: bool = False
    """ignore the checkpoint and use the base model, so that the same command gives its images"""
    steps: int = 50
    """number of denoising steps"""
    shift: float = 0.0
    """time shift; 0 uses the schedule of the family's own inference, which depends on the image
    size"""
    seed: int = 617
    """seed of the noise"""
    samples: int = 1
    """images per prompt"""
    micro_batch: int = 4
    """images per forward pass of the model"""
    decode_batch: int = 4
    """latents per forward pass of the image decoder, at most micro_batch"""
    threads: int = 0
    """CPU threads per process; 0 keeps torch's default, or an equal share under torchrun"""
    progress: bool = True
    """show a progress bar"""


def model_config(config: InferenceConfig) -> ModelConfig:
    """The configuration with which the model is loaded; nothing is trained."""
    return ModelConfig(**asdict(config.model), gradient_checkpointing=False)


def tuned_steps(config: InferenceConfig) -> int:
    """Number of steps, from the first, that the tuned model computes."""
    if config.only_base or config.checkpoint is None:
        return 0
    return round(config.hybrid * config.steps)


def check(config: InferenceConfig) -> None:
    """Checks what types cannot express, before anything is loaded.

    Raises:
        ValueError: on the first knob that cannot work, with the remedy.
    """
    check_bounds(flatten(config), SAMPLING_BOUNDS)
    for complaint in _complaints(config):
        raise ValueError(complaint)


def _complaints(config: InferenceConfig) -> Iterator[str]:
    values = flatten(config)
    for side in ("model.height", "model.width"):
        if values[side] % 16:
            yield f"{side} is {values[side]}; it must be a positive multiple of 16"
    yield from guidance_complaints(config.guidance.negative_prompt, config.guidance.scale)
    if config.checkpoint is not None:
        return
    plain = InferenceConfig()
    for key in ("weights", "lora_scale", "hybrid"):
        if getattr(config, key) != getattr(plain, key):
            yield (
                f"{key} is {getattr(config, key)}, but no tuned weights are given; "
                "set --checkpoint to them"
            )
