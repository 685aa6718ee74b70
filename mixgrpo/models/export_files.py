"""Writes trained weights in a format that other programs load, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mixgrpo.config import ModelConfig
from mixgrpo.files.disk import write_text_whole, write_whole
from mixgrpo.files.forms import SAFETENSORS
from mixgrpo.files.json_files import read_settings
from mixgrpo.files.weight_files import check_fits, open_slices, read_shapes, write_streamed
from mixgrpo.files.weight_sets import WeightSet, without_variant
from mixgrpo.models.adapters import adapted_layers
from mixgrpo.models.files import find_part
from mixgrpo.models.folder import check_folder, require_parts
from mixgrpo.models.lora import fold
from mixgrpo.models.lora_files import LORA_NAMES
from mixgrpo.models.lora_settings import HEADER
from mixgrpo.models.registry import family_of
from mixgrpo.models.stored import empty_transformer

Read = Callable[[Iterable[str]], Iterable[Tensor]]


def export_weights(
    folder: Path, config: ModelConfig, shapes: Mapping[str, Tensor], read: Read
) -> None:
    """Writes a pipeline folder (full training), or ``pytorch_lora_weights.safetensors`` (LoRA).

    The folder's weights have names without a variant, which readers would have to be told.

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
    transformer = read_settings(Path(config.path) / "transformer" / "config.json")
    targets = adapted_layers(family_of(config), config.lora_targets, transformer)
    settings = {
        "transformer.r": config.lora_rank,
        "transformer.lora_alpha": config.lora_rank,
        "transformer.target_modules": targets,
    }
    header = {"format": "pt", HEADER: json.dumps(settings, indent=2, sort_keys=True)}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / LORA_NAMES[0], lambda path: save_file(state, path, metadata=header))


def _export_pipeline(
    folder: Path, config: ModelConfig, shapes: Mapping[str, Tensor], read: Read
) -> None:
    family = family_of(config)
    require_parts(config.path, family.parts)
    source, target = Path(config.path), folder / "transformer"
    weights = find_part(source / "transformer")
    base, settings = read_shapes(weights.files()), read_settings(source / "transformer/config.json")
    # Buffers, and weights that no prediction depends on, are not trained.
    trained = {
        name
        for name, _ in empty_transformer(family, config.path, torch.float32).named_parameters()
        if family.uses(name, settings)
    }
    check_fits({n: s for n, s in base.items() if n in trained}, shapes, source)
    check_folder(family, source)  # its other parts are copied
    target.mkdir(parents=True, exist_ok=True)
    written = {}
    for file, name in _names(weights).items():
        written[name] = {key: shapes.get(key, shape) for key, shape in read_shapes([file]).items()}
        tensors = _with_untrained(written[name], shapes, read, file)
        write_whole(target / name, partial(write_streamed, shapes=written[name], tensors=tensors))
    _write_index(target, weights.stem, written)
    shutil.copy2(source / "transformer" / "config.json", target / "config.json")
    shutil.copy2(source / "model_index.json", folder / "model_index.json")
    for part in family.parts:
        if part != "transformer":
            _copy_part(source / part, folder / part, part in family.weighted)


def _with_untrained(
    names: Iterable[str], trained: Container[str], read: Read, base: Path
) -> Iterator[Tensor]:
    """The weights of these names, in order; those not trained as the base's file has them."""
    tensors = iter(read([name for name in names if name in trained]))
    slices = open_slices([base])
    for name in names:
        yield next(tensors) if name in trained else slices[name][:]


def _copy_part(source: Path, target: Path, weighted: bool) -> None:
    """Copies a part instead of linking it: changes to it must not affect the base model."""
    weights = find_part(source) if weighted else None
    if weights is None or not weights.variant:
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    renamed = [file.name for file in (*weights.files(), weights.index) if file]
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=lambda *_: renamed)
    for file, name in _names(weights).items():
        shutil.copy2(file, target / name)
    copied = {name: read_shapes([target / name]) for name in _names(weights).values()}
    _write_index(target, weights.stem, copied)


def _names(weights: WeightSet) -> dict[Path, str]:
    """File -> its name in an export."""
    files = weights.files()
    if len(files) == 1:
        return {files[0]: f"{weights.stem}.{weights.suffix}"}
    return {file: without_variant(file.name) for file in files}


def _write_index(folder: Path, stem: str, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes the index of several files, name -> the shapes of its tensors."""
    if len(files) == 1:
        return
    shapes = [shape for inside in files.values() for shape in inside.values()]
    size = sum(shape.numel() * shape.element_size() for shape in shapes)
    places = {name: file for file, inside in files.items() for name in inside}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    write_text_whole(folder / f"{stem}.{SAFETENSORS}.index.json", json.dumps(index, indent=2))
