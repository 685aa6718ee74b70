"""How the steps of a model's schedule are spaced."""

from __future__ import annotations

from pathlib import Path

from mixgrpo.config import ModelConfig
from mixgrpo.files.json_files import read_object
from mixgrpo.maths.schedule import Spacing
from mixgrpo.models.registry import family_of


def spacing_of(model: ModelConfig, shift: float, steps: int) -> Spacing:
    """The spacing of ``steps`` denoising steps with this time shift; with 0, the family's own.

    Raises:
        OSError, ValueError: the family is not known, or its scheduler's configuration is damaged.
    """
    if shift:
        return Spacing(shift)
    family = family_of(model, missing="flux")
    path = Path(model.path) / "scheduler" / "scheduler_config.json"
    settings = read_object(path) if path.is_file() else {}
    return family.spacing(settings, family.tokens(model.height, model.width), steps)
