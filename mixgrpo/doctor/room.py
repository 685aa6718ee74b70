"""Room for the run: on the device, and on the disk."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from mixgrpo.assembly import ENCODERS
from mixgrpo.config import Config, RewardConfig
from mixgrpo.doctor.devices import memory_of_a_process
from mixgrpo.doctor.lines import Line, error, ok, size, warning
from mixgrpo.doctor.rewards import options_of
from mixgrpo.memory import TrainingMemory, trained_weights, training_memory
from mixgrpo.models.flux_files import find_weights
from mixgrpo.prompts import read_prompts
from mixgrpo.rewards.registry import check_call
from mixgrpo.rewards.weights import NotReadable, parse_dtype, read_heads
from mixgrpo.text.stored import preprocess_command

# An estimate that leaves less than this share free is called close.
_CLOSE = 0.9
_LESS = (
    "lower --update.micro_batch, --sampling.micro_batch and --sampling.decode_batch; "
    "--model.gradient_checkpointing true; --scoring.placement offload; --text.placement offload; "
    "--model.train lora"
)


# ---- memory


def check_memory(config: Config, processes: int) -> Iterator[Line]:
    try:
        needed = training_memory(config, reward_bytes(config))
    except (OSError, ValueError, KeyError) as caught:
        text = f"cannot be estimated without the model's files ({type(caught).__name__})"
        yield warning("memory", text, "mend the model first")
        return
    there = memory_of_a_process(processes)
    total = needed.held + needed.activations
    if there is None:
        yield warning("memory", f"{_table(needed)}\nwhat there is could not be found out")
    elif needed.held > there:
        yield error("memory", f"{_table(needed)}\nmore than the {size(there)} there are", _LESS)
    elif total > _CLOSE * there:
        yield warning("memory", f"{_table(needed)}\nclose to the {size(there)} there are", _LESS)
    else:
        yield ok("memory", f"{_table(needed)}\nof the {size(there)} there are")


def _table(needed: TrainingMemory) -> str:
    """A row for each thing that takes something."""
    rows = [
        f"{name.replace('_', ' '):<14}{size(count):>10}"
        for name, count in vars(needed).items()
        if count
    ]
    total = f"{'together':<14}{size(needed.held + needed.activations):>10}"
    return "\n".join(["of each process, estimated:", *rows, total])


def reward_bytes(config: Config) -> int:
    """Of all reward models whose files can be read; what is wrong with the others is told there."""
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
        needed = {
            Path(config.run.folder): checkpoint_bytes(config) * kept_checkpoints(config)
            + exported_bytes(config)
        }
        if config.text.mode == "embeddings":
            needed[Path(config.text.embeddings)] = missing_embedding_bytes(config)
    except (OSError, ValueError, KeyError) as caught:
        text = f"cannot be estimated without the model's files ({type(caught).__name__})"
        yield warning("disk", text, "mend the model first")
        return
    disks: dict[int, list[Path]] = defaultdict(list)
    for folder in needed:
        disks[existing(folder).stat().st_dev].append(folder)
    for folders in disks.values():
        yield _compared(config, folders, sum(needed[folder] for folder in folders))


def _compared(config: Config, folders: list[Path], needed: int) -> Line:
    free = shutil.disk_usage(existing(folders[0])).free
    names = " and ".join(map(str, folders))
    text = f"{names}: at most {size(needed)} to be written, {size(free)} free"
    if needed <= free:
        return ok("disk", text)
    keep = config.checkpoint.keep
    fewer = "--checkpoint.keep 2" if keep != 1 else "--checkpoint.keep 1"
    remedy = f"free some space, choose folders on a larger disk, or keep fewer: {fewer}"
    if len(folders) == 1 and str(folders[0]) == config.text.embeddings:
        remedy = f"free some space, then {preprocess_command(config)}"
    return error("disk", text, remedy)


def checkpoint_bytes(config: Config) -> int:
    """Trained weights, AdamW's two moments and the average, all float32."""
    return trained_weights(config) * 4 * (3 + bool(config.ema.decay))


def kept_checkpoints(config: Config) -> int:
    """The most that are there at once: those that are kept, and the one that is being written."""
    knobs, iterations = config.checkpoint, config.run.iterations
    written = -(-iterations // knobs.every) if knobs.every else 1
    return min(written, knobs.keep + 1) if knobs.keep else written


def exported_bytes(config: Config) -> int:
    """The trained model: the base's other parts beside the transformer in float32, or a LoRA."""
    trained = trained_weights(config) * 4
    if config.model.train == "lora":
        return trained
    folder = Path(config.model.path)
    others = (f for f in folder.rglob("*") if f.is_file() and "transformer" not in f.parts[-2:])
    return trained + sum(file.stat().st_size for file in others)


def missing_embedding_bytes(config: Config) -> int:
    """Of the prompts' embeddings, where the folder holds none yet."""
    if (Path(config.text.embeddings) / "index.json").exists():
        return 0
    files = {
        "batch.prompts_file": config.batch.prompts_file,
        "validation.prompts_file": config.validation.prompts_file,
    }
    prompts = {p for knob, path in files.items() for p in read_prompts(path, knob)}
    return len(prompts) * ENCODERS[config.model.family].bytes_per_prompt(config.model)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    whole = path.absolute()
    return next(place for place in (whole, *whole.parents) if place.exists())
