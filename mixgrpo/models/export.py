"""From a checkpoint to what other programs load, by one process, whatever engine saved it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mixgrpo.checkpoint import CheckpointError, Shards, latest, open_saved, verify
from mixgrpo.config import ModelConfig
from mixgrpo.models.registry import EXPORTERS


def export(checkpoint: Path, folder: Path, part: str = "model", model: str = "") -> None:
    """Writes a pipeline folder (full training), or a LoRA's file; no tensor but one is held.

    Args:
        part: ``model``, or ``ema`` for their average.
        model: where the model is that was trained, if not where it was then.

    Raises:
        CheckpointError: the checkpoint is damaged, or something could not be written.
        FileNotFoundError, ValueError: there is no average; the model that was trained is gone.
    """
    saved = open_saved(checkpoint)
    verify(saved, saved.files_of(part))
    shards = Shards(checkpoint)
    shapes = shards.shapes(part)
    if not shapes:
        raise ValueError(f"{checkpoint} holds no average: its run kept none; leave --ema out")
    config = model_config(saved.position.config)
    if model:
        config = replace(config, path=model)
    try:
        EXPORTERS[config.family](folder, config, shapes, partial(shards.tensors, part))
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the trained model {folder} could not be written ({error}); its checkpoint is "
            f"{checkpoint}; free some disk space, then --run.resume true writes the model, as does "
            f"`python -m mixgrpo export {checkpoint} --output FOLDER`"
        ) from error


def model_config(flat: Mapping[str, Any]) -> ModelConfig:
    """The model's knobs out of a saved configuration, dotted path -> value."""
    names = [field.name for field in fields(ModelConfig)]
    return ModelConfig(**{n: flat[f"model.{n}"] for n in names if f"model.{n}" in flat})


def find_checkpoint(source: Path) -> Path:
    """A checkpoint's folder, from itself or from the run that it is the newest of.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: the run's ``latest`` names one that is gone.
    """
    if (source / "state.json").is_file():
        return source
    for root in (source / "checkpoints", source):
        newest = latest(root)
        if newest is not None:
            return newest
    raise FileNotFoundError(
        f"{str(source)!r} is neither a run's folder with a checkpoint nor a checkpoint "
        "(RUN/checkpoints/iteration_N); give one of them"
    )
