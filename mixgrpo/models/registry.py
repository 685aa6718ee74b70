"""The registry of model families."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mixgrpo.files.json_files import read_settings

if TYPE_CHECKING:
    from mixgrpo.models.family import Family


class Entry(NamedTuple):
    """A family, and the class of the transformer in ``model_index.json`` that it is known by."""

    transformer: str
    place: str


# Families are imported when they are asked for: it takes seconds, and commands that load no model
# do without.
FAMILIES = {
    "flux": Entry("FluxTransformer2DModel", "mixgrpo.models.flux:FLUX"),
    "qwen_image": Entry("QwenImageTransformer2DModel", "mixgrpo.models.qwen_image:QWEN_IMAGE"),
}


class Named(Protocol):
    """The knobs that tell which family a model is of."""

    family: str
    path: str


def family_of(config: Named, missing: str | None = None) -> Family:
    """The family of a model.

    Args:
        missing: the name of the family if it is ``auto`` and there is no model folder.

    Raises:
        FileNotFoundError: the family is ``auto``, there is no model folder, and nothing is
            ``missing``.
        ValueError: the family is not known, or is not that of the folder.
    """
    return find_family(name_of(config, missing))


def find_family(name: str) -> Family:
    """The family of this name. Raises KeyError if there is none."""
    module, _, variable = FAMILIES[name].place.partition(":")
    family: Family = getattr(importlib.import_module(module), variable)
    return family


def other_families(family: Family) -> list[Family]:
    """All families but this one."""
    return [find_family(name) for name in FAMILIES if name != family.name]


def name_of(config: Named, missing: str | None = None) -> str:
    """The name of a model's family; raises the errors of ``family_of``."""
    known = ", ".join(FAMILIES)
    if config.family not in ("auto", *FAMILIES):
        raise ValueError(f"model.family is {config.family!r}; set it to one of auto, {known}")
    index = Path(config.path) / "model_index.json"
    if not index.exists():
        missing = missing if config.family == "auto" else config.family
        if missing is not None:
            return missing
        absent = index if index.parent.exists() else index.parent
        raise FileNotFoundError(
            f"model.path is {config.path!r}, but {str(absent)!r} does not exist; set --model.path "
            "to a diffusers pipeline folder"
        )
    try:
        content = read_settings(index)
    except ValueError as error:
        raise ValueError(
            f"the model in {config.path!r} (model.path) cannot be used: {error}"
        ) from error
    found = _named_by(content)
    if config.family == "auto":
        if found is not None:
            return found
        raise ValueError(
            f"the model in {config.path!r} (model.path) cannot be used: {index} describes a "
            f"{content.get('_class_name')}, which is none of the known families ({known}); set "
            "--model.path to a folder of one of them"
        )
    if found not in (None, config.family):
        raise ValueError(
            f"model.family is {config.family!r}, but {config.path!r} (model.path) is a model of "
            f"the family {found!r}; set --model.family auto, or --model.path to another folder"
        )
    return config.family


def _named_by(index: Mapping[str, object]) -> str | None:
    """The family whose transformer this content of model_index.json names; None if none is."""
    for name, entry in FAMILIES.items():
        if index.get("transformer") == ["diffusers", entry.transformer]:
            return name
    return None
