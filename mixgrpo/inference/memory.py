"""Estimates the GPU memory of sampling from the model's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mixgrpo.inference.config import InferenceConfig
from mixgrpo.models.registry import family_of
from mixgrpo.planning.activations import decoding_bytes, evaluation_bytes
from mixgrpo.planning.device_memory import first_width
from mixgrpo.planning.flux_size import FluxSize
from mixgrpo.planning.memory import gib
from mixgrpo.planning.parts import count_parameters


@dataclass(frozen=True)
class Memory:
    """Estimated memory of sampling, in bytes.

    Attributes:
        weights: weights of all parts of the model.
        evaluation: activations of one model evaluation of ``micro_batch`` images.
        decoding: activations of decoding ``decode_batch`` images.
    """

    weights: int
    evaluation: int
    decoding: int


def estimate(config: InferenceConfig) -> Memory:
    """Computes the estimate from the files of the model folder, without loading it."""
    folder, size = Path(config.model.path), getattr(torch, config.model.compute_dtype).itemsize
    parameters = sum(count_parameters(folder / part) for part in family_of(config.model).weighted)
    pixels = config.model.height * config.model.width
    tokens = pixels // 256 + config.model.text_length
    decoded = min(config.decode_batch, config.micro_batch)
    return Memory(
        weights=parameters * size,
        evaluation=evaluation_bytes(FluxSize.of_folder(folder), tokens, config.micro_batch, size),
        decoding=decoding_bytes(pixels, decoded, first_width(folder), size),
    )


def explain(config: InferenceConfig, total: int) -> str:
    """The message for a GPU of ``total`` bytes on which sampling did not fit."""
    needed, model = estimate(config), config.model
    smaller = " or set --model.compute_dtype bfloat16" if model.compute_dtype == "float32" else ""
    return (
        f"the GPU's {gib(total)} are not enough: sampling needs about {gib(needed.weights)} for "
        f"weights in {model.compute_dtype}, {gib(needed.evaluation)} to evaluate "
        f"{config.micro_batch} images of {model.width}x{model.height} together, and "
        f"{gib(needed.decoding)} to decode "
        f"{min(config.decode_batch, config.micro_batch)}; lower --micro_batch, --decode_batch, "
        f"--model.height and --model.width{smaller}"
    )
