"""Checks of the options of rewards, which come from recipes and may be of any type."""

from __future__ import annotations

import math
from typing import Any


def number(reward: str, option: str, value: Any) -> float:
    """Requires a finite number.

    Each function here raises a ValueError that names the reward, the option and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{reward}: {option} must be a finite number, got {value!r}")
    return float(value)


def positive(reward: str, option: str, value: Any) -> float:
    """Requires a number above 0."""
    if not number(reward, option, value) > 0:
        raise ValueError(f"{reward}: {option} must be positive, got {value!r}")
    return float(value)


def whole(reward: str, option: str, value: Any, least: int) -> int:
    """Requires an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{reward}: {option} must be an integer of at least {least}, got {value!r}"
        )
    return value


def text(reward: str, option: str, value: Any) -> str:
    """Requires a string that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{reward}: {option} must be a non-empty string, got {value!r}")
    return value


def flag(reward: str, option: str, value: Any) -> bool:
    """Requires a bool, because a quoted "false" in a recipe would be truthy."""
    if not isinstance(value, bool):
        raise ValueError(f"{reward}: {option} must be true or false, got {value!r}")
    return value
