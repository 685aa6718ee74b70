"""How much GPU memory sampling and training take, by rules of thumb, for when it was not enough."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from mixgrpo.config import Config
from mixgrpo.inference.config import InferenceConfig
from mixgrpo.weight_files import read_shapes

# Values of the transformer's width that live at once for each token, in a single-stream block:
# the residual and its norm, q, k and v, the feed-forward's four before and four after its
# activation, attention's result, and the five that are concatenated; one for copies.
_WIDTHS = 20
# Feature maps at full size that live at once in the decoder's last block: input, norm, activation,
# convolution's result and its workspace, each of twice the decoder's first width.
_MAPS = 5


class OutOfMemory(RuntimeError):
    """The GPU's memory did not suffice; the message says what would take less."""


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
    parameters = _parameters(folder, "*")
    transformer = json.loads((folder / "transformer" / "config.json").read_text())
    decoder = json.loads((folder / "vae" / "config.json").read_text())
    pixels = config.model.height * config.model.width
    tokens = pixels // 256 + config.model.text_length
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    maps = _MAPS * 2 * decoder["block_out_channels"][0]
    return Memory(
        weights=parameters * size,
        evaluation=config.micro_batch * tokens * width * _WIDTHS * size,
        decoding=min(config.decode_batch, config.micro_batch) * pixels * maps * size,
    )


def explain(config: InferenceConfig, total: int) -> str:
    """One sentence for a GPU of ``total`` bytes that did not suffice."""
    needed, model = estimate(config), config.model
    smaller = " or take --model.compute_dtype bfloat16" if model.compute_dtype == "float32" else ""
    return (
        f"the GPU's {_gib(total)} did not suffice: about {_gib(needed.weights)} of weights in "
        f"{model.compute_dtype}, {_gib(needed.evaluation)} to evaluate {config.micro_batch} "
        f"pictures of {model.width}x{model.height} together, {_gib(needed.decoding)} to decode "
        f"{min(config.decode_batch, config.micro_batch)}; lower --micro_batch, --decode_batch, "
        f"--model.height and --model.width{smaller}"
    )


def explain_training(config: Config, total: int) -> str:
    """One sentence for a GPU of ``total`` bytes on which training did not fit.

    Held all the time, for each trained weight: float32 weight, gradient, AdamW's two moments, the
    average if there is one, and the frozen copy if there is a KL.
    """
    model, folder = config.model, Path(config.model.path)
    transformer, size = (
        _parameters(folder, "transformer"),
        getattr(torch, model.compute_dtype).itemsize,
    )
    if model.train == "full":
        copies = 4 + bool(config.ema.decay) + bool(config.update.kl)
        held, remedy = transformer * 4 * copies, "train --model.train lora"
    else:
        held, remedy = transformer * size, "lower --model.lora_rank"
    frozen = _parameters(folder, "vae") * size
    if config.text.mode == "online" and config.text.placement == "device":
        frozen += _parameters(folder, "text_encoder*") * size
    return (
        f"the GPU's {_gib(total)} did not suffice: about {_gib(held)} are held for the transformer "
        f"({model.train}) and {_gib(frozen)} for the model's other parts, reward models and "
        "activations come on top; lower --update.micro_batch, --sampling.micro_batch and "
        f"--sampling.decode_batch, set --model.gradient_checkpointing true, --scoring.placement "
        f"offload and --text.placement offload, shard over several GPUs with --engine.kind fsdp "
        f"(--engine.gather evaluation --engine.reduce micro_batch take the least), or {remedy}"
    )


def _parameters(folder: Path, part: str) -> int:
    """Counted in the headers of a part's weight files."""
    return sum(
        weight.numel()
        for file in folder.glob(f"{part}/*.safetensors")
        for weight in read_shapes([file]).values()
    )


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
