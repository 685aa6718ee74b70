"""How much memory sampling and training take, by rules of thumb."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from mixgrpo.config import Config
from mixgrpo.inference.config import InferenceConfig
from mixgrpo.models.flux import LORA_TARGETS
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


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a process takes to train with the whole model on its device, estimated.

    Attributes:
        weights: of the transformer, and of the adapters.
        gradients: of the trained weights.
        optimizer: AdamW's two moments.
        ema: the average; 0 without one.
        reference: the frozen copy for the KL; 0 without one.
        rewards: their models, where they stay on the device.
        text_encoders: both, where they stay on the device.
        vae: the decoder and its encoder.
        activations: the most that the rollout, the decoding or the update take at once.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    reference: int
    rewards: int
    text_encoders: int
    vae: int
    activations: int

    @property
    def held(self) -> int:
        """All the time, whatever the batches."""
        return sum(vars(self).values()) - self.activations


def training_memory(config: Config, rewards: int) -> TrainingMemory:
    """Read off the model folder, without loading it.

    Args:
        rewards: bytes of the reward models.
    """
    model, folder = config.model, Path(config.model.path)
    size = getattr(torch, model.compute_dtype).itemsize
    transformer, trained = _parameters(folder, "transformer"), trained_weights(config)
    full = model.train == "full"
    encoders = config.text.mode == "online" and config.text.placement == "device"
    return TrainingMemory(
        weights=transformer * 4 if full else transformer * size + trained * 4,
        gradients=trained * 4,
        optimizer=trained * 8,
        ema=trained * 4 * bool(config.ema.decay),
        reference=transformer * 4 * (full and config.update.kl > 0),
        rewards=rewards * (config.scoring.placement == "device"),
        text_encoders=_parameters(folder, "text_encoder*") * size * encoders,
        vae=_parameters(folder, "vae") * size,
        activations=_training_activations(config),
    )


def trained_weights(config: Config) -> int:
    """How many weights a run trains: the transformer's, or r*(in + out) for each adapted layer."""
    folder, model = Path(config.model.path), config.model
    if model.train == "full":
        return _parameters(folder, "transformer")
    shapes = read_shapes(folder.glob("transformer/*.safetensors"))
    layers = re.compile(LORA_TARGETS[model.lora_targets] + r"\.weight")
    return sum(
        model.lora_rank * sum(w.shape) for name, w in shapes.items() if layers.fullmatch(name)
    )


def _training_activations(config: Config) -> int:
    """The largest of what the rollout's, the decoder's and the update's passes take.

    The update keeps what each block needs for its gradient; with gradient checkpointing just each
    block's input, and one block at a time is computed again, with its gradients beside.
    """
    model, folder = config.model, Path(config.model.path)
    size = getattr(torch, model.compute_dtype).itemsize
    transformer = json.loads((folder / "transformer" / "config.json").read_text())
    decoder = json.loads((folder / "vae" / "config.json").read_text())
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    blocks = transformer["num_layers"] + transformer["num_single_layers"]
    pixels = model.height * model.width
    token = width * size * (pixels // 256 + model.text_length)  # a value of the width, all tokens
    kept = blocks + 2 * _WIDTHS if model.gradient_checkpointing else (blocks + 1) * _WIDTHS
    sampling, group = config.sampling, config.batch.prompts * config.batch.samples
    maps = _MAPS * 2 * decoder["block_out_channels"][0] * pixels * size
    return max(
        min(config.update.micro_batch, group) * token * kept,
        min(sampling.micro_batch, group) * token * _WIDTHS,
        min(sampling.decode_batch, group) * maps,
    )


def explain_training(config: Config, total: int) -> str:
    """One sentence for a GPU of ``total`` bytes on which training did not fit.

    The rewards, whose sizes are not looked up here, are left out.
    """
    model, needed = config.model, training_memory(config, rewards=0)
    full = model.train == "full"
    remedy = "train --model.train lora" if full else "lower --model.lora_rank"
    frozen = needed.vae + needed.text_encoders
    held = needed.held - frozen
    return (
        f"the GPU's {_gib(total)} did not suffice: about {_gib(held)} are held for the transformer "
        f"({model.train}) and {_gib(frozen)} for the model's other parts, reward models and "
        "activations come on top; lower --update.micro_batch, --sampling.micro_batch and "
        f"--sampling.decode_batch, set --model.gradient_checkpointing true, --scoring.placement "
        f"offload and --text.placement offload, or {remedy}"
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
