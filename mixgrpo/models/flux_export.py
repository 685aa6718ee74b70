"""Writes trained FLUX weights in a format that other programs load, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mixgrpo.config import ModelConfig
from mixgrpo.files.disk import write_text_whole, write_whole
from mixgrpo.files.weight_files import NAME, check_fits, find_shards, read_shapes, write_streamed
from mixgrpo.models.flux import LORA_TARGETS, PARTS
from mixgrpo.models.flux_folder import check_folder
from mixgrpo.models.flux_text import require_parts
from mixgrpo.models.lora import fold
from mixgrpo.models.lora_files import LORA_NAMES
from mixgrpo.models.lora_settings import HEADER

Read = Callable[[Iterable[str]], Iterable[Tensor]]


def export_flux(
    folder: Path, config: ModelConfig, shapes: Mapping[str, Tensor], read: Read
) -> None:
    """Writes a pipeline folder (full training), or ``pytorch_lora_weights.safetensors`` (LoRA).

    Args:
        shapes: the shapes of the trained weights, by their names in training.
        read: reads the weights with these names, on the CPU.

    Raises:
        FileNotFoundError, ValueError: if the base model is missing, or is a different model.
        OSError, SafetensorError: if a file could not be written.
    """
    if config.train == "lora":
        _export_adapters(folder, config, dict(zip(shapes, read(shapes), strict=True)))
    else:
        _export_pipeline(folder, config, shapes, read)


def _export_adapters(folder: Path, config: ModelConfig, adapters: Mapping[str, Tensor]) -> None:
    """Writes adapters of strength 1: not every program reads an alpha where diffusers puts it."""
    scale = config.lora_alpha / config.lora_rank
    state = {}
    for name, weight in adapters.items():
        key = "transformer." + name.replace(".default.weight", ".weight")
        state[key] = (fold(weight, scale) if ".lora_B." in name else weight).contiguous()
    settings = {
        "transformer.r": config.lora_rank,
        "transformer.lora_alpha": config.lora_rank,
        "transformer.target_modules": LORA_TARGETS[config.lora_targets],
    }
    header = {"format": "pt", HEADER: json.dumps(settings, indent=2, sort_keys=True)}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / LORA_NAMES[0], lambda path: save_file(state, path, metadata=header))


def _export_pipeline(
    folder: Path, config: ModelConfig, shapes: Mapping[str, Tensor], read: Read
) -> None:
    require_parts(config.path, PARTS)
    source = Path(config.path)
    files = find_shards(source / "transformer")
    check_fits(read_shapes(files), shapes, source)
    check_folder(source)  # its other parts are copied
    (folder / "transformer").mkdir(parents=True, exist_ok=True)
    for file in files:
        inside = {name: shapes[name] for name in read_shapes([file])}
        target = folder / "transformer" / file.name
        write_whole(target, partial(write_streamed, shapes=inside, tensors=read(inside)))
    _write_index(source / "transformer", folder / "transformer", shapes)
    shutil.copy2(source / "transformer" / "config.json", folder / "transformer" / "config.json")
    shutil.copy2(source / "model_index.json", folder / "model_index.json")
    for part in PARTS:
        if part != "transformer":
            # Copied, not linked: changes to the copy must not affect the base model.
            shutil.copytree(source / part, folder / part, dirs_exist_ok=True)


def _write_index(source: Path, folder: Path, shapes: Mapping[str, Tensor]) -> None:
    """Copies the index with a new total size: the dtype may differ from the base model's."""
    index = source / f"{NAME}.index.json"
    if not index.exists():
        return
    content = json.loads(index.read_text(encoding="utf-8"))
    size = sum(shape.numel() * shape.element_size() for shape in shapes.values())
    content["metadata"] = {**content.get("metadata", {}), "total_size": size}
    text = json.dumps(content, indent=2)
    write_text_whole(folder / index.name, text)
