"""Exports a checkpoint, saved by any engine, to a format that other programs load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mixgrpo.checkpoint import CheckpointError, Shards, latest, open_saved, verify
from mixgrpo.config import ModelConfig
from mixgrpo.models.export_files import export_weights


def export(checkpoint: Path, folder: Path, part: str = "model", model: str = "") -> None:
    """Writes a pipeline folder (full training) or a LoRA file; holds one tensor at a time.

    Args:
        part: ``model`` for the trained weights, or ``ema`` for their average.
        model: path of the base model, if it has moved since the training.

    Raises:
        CheckpointError: if the checkpoint is damaged, or a file could not be written.
        FileNotFoundError, ValueError: if there is no average, or the base model is missing.
    """
    saved = open_saved(checkpoint)
    verify(saved, saved.files_of(part))
    shards = Shards(checkpoint)
    shapes = shards.shapes(part)
    if not shapes:
        raise ValueError(
            f"{checkpoint} holds no average, because its run kept none; leave out --ema"
        )
    config = model_config(saved.position.config)
    if model:
        config = replace(config, path=model)
    try:
        export_weights(folder, config, shapes, partial(shards.tensors, part))
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the trained model {folder} could not be written ({error}); its checkpoint is "
            f"{checkpoint}: free some disk space, then write the model with --run.resume true or "
            f"`python -m mixgrpo export {checkpoint} --output FOLDER`"
        ) from error


def model_config(flat: Mapping[str, Any]) -> ModelConfig:
    """The model's knobs in a saved configuration, which maps dotted paths to values."""
    names = [field.name for field in fields(ModelConfig)]
    return ModelConfig(**{n: flat[f"model.{n}"] for n in names if f"model.{n}" in flat})


def find_checkpoint(source: Path) -> Path:
    """Returns ``source`` if it is a checkpoint, else the newest checkpoint of the run ``source``.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if the run's ``latest`` does not name one of its checkpoints.
    """
    if (source / "state.json").is_file():
        return source
    for root in (source / "checkpoints", source):
        try:
            newest = latest(root)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; to export one of them, give its folder") from error
        if newest is not None:
            return newest
    raise FileNotFoundError(
        f"{str(source)!r} is neither a run's folder with a checkpoint nor a checkpoint "
        "(RUN/checkpoints/iteration_N); give one of them"
    )
