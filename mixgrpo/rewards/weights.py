"""Finds, reads and loads the model folders and checkpoint files of rewards."""

from __future__ import annotations

import json
import pickle
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixgrpo.files.home import expand_home
from mixgrpo.files.weight_files import check_fits, find_shards, read_shapes

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
    folder = Path(expand_home(str(path)))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{reward}: no folder {str(path)!r}; set the reward's `{option}` to the path of the "
            "folder"
        )
    return folder


def require_file(path: str | Path, reward: str, option: str) -> Path:
    file = Path(expand_home(str(path)))
    if not file.is_file():
        raise FileNotFoundError(
            f"{reward}: no file {str(path)!r}; set the reward's `{option}` to its path"
        )
    return file


def find_file(folder: Path, names: tuple[str, ...], reward: str, option: str) -> Path:
    """The first of ``names`` that ``folder`` holds."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"{reward}: folder {str(folder)!r} holds none of {', '.join(names)}; "
        f"set the reward's `{option}` to the right path"
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads name -> tensor on the CPU from a safetensors (by suffix) or PyTorch file.

    Only tensors are unpickled. A dict under the key ``state_dict`` is unwrapped, and the
    ``module.`` prefix of DistributedDataParallel is removed.
    """
    return _state_dict(_read_tensors(path), path)


def _state_dict(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    if isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    state = {str(key).removeprefix("module."): value for key, value in content.items()}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict (names to tensors); check the file")
    return state


class NotReadable(Exception):
    """A file whose tensor names cannot be listed without reading all of it."""


def read_heads(path: Path) -> dict[str, Tensor]:
    """The result of ``read_state_dict`` on the meta device: tensor contents are not read.

    ``path`` may also be the index of several safetensors files.

    Raises:
        ValueError: if the file is damaged or holds no state dict.
        NotReadable: if the file has the format used before PyTorch 1.6.
    """
    if path.suffix in (".safetensors", ".json"):
        return read_shapes(find_shards(path))
    with path.open("rb") as file:
        beginning = file.read(2)
    if beginning and beginning != b"PK":
        raise NotReadable(f"{path} has the format used before PyTorch 1.6")
    return _state_dict(_unpickled(path, mmap=True, map_location="meta"), path)


def _read_tensors(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        return _unpickled(path, map_location="cpu")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(
        f"{path} cannot be read as a checkpoint ({reason}); it may be truncated: fetch it again"
    )


def _unpickled(path: Path, **how: Any) -> Mapping[str, Any]:
    try:
        content = torch.load(path, weights_only=True, **how)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise _damaged(path, error) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy ``state``, read from ``path``, into ``module``; see ``check_fits``."""
    check_fits(module.state_dict(), state, path)
    module.load_state_dict(state)
