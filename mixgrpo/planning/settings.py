"""The configurations of a model's parts, and the parts without memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mixgrpo.files.json_files import read_settings
from mixgrpo.files.messages import in_one_line
from mixgrpo.models.family import Family
from mixgrpo.models.registry import Named, family_of

Model = Named
"""The knobs that tell which model is planned."""


def family_for(model: Model) -> Family:
    """The family of a model; FLUX if it is ``auto`` and there is no model folder.

    Raises:
        OSError, ValueError: the folder is of no family, or the family is not known.
    """
    return family_of(model, missing="flux")


def has_files(model: Model) -> bool:
    """Whether there is a model folder with a transformer."""
    return _path(model, "transformer").is_file()


def settings_of(model: Model, part: str) -> Mapping[str, Any]:
    """The configuration of the transformer or the VAE, as published if there is none.

    Raises:
        OSError, ValueError: it cannot be read, or is that of another family.
    """
    family, path = family_for(model), _path(model, part)
    if not path.is_file():
        return family.published.settings[part]
    settings = read_settings(path)
    wanted = family.weighted[part][0].__name__
    if (found := settings.get("_class_name", wanted)) != wanted:
        raise ValueError(
            f"{path} is the configuration of a {found}, but {family.title} has a {wanted}; set "
            "--model.path to a folder of that family, or --model.family to another one"
        )
    return settings


def make_part(family: Family, part: str, settings: Mapping[str, Any]) -> Any:
    """The transformer or the VAE on the meta device.

    Raises:
        ValueError: none can be made from these settings.
    """
    from mixgrpo.models.files import quiet  # imports diffusers, which takes seconds

    try:
        with quiet(), torch.device("meta"):
            return family.weighted[part][0].from_config(settings)
    except Exception as error:  # whatever a library raises for a wrong value
        raise cannot_be(part, error) from error


def cannot_be(part: str, error: Exception) -> ValueError:
    """The error for settings of a part that cannot be used."""
    return ValueError(
        f"{part}/config.json of the model (model.path) cannot be used ({in_one_line(error)}); "
        "fetch it again"
    )


def _path(model: Model, part: str) -> Path:
    return Path(model.path) / part / "config.json"
