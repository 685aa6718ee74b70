"""Compares the weight files of a model folder with what its configurations require.

The libraries fill weights that a file lacks with random numbers, so they never see such a file.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import logging as transformers_logging

from mixgrpo.files.forms import SAFETENSORS
from mixgrpo.files.json_files import read_settings
from mixgrpo.files.messages import in_one_line
from mixgrpo.files.regular import check_regular_files
from mixgrpo.files.weight_files import check_fits, read_shapes
from mixgrpo.files.weight_sets import WeightSet, find_set
from mixgrpo.models.family import Family

T = TypeVar("T")


def check_part(family: Family, folder: Path) -> tuple[list[Path], int]:
    """Returns the weight files of one part of a pipeline folder, and their number of weights.

    Raises:
        FileNotFoundError: if one of the files is missing.
        ValueError: if one is damaged, or a name or shape does not match the part's config.json.
    """
    check_regular_files(folder)
    files = find_weights(folder)
    module = _asked_for(family, folder)
    own, names, as_loaded = module.state_dict(), _twins(module), _renaming(module)
    found = {as_loaded(name): shape for name, shape in read_shapes(files).items()}
    found = {name: shape for name, shape in found.items() if not name.endswith("position_ids")}
    # A tensor with two names is in the file under either of them, or both.
    twins = {name: found[other] for name, other in names.items() if other in found}
    check_fits(own, {**twins, **found}, folder)
    return files, sum(weight.numel() for weight in found.values())


def find_weights(folder: Path) -> list[Path]:
    """Returns the safetensors files of a part; raises the errors of ``find_part``."""
    return find_part(folder).files()


def find_part(folder: Path) -> WeightSet:
    """Returns the safetensors files of a part, under the names that the libraries require.

    Raises:
        FileNotFoundError: if there are none, or one that the index names is missing.
        ValueError: if the index is malformed, or the weights are in another form.
    """
    weights = find_set(folder)
    name = "diffusion_pytorch_model" if folder.name in ("transformer", "vae") else "model"
    files = weights.files()
    if weights.suffix != SAFETENSORS:
        raise ValueError(
            f"{folder} holds {files[0].name}, but a part of a model folder must be stored as "
            "safetensors; save it with save_pretrained(FOLDER, safe_serialization=True)"
        )
    if weights.stem != name:
        raise ValueError(
            f"{folder} holds {files[0].name}, but the weights of this part are called "
            f"{name}.safetensors; rename the file"
        )
    if weights.whole is None and weights.index is None:
        raise FileNotFoundError(
            f"{folder} holds {files[0].name} but no index, {name}.safetensors.index.json; download "
            "it"
        )
    return weights


def check_axes(folder: Path) -> None:
    """Raises OSError, ValueError: the transformer's rotary positions do not fill its heads."""
    path = folder / "transformer" / "config.json"
    config = {"axes_dims_rope": [16, 56, 56], "attention_head_dim": 128, **read_settings(path)}
    axes, width = config["axes_dims_rope"], config["attention_head_dim"]
    # One axis for each column of the positions: an unused one, rows and columns.
    whole = isinstance(axes, list) and len(axes) == 3 and all(type(size) is int for size in axes)
    if not whole or sum(axes) != width or any(size < 1 or size % 2 for size in axes):
        raise ValueError(
            f"{path} has axes_dims_rope {axes!r}, but it must be three even positive numbers whose "
            f"sum is attention_head_dim, {width}; fetch it again"
        )


def part_settings(family: Family, folder: Path) -> dict[str, Any]:
    """The configuration of a part: a text encoder's with the library's defaults for what it lacks.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    content = read_settings(folder / "config.json")
    if family.weighted[folder.name][1] is None:
        return content
    config = _created(partial(_read_config, family.weighted[folder.name][1], folder), folder)
    # Multimodal models have one of their own for the text.
    found: dict[str, Any] = config.get_text_config().to_dict()
    return found


def _read_config(kind: Any, folder: Path) -> PretrainedConfig:
    found: PretrainedConfig = kind.from_pretrained(folder, local_files_only=True)
    return found


def _asked_for(family: Family, folder: Path) -> nn.Module:
    """The part's module on the meta device, which must not be changed."""
    kind, settings = family.weighted[folder.name]
    content = read_settings(folder / "config.json")
    if content.get("quantization_config") is not None:
        raise ValueError(
            f"{folder / 'config.json'} has a quantization_config, but quantised weights cannot be "
            "used; give the weights before quantisation"
        )

    asked = _Asked(kind, settings, json.dumps(content, sort_keys=True), folder)
    return _created(partial(_empty, asked), folder)


@dataclass(frozen=True)
class _Asked:
    """A class of modules, that of its configuration, and the configuration's content."""

    kind: Any
    settings: Any
    content: str
    folder: Path = field(compare=False)


@functools.lru_cache(maxsize=16)  # a folder is checked more than once before it is loaded
def _empty(asked: _Asked) -> nn.Module:
    with torch.device("meta"):
        if asked.settings is None:
            module: nn.Module = asked.kind.from_config(json.loads(asked.content))
        else:
            module = asked.kind(_read_config(asked.settings, asked.folder))
    return module


def _created(create: Callable[[], T], folder: Path) -> T:
    try:
        with quiet():
            return create()
    except Exception as error:  # whatever a library raises for a wrong value
        raise ValueError(
            f"no model can be created from {folder / 'config.json'} ({in_one_line(error)}); fetch "
            "it again"
        ) from error


def _twins(module: nn.Module) -> dict[str, str]:
    """The other name of each tensor that has two."""
    named = dict(module.named_parameters(remove_duplicate=False))
    groups: dict[int, list[str]] = {}
    for name, parameter in named.items():
        groups.setdefault(id(parameter), []).append(name)
    return {
        name: other for names in groups.values() for name in names for other in names
        if name != other
    }  # fmt: skip


def _renaming(module: nn.Module) -> Callable[[str], str]:
    """What a library makes of the names in files, which older versions of it may have written."""
    if not isinstance(module, PreTrainedModel):
        return lambda name: name
    own = module.state_dict()
    renamings = [
        step for step in get_model_conversion_mapping(module) if isinstance(step, WeightRenaming)
    ]
    prefix = module.base_model_prefix
    return lambda name: rename_source_key(name, renamings, [], prefix, own)[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context without the warnings and progress bars of diffusers and transformers."""
    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()
