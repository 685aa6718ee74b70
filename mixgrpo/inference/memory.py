"""How much GPU memory sampling takes, estimated from the model's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mixgrpo.inference.config import InferenceConfig
from mixgrpo.planning.activations import decoding_bytes, evaluation_bytes
from mixgrpo.planning.device_memory import first_width
from mixgrpo.planning.flux_size import FluxSize
from mixgrpo.planning.memory import count_parameters, gib


@dataclass(frozen=True)
class Memory:
    """Bytes that sampling takes, estimated.

    Attributes:
        weights: of all parts of the model.
        evaluation: activations of one model evaluation of ``micro_batch`` pictures.
        decoding: activations of decoding ``decode_batch`` pictures.
    """

    weights: int
    evaluation: int
    decoding: int


def estimate(config: InferenceConfig) -> Memory:
    """Read off the model folder, without loading it."""
    folder, size = Path(config.model.path), getattr(torch, config.model.compute_dtype).itemsize
    parameters = count_parameters(folder, "*")
    pixels = config.model.height * config.model.width
    tokens = pixels // 256 + config.model.text_length
    decoded = min(config.decode_batch, config.micro_batch)
    return Memory(
        weights=parameters * size,
        evaluation=evaluation_bytes(FluxSize.of_folder(folder), tokens, config.micro_batch, size),
        decoding=decoding_bytes(pixels, decoded, first_width(folder), size),
    )


def explain(config: InferenceConfig, total: int) -> str:
    """One sentence for a GPU of ``total`` bytes that did not suffice."""
    needed, model = estimate(config), config.model
    smaller = " or take --model.compute_dtype bfloat16" if model.compute_dtype == "float32" else ""
    return (
        f"the GPU's {gib(total)} did not suffice: about {gib(needed.weights)} of weights in "
        f"{model.compute_dtype}, {gib(needed.evaluation)} to evaluate {config.micro_batch} "
        f"pictures of {model.width}x{model.height} together, {gib(needed.decoding)} to decode "
        f"{min(config.decode_batch, config.micro_batch)}; lower --micro_batch, --decode_batch, "
        f"--model.height and --model.width{smaller}"
    )
