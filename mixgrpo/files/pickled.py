"""Reads files that ``torch.save`` wrote, such as .bin and .pt files; runs nothing in them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixgrpo.files.forms import TORCH, readable_form
from mixgrpo.files.messages import in_one_line

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "ema", "ema_state_dict", "params")
_DEEPEST = 4  # wrappers around a state dict
_CODE = re.compile(r"(?:GLOBAL |global |class )`?([\w.]+)")


def read_pickled(file: Path, device: str = "cpu") -> dict[str, Any]:
    """Name -> value of the dictionary in a file, without what training programs wrap it in.

    The contents of tensors stay on the disk until they are used, except in TORCH_OLD's format.

    Args:
        device: "meta" reads no contents.

    Raises:
        OSError: the file does not exist or cannot be opened.
        ValueError: the file is damaged, holds something other than a dictionary, or would need
            code to be run.
    """
    try:
        content = torch.load(
            file, weights_only=True, map_location=device, mmap=readable_form(file) == TORCH
        )
    except pickle.UnpicklingError as error:
        code = _CODE.search(str(error))
        what = f"the Python object {code[1]}" if code else "Python objects"
        raise ValueError(
            f"{file} cannot be read as weights alone: it holds {what}, which may run code and is "
            "not loaded; save the model's state_dict() in a file of its own"
        ) from error
    except (
        *(RuntimeError, EOFError, OSError, ValueError),
        *(LookupError, AttributeError, TypeError),
    ) as error:
        raise ValueError(
            f"{file} cannot be read as a PyTorch file ({in_one_line(error)}); download it again, "
            "or save the model's state_dict() with safetensors"
        ) from error
    return _unwrapped(content, file)


def read_state_dict(file: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Like ``read_pickled``, for a dictionary that must hold dense tensors and nothing else."""
    state = read_pickled(file, device)
    if not state or not all(map(is_dense, state.values())):
        raise ValueError(f"{file} holds no state dict (names to dense tensors); check the file")
    if device != "meta" and any(value.is_meta for value in state.values()):
        raise ValueError(f"{file} holds names and shapes without values; save the weights anew")
    return state


def _unwrapped(content: Any, file: Path) -> dict[str, Any]:
    for _ in range(_DEEPEST):
        if not isinstance(content, Mapping):
            raise ValueError(
                f"{file} holds a {type(content).__name__}, not a state dict (names to tensors); "
                "check the file"
            )
        found = [key for key in _WRAPPERS if isinstance(content.get(key), Mapping) and content[key]]
        if len(found) > 1:
            raise ValueError(
                f"{file} holds several sets of weights ({', '.join(found)}); save one of them alone"
            )
        if not found and all(isinstance(key, str) for key in content):
            return dict(content)
        if not found:
            break
        content = content[found[0]]
    raise ValueError(f"{file} holds no state dict (names to dense tensors); check the file")


def is_dense(value: Any) -> bool:
    """Whether this is a tensor with all its elements one after the other."""
    return isinstance(value, Tensor) and value.layout == torch.strided
