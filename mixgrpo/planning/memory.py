"""Estimates the memory of training on each GPU from the model's files."""

from __future__ import annotations

import torch

from mixgrpo.config import Config
from mixgrpo.planning.device_memory import DeviceMemory, device_memory
from mixgrpo.planning.network import network_of
from mixgrpo.planning.settings import has_files
from mixgrpo.planning.spread import spread_of


class OutOfMemory(RuntimeError):
    """The GPU ran out of memory; the message lists settings that need less."""


def training_memory(config: Config, processes: int = 1, per_node: int = 1) -> DeviceMemory:
    """Memory of each process with the run's engine; see ``mixgrpo.planning``.

    Computed from the files of the model folder, without loading it.

    Args:
        per_node: processes per machine.

    Raises:
        FileNotFoundError: the model folder contains no transformer.
    """
    if not has_files(config.model):
        raise FileNotFoundError(f"there is no transformer in {config.model.path}")
    return device_memory(config, spread_of(config.engine, processes, per_node), processes)


def trained_weights(config: Config) -> int:
    """Number of trained weights: the transformer's, or r*(in + out) for each adapted layer."""
    return network_of(config.model).counts(config.model)[0]


def explain_training(config: Config, total: int, processes: int = 1, per_node: int = 1) -> str:
    """The message for a GPU of ``total`` bytes on which training did not fit."""
    model, needed = config.model, training_memory(config, processes, per_node)
    full = model.train == "full"
    less = "--update.optimizer adamw_8bit" if config.update.optimizer == "adamw" else ""
    remedy = "train --model.train lora" if full else "lower --model.lora_rank"
    frozen = needed.vae + needed.text
    held = needed.weights + needed.whole + needed.gradients + needed.optimizer
    held += needed.average + needed.reference
    return (
        f"the GPU's {gib(total)} are not enough: the transformer ({model.train}) needs about "
        f"{gib(held)} and the model's other parts {gib(frozen)}, in addition to reward models and "
        "activations; lower --update.micro_batch, --sampling.micro_batch and "
        f"--sampling.decode_batch, set --model.gradient_checkpointing true, --scoring.placement "
        f"offload{less and ', '}{less}, --text.placement offload, shard over several GPUs with "
        "--engine.kind fsdp (--engine.gather evaluation --engine.reduce micro_batch need the "
        f"least memory), or {remedy}; `python -m mixgrpo plan` shows what each saves"
    )


def memory_of(device: torch.device) -> int:
    """Total memory of a GPU in bytes."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
