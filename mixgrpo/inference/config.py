"""Every knob of sampling pictures, documented where it is defined, checked before use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal

from mixgrpo.config import ModelConfig, flatten


@dataclass
class SampledModelConfig:
    """The base model: a diffusers pipeline folder and how it is run."""

    family: Literal["flux"] = "flux"
    """model family"""
    path: str = "data/models/FLUX.1-dev"
    """diffusers pipeline folder with transformer, vae, two text encoders and tokenizers"""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of the weights and the matrix products; step arithmetic and latents stay float32"""
    guidance: float = 3.5
    """value for the distilled guidance embedding; no effect on models without one"""
    height: int = 1024
    """picture height in pixels, a multiple of 16"""
    width: int = 1024
    """picture width in pixels, a multiple of 16"""
    text_length: int = 512
    """tokens that the T5 encoder sees; longer prompts are truncated, with a warning"""


@dataclass
class InferenceConfig:
    """Pictures of a file of prompts."""

    model: SampledModelConfig = field(default_factory=SampledModelConfig)
    prompts_file: str = "data/prompts_test.txt"
    """prompts, one a line, UTF-8"""
    folder: str = "runs/pictures"
    """where the pictures and manifest.json go; what is there already is not drawn again"""
    checkpoint: str | None = None
    """tuned weights: a run's model folder or one of its checkpoints/iteration_N folders, a
    transformer folder or .safetensors file, or a LoRA; without it the base model draws"""
    weights: Literal["plain", "ema"] = "plain"
    """which weights of a checkpoints/iteration_N folder: the trained ones or their average"""
    lora_scale: float = 1.0
    """strength of a LoRA; 0 is the base model"""
    hybrid: float = 1.0
    """share of the steps, the first ones, that the tuned model makes; the base makes the others"""
    only_base: bool = False
    """leave the checkpoint aside: the base model's pictures by otherwise the same command"""
    steps: int = 50
    """denoising steps"""
    shift: float = 0.0
    """time shift; 0 takes the resolution-dependent shift of FLUX's own inference"""
    seed: int = 617
    """seed of the noise"""
    samples: int = 1
    """pictures per prompt"""
    micro_batch: int = 4
    """pictures that go through the model together"""
    decode_batch: int = 4
    """of these, latents in one pass of the image decoder"""
    threads: int = 0
    """CPU threads per process; 0 leaves torch's choice, or an equal share under torchrun"""
    progress: bool = True
    """show a progress bar"""


def model_config(config: InferenceConfig) -> ModelConfig:
    """What the model family loads; nothing of it is trained."""
    return ModelConfig(**asdict(config.model), gradient_checkpointing=False)


def tuned_steps(config: InferenceConfig) -> int:
    """How many of the steps, the first ones, the tuned model makes."""
    if config.only_base or config.checkpoint is None:
        return 0
    return round(config.hybrid * config.steps)


def check(config: InferenceConfig) -> None:
    """Everything that no type can check, before anything is loaded.

    Raises:
        ValueError: the first knob that cannot work, with the remedy.
    """
    for complaint in _complaints(config):
        raise ValueError(complaint)


_LEAST = {
    "steps": 2,
    "samples": 1,
    "micro_batch": 1,
    "decode_batch": 1,
    "threads": 0,
    "shift": 0,
    "model.text_length": 1,
}


def _complaints(config: InferenceConfig) -> Iterator[str]:
    values = flatten(config)
    for key, bound in _LEAST.items():
        if not values[key] >= bound:
            yield f"{key} is {values[key]}; it must be at least {bound}"
    for side in ("model.height", "model.width"):
        if values[side] < 16 or values[side] % 16:
            yield f"{side} is {values[side]}; it must be a positive multiple of 16"
    if not 0 <= config.hybrid <= 1:
        yield f"hybrid is {config.hybrid}; it is a share of the steps and must lie in [0, 1]"
    if config.checkpoint is not None:
        return
    plain = InferenceConfig()
    for key in ("weights", "lora_scale", "hybrid"):
        if getattr(config, key) != getattr(plain, key):
            yield (
                f"{key} is {getattr(config, key)}, but there are no tuned weights; "
                "set --checkpoint to them"
            )
