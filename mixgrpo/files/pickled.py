"""Reads files that ``torch.save`` wrote, such as .bin and .pt files; code in them is never run."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from mixgrpo.files.regular import check_regular

_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def is_pickled(path: Path) -> bool:
    """Whether the file's name is one of those under which ``torch.save`` is used."""
    return path.suffix.lower() in _SUFFIXES


def read_pickled(path: Path) -> dict[str, Any]:
    """Name -> value of a file's dictionary, or of its entry ``state_dict``; tensors on the CPU.

    Raises:
        OSError: the file does not exist.
        ValueError: the file is damaged, holds something other than a dictionary by names, or would
            need code to be run.
    """
    check_regular(path)
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds something other than tensors, which is not loaded since it might run "
            "code, or is damaged; save its tensors as a .safetensors file"
        ) from error
    except (
        *(RuntimeError, EOFError, OSError, ValueError),
        *(LookupError, AttributeError, TypeError),
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise ValueError(
            f"{path} cannot be read ({reason}); it may be truncated, so download it again"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(
            f"{path} holds no tensors by their names; save them as a .safetensors file"
        )
    return content
