"""How the steps of a model's schedule are spaced."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixgrpo.config import ModelConfig
from mixgrpo.files.json_files import is_number, read_settings
from mixgrpo.maths.schedule import Spacing, dynamic_shift
from mixgrpo.models.registry import family_of

Settings = Mapping[str, Any]
_OTHERS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")


def spacing_of(model: ModelConfig, shift: float, steps: int) -> Spacing:
    """The spacing of ``steps`` denoising steps with this time shift; with 0, the family's own.

    Raises:
        OSError, ValueError: the family is not known, or its scheduler's configuration is damaged.
    """
    if shift:
        return Spacing(shift)
    family = family_of(model, missing="flux")
    path = Path(model.path) / "scheduler" / "scheduler_config.json"
    settings = read_settings(path) if path.is_file() else {}
    return family.spacing(settings, family.tokens(model.height, model.width), steps)


def spacing_from(settings: Settings, tokens: int) -> Spacing:
    """The spacing that the configuration of a FlowMatch scheduler describes.

    Args:
        settings: the whole configuration, with the defaults of its class.
        tokens: latent tokens of an image.

    Raises:
        ValueError: a setting has a value with which there is no schedule, or one of another kind.
    """
    for key in _OTHERS:
        if settings.get(key):
            raise _unusable(key, settings[key], "which spaces the steps in another way")
    terminal = None
    if settings["shift_terminal"]:  # 0 is none, as the scheduler has it
        terminal = _number(settings, "shift_terminal")
        if not 0 < terminal < 1:
            raise _unusable("shift_terminal", terminal, "which is not between 0 and 1")
    return Spacing(_shift(settings, tokens), terminal)


def _shift(settings: Settings, tokens: int) -> float:
    """The time shift of a scheduler's configuration."""
    if not settings["use_dynamic_shifting"]:
        return _positive(settings, "shift")
    fewest, most = (int(_positive(settings, f"{end}_image_seq_len")) for end in ("base", "max"))
    if fewest == most:
        raise _unusable("base_image_seq_len", fewest, "which leaves no range")
    ends = _number(settings, "base_shift"), _number(settings, "max_shift")
    try:
        shift = dynamic_shift(tokens, fewest, most, *ends)
    except OverflowError:
        shift = math.inf
    if 0 < shift < math.inf and settings.get("time_shift_type") == "linear":
        shift = math.log(shift)
    if not 0 < shift < math.inf:
        raise _unusable("max_shift", ends[1], f"which makes the shift {shift:g}")
    return shift


def _positive(settings: Settings, key: str) -> float:
    value = _number(settings, key)
    if value <= 0:
        raise _unusable(key, value, "which is not positive")
    return value


def _number(settings: Settings, key: str) -> float:
    if not is_number(settings[key]):
        raise _unusable(key, settings[key], "which is not a number")
    return float(settings[key])


def _unusable(key: str, value: Any, reason: str) -> ValueError:
    return ValueError(
        f"the configuration of the scheduler has {key} {value!r}, {reason}; fetch the scheduler "
        "again, or set --sampling.shift"
    )
