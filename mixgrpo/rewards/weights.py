"""Finds, reads and loads the model folders and checkpoint files of rewards."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixgrpo.files.forms import TORCH_OLD, readable_form
from mixgrpo.files.messages import in_one_line
from mixgrpo.files.named_paths import find_path
from mixgrpo.files.regular import MIB, check_regular
from mixgrpo.files.tokenizers import load_tokenizer
from mixgrpo.files.weight_files import (
    check_finite,
    check_fits,
    plain_names,
    read_shapes,
    read_tensors,
)
from mixgrpo.files.weight_sets import find_shards

_LARGEST_JSON = 16 * MIB
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of a reward's weights and activations; scores are always float32."""
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


_ON_THE_CPU: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = weakref.WeakKeyDictionary()


def move_frozen(module: nn.Module, device: torch.device) -> None:
    """Moves a module whose weights never change.

    Its tensors on the CPU are kept, so that moving back drops the device's copies without copying
    them: rewards that only visit a GPU do so twice in every iteration.
    """
    kept = _ON_THE_CPU.setdefault(module, {})
    moved: dict[int, Tensor] = {}  # by the identity of what was moved: shared tensors stay shared
    for path, part in module.named_modules():
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                place = f"{path}.{name}"
                if tensor.device.type == "cpu":
                    kept[place] = tensor
                if device.type == "cpu" and place in kept:
                    own[name] = kept[place]
                    continue
                if id(tensor) not in moved:
                    moved[id(tensor)] = _moved(tensor, device)
                own[name] = moved[id(tensor)]


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    copied = tensor.detach().to(device)
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def require_folder(path: str | Path, reward: str, option: str) -> Path:
    folder = find_path(str(path))
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(
            f"{reward}: no folder {str(path)!r}; set the reward's `{option}` to the path of the "
            "folder"
        )
    return folder


def require_file(path: str | Path, reward: str, option: str) -> Path:
    file = find_path(str(path))
    if file is not None:
        check_regular(file)
        return file
    if os.path.islink(path):  # whoever reads it says where it leads
        return Path(path)
    raise FileNotFoundError(
        f"{reward}: no file {str(path)!r}; set the reward's `{option}` to its path"
    )


def find_file(folder: Path, names: tuple[str, ...], reward: str, option: str) -> Path:
    """The first of ``names`` that ``folder`` holds."""
    for name in names:
        if (folder / name).exists() or (folder / name).is_symlink():
            return folder / name
    raise FileNotFoundError(
        f"{reward}: folder {str(folder)!r} holds none of {', '.join(names)}; "
        f"set the reward's `{option}` to the right path"
    )


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads name -> tensor on the CPU from a file, several shards, or their index.

    Only tensors are unpickled; see ``mixgrpo.files.weight_files`` for the forms that are read.

    Raises:
        OSError: if a file does not exist or cannot be opened.
        ValueError: if the file is damaged or holds no state dict.
    """
    return read_tensors(_files(path))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        check_regular(path)
    return find_shards(path)


class NotReadable(Exception):
    """A file whose tensor names cannot be listed without reading all of it."""


def read_heads(path: Path) -> dict[str, Tensor]:
    """The result of ``read_state_dict`` on the meta device: tensor contents are not read.

    Raises:
        OSError: if a file does not exist or cannot be opened.
        ValueError: if the file is damaged or holds no state dict.
        NotReadable: if the file has the format used before PyTorch 1.6.
    """
    files = _files(path)
    for file in files:
        if readable_form(file) == TORCH_OLD:
            raise NotReadable(f"{file} has the format used before PyTorch 1.6")
    return plain_names(read_shapes(files))


def read_tokenizer(
    load: Callable[[], Any], folder: Path, rows: int, reward: str, option: str
) -> Any:
    """Loads a tokenizer by ``load_tokenizer``.

    Args:
        option: the reward's option that sets the folder, for messages.

    Raises:
        ValueError: it cannot be read, or has more or far fewer tokens than the embedding.
    """
    try:
        return load_tokenizer(load, folder, rows)
    except ValueError as error:
        raise ValueError(
            f"{reward}: {error}; set the reward's `{option}` to the folder of the model's own "
            "tokenizer"
        ) from error


def check_pixels(
    pixels: Callable[[Tensor], Tensor], size: tuple[int, int], reward: str, path: Path
) -> None:
    """Tries a preprocessing on an empty image.

    Args:
        size: (height, width) of the model's input.
        path: the file with its settings, for messages.

    Raises:
        ValueError: it fails, or its images have another size.
    """
    try:
        found = tuple(pixels(torch.zeros(1, 3, 16, 16)).shape[-2:])
    except Exception as error:  # whatever wrong settings lead to
        raise ValueError(
            f"{reward}: the settings in {path} cannot be used ({in_one_line(error)}); fetch "
            "the file again"
        ) from error
    if found != size:
        raise ValueError(
            f"{reward}: the settings in {path} make images of {found[0]}x{found[1]}, but the model "
            f"takes {size[0]}x{size[1]}; fetch the file again"
        )


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Copies ``state``, read from ``path``, into ``module``.

    Raises:
        ValueError: names or shapes differ, or a weight is not finite.
    """
    check_fits(module.state_dict(), state, path)
    module.load_state_dict(state)
    check_finite(module, path)
