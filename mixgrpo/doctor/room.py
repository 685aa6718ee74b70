"""Checks whether the run fits on the device and on the disk."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mixgrpo.config import Config, RewardConfig
from mixgrpo.doctor.devices import memory_of_a_process, processes_here
from mixgrpo.doctor.lines import Line, error, ok, size, warning
from mixgrpo.files.disk import existing
from mixgrpo.models.files import find_weights
from mixgrpo.models.text import TextEncoders
from mixgrpo.planning.device_memory import CONTEXT, DeviceMemory
from mixgrpo.planning.memory import trained_weights, training_memory
from mixgrpo.planning.network import network_of
from mixgrpo.rewards.registry import check_call
from mixgrpo.rewards.weights import NotReadable, parse_dtype, read_heads
from mixgrpo.run.scorable import options_of
from mixgrpo.text.embeddings import read_index, shard_path
from mixgrpo.text.prompts import read_prompts
from mixgrpo.text.stored import preprocess_command

# An estimate above this fraction of the memory is reported as close to the limit.
_CLOSE = 0.9
_LESS = (
    "lower --update.micro_batch, --sampling.micro_batch and --sampling.decode_batch, or use "
    "--model.gradient_checkpointing true, --scoring.placement offload, --text.placement offload, "
    "--model.train lora, or several GPUs with --engine.kind fsdp; python -m mixgrpo plan compares "
    "them"
)
_NAMES = {
    "whole": "gathered or cast",
    "average": "moving average",
    "states": "rollout latents",
    "kept": "update activations",
    "evaluating": "sampling",
    "visiting": "offloaded rewards",
    "text": "text encoders",
    "context": "CUDA context",
}


# ---- memory


def check_memory(config: Config, processes: int) -> Iterator[Line]:
    here = processes_here(processes)
    try:
        needed = memory_needed(config, processes or here, here)
    except (OSError, ValueError, KeyError) as caught:
        text = f"cannot be estimated without the model's files ({type(caught).__name__})"
        yield warning("memory", text, "fix the errors of the model first")
        return
    there, table = memory_of_a_process(processes), _table(needed)
    if there is None:
        yield warning("memory", f"{table}\nthe available memory is unknown", _LESS)
    elif needed.peak > there:
        yield error("memory", f"{table}\nmore than the available {size(there)}", _LESS)
    elif needed.peak > _CLOSE * there:
        yield warning("memory", f"{table}\nclose to the available {size(there)}", _LESS)
    else:
        yield ok("memory", f"{table}\nof the available {size(there)}")


def memory_needed(config: Config, processes: int, here: int) -> DeviceMemory:
    """Memory of each process, with the sizes of rewards taken from their files."""
    found, of_rewards = training_memory(config, processes, here), reward_bytes(config)
    placement = config.scoring.placement
    return replace(
        found,
        rewards=of_rewards if placement == "device" else 0,
        visiting=of_rewards if placement == "offload" else 0,
        context=CONTEXT if torch.cuda.is_available() else 0,
    )


def _table(needed: DeviceMemory) -> str:
    """One row per item that takes memory; the peak is that of the largest phase."""
    rows = [
        f"{_NAMES.get(name, name):<20}{size(count):>10}"
        for name, count in vars(needed).items()
        if count
    ]
    peak = f"{'at the peak':<20}{size(needed.peak):>10}"
    return "\n".join(["estimated for each process:", *rows, peak])


def reward_bytes(config: Config) -> int:
    """Bytes of all reward models whose files can be read; the rewards' check reports the others."""
    return sum(map(_bytes_of_reward, config.rewards.values()))


def _bytes_of_reward(knobs: RewardConfig) -> int:
    options = options_of(knobs)
    try:
        target = check_call(knobs.kind, options)
        if not hasattr(target, "weights_file"):
            return 0
        heads = read_heads(target.weights_file(**options))
    except (OSError, ValueError, NotReadable):
        return 0
    weights = sum(weight.numel() for weight in heads.values())
    return weights * parse_dtype(knobs.options.get("dtype", "float32")).itemsize


