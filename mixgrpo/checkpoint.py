"""Checkpoints: written whole or not at all, and read back exactly.

A checkpoint is a folder ``iteration_00000025`` with ``weights.safetensors`` (trained weights),
``ema.safetensors``, ``optimizer.pt`` and ``state.json`` (position and configuration). It is
written under another name, flushed, renamed, and only then does ``latest`` name it.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixgrpo.disk import PARTIAL, flush

_NAME_LENGTH = len("iteration_00000000")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to continue.

    Attributes:
        iteration: iterations that are done.
        weights: trained weights by name.
        ema: their averages; empty if none is kept.
        ema_updates: updates that the average has had.
        engine: optimizer and schedule state.
        config: the run's configuration, dotted path -> value.
        kl_weight: of the KL to the reference, which may have been adapted.
    """

    iteration: int
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    ema_updates: int
    engine: dict[str, Any]
    config: dict[str, Any]
    kl_weight: float = 0.0


def save(root: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes the checkpoint under ``root``, points ``latest`` to it, drops all but ``keep``.

    Raises:
        CheckpointError: it could not be written (a full disk, say); what was there is untouched.
    """
    name = _free_name(root, f"iteration_{checkpoint.iteration:08d}")
    partial, final = root / f"{PARTIAL}{name}", root / name
    try:
        root.mkdir(parents=True, exist_ok=True)
        for abandoned in root.glob(f"{PARTIAL}*"):
            shutil.rmtree(abandoned)
        partial.mkdir()
        _write(partial, checkpoint)
        partial.rename(final)
        flush(root)
        _point(root, name)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        newest = latest(root)
        left = f"the newest whole checkpoint is {newest}" if newest else "none was saved before"
        raise CheckpointError(
            f"checkpoint {final} could not be written ({_reason(error)}); {left}; "
            "free some disk space, then continue with --run.resume true"
        ) from error
    _drop_old(root, name, keep)
    return final


def latest(root: Path) -> Path | None:
    """The checkpoint that ``latest`` names; None if nothing has been saved.

    Raises:
        CheckpointError: ``latest`` names a checkpoint that is not there.
    """
    pointer = root / "latest"
    if not pointer.exists():
        return None
    path = root / pointer.read_text().strip()
    if not (path / "state.json").is_file():
        raise CheckpointError(
            f"{pointer} names {path.name!r}, which is not there; write the name of a checkpoint "
            f"folder in {root} into it, or train into another --run.folder"
        )
    return path


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint, tensors on the CPU.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        return Checkpoint(
            iteration=state["iteration"],
            weights=load_file(path / "weights.safetensors"),
            ema=load_file(path / "ema.safetensors"),
            ema_updates=state["ema_updates"],
            engine=torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
            config=state["config"],
            kl_weight=state["kl_weight"],
        )
    except (OSError, RuntimeError, SafetensorError, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({_reason(error)}); to use an older one, write its "
            f"name into {path.parent / 'latest'}"
        ) from error


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    save_file(_on_cpu(checkpoint.weights), folder / "weights.safetensors")
    save_file(_on_cpu(checkpoint.ema), folder / "ema.safetensors")
    torch.save(checkpoint.engine, folder / "optimizer.pt")
    state = {
        "iteration": checkpoint.iteration,
        "ema_updates": checkpoint.ema_updates,
        "config": checkpoint.config,
        "kl_weight": checkpoint.kl_weight,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=1))
    for file in [*folder.iterdir(), folder]:
        flush(file)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _point(root: Path, name: str) -> None:
    pointer = root / "latest.partial"
    pointer.write_text(name + "\n")
    flush(pointer)
    os.replace(pointer, root / "latest")
    flush(root)


def _free_name(root: Path, name: str) -> str:
    """A run that went back may save an iteration again: beside the first, until it is whole."""
    names = itertools.chain([name], (f"{name}_{again}" for again in itertools.count(2)))
    return next(candidate for candidate in names if not (root / candidate).exists())


def _drop_old(root: Path, newest: str, keep: int) -> None:
    """Keeps the ``keep`` newest of those up to ``newest``, one of each iteration.

    Later iterations, left by a run that went back, are not touched until they are saved again.
    """
    iteration = newest[:_NAME_LENGTH]
    upto = sorted(path.name for path in root.glob("iteration_*") if path.name <= newest)
    others = [name for name in upto if name[:_NAME_LENGTH] != iteration]
    replaced = [name for name in upto if name[:_NAME_LENGTH] == iteration and name != newest]
    too_many = others[: len(others) - (keep - 1)] if keep and len(others) > keep - 1 else []
    for name in replaced + too_many:
        shutil.rmtree(root / name, ignore_errors=True)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
