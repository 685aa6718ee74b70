"""Estimates the GPU memory of sampling from the model's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mixgrpo.inference.config import InferenceConfig
from mixgrpo.models.guidance import Guidance
from mixgrpo.models.registry import family_of
from mixgrpo.planning.decoder import decoder_of
from mixgrpo.planning.memory import gib
from mixgrpo.planning.network import Size, network_of
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
    model, value = config.model, getattr(torch, config.model.compute_dtype).itemsize
    folder, size, network = Path(model.path), Size.of(model), network_of(model)
    parameters = sum(count_parameters(folder / part) for part in family_of(model).weighted)
    passes = Guidance(config.guidance.scale).passes if config.guidance.batched else 1
    evaluation = network.evaluation(size, model.compute_dtype)
    _, channels = network.latent_shape(size)
    decoding = decoder_of(model).activations(
        model.height, model.width, channels, model.compute_dtype
    )
    return Memory(
        weights=parameters * value,
        evaluation=config.micro_batch * passes * evaluation,
        decoding=min(config.decode_batch, config.micro_batch) * decoding,
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