# ---- disk


def check_disk(config: Config, processes: int) -> Iterator[Line]:
    try:
        find_weights(Path(config.model.path) / "transformer")
        needed = {Path(config.run.folder): run_bytes(config)}
        if config.text.mode == "embeddings":
            needed[Path(config.text.embeddings)] = missing_embedding_bytes(config)
    except (OSError, ValueError, KeyError) as caught:
        text = f"cannot be estimated without the model's files ({type(caught).__name__})"
        yield warning("disk", text, "fix the errors of the model first")
        return
    disks: dict[int, list[Path]] = defaultdict(list)
    for folder in needed:
        disks[existing(folder).stat().st_dev].append(folder)
    for folders in disks.values():
        yield _compared(config, folders, sum(needed[folder] for folder in folders))


def _compared(config: Config, folders: list[Path], needed: int) -> Line:
    free = shutil.disk_usage(existing(folders[0])).free
    names = " and ".join(map(str, folders))
    text = f"{names}: at most {size(needed)} to write, {size(free)} free"
    if needed <= free:
        return ok("disk", text)
    keep = config.checkpoint.keep
    fewer = "--checkpoint.keep 2" if keep != 1 else "--checkpoint.keep 1"
    remedy = f"free some space, choose folders on a larger disk, or keep fewer: {fewer}"
    if len(folders) == 1 and str(folders[0]) == config.text.embeddings:
        remedy = f"free some space, then run {preprocess_command(config)}"
    return error("disk", text, remedy)


def run_bytes(config: Config) -> int:
    """Bytes of the checkpoints that exist at the same time and of the exported model, minus what
    is already there."""
    total = checkpoint_bytes(config) * kept_checkpoints(config) + exported_bytes(config)
    there = sum(_bytes_in(Path(config.run.folder) / part) for part in ("checkpoints", "model"))
    return max(0, total - there)


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def checkpoint_bytes(config: Config) -> int:
    """Bytes of the trained weights, AdamW's two moments and the moving average."""
    weights = 4 if config.model.weights == "float32" else 2
    moments = 2 if config.update.optimizer == "adamw_8bit" else 8
    return trained_weights(config) * (weights + moments + 4 * bool(config.ema.decay))


def kept_checkpoints(config: Config) -> int:
    """Maximum number of checkpoints at the same time: those kept and the one being written."""
    knobs, iterations = config.checkpoint, config.run.iterations
    written = -(-iterations // knobs.every) if knobs.every else 1
    return min(written, knobs.keep + 1) if knobs.keep else written


def exported_bytes(config: Config) -> int:
    """Bytes of the exported model: a float32 transformer and the base's other parts, or a LoRA."""
    if config.model.train == "lora":
        return trained_weights(config) * 4
    transformer = network_of(config.model).parameters * 4
    folder = Path(config.model.path)
    others = (f for f in folder.rglob("*") if f.is_file() and "transformer" not in f.parts[-2:])
    return transformer + sum(file.stat().st_size for file in others)


def missing_embedding_bytes(config: Config) -> int:
    """Bytes of the embeddings that preprocessing still has to write."""
    folder = Path(config.text.embeddings)
    shards = index.shards if (index := read_index(folder)) is not None else []
    begun = {
        prompt
        for number, shard in enumerate(shards)
        if not shard_path(folder, number).exists()
        for prompt in shard.prompts
    }
    listed = {prompt for shard in shards for prompt in shard.prompts}
    files = {
        "batch.prompts_file": config.batch.prompts_file,
        "validation.prompts_file": config.validation.prompts_file,
    }
    prompts = {p for knob, path in files.items() for p in read_prompts(path, knob).texts}
    missing = len(begun) + len(prompts - listed)
    return missing * TextEncoders.bytes_per_prompt(config.model)
