"""Checks of the options that rewards take from a recipe, where every type of value can arrive."""

from __future__ import annotations

import math
from typing import Any


def number(reward: str, option: str, value: Any) -> float:
    """A finite number. These functions raise ValueError naming reward, option and value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{reward}: {option} must be a number, got {value!r}: correct it")
    return float(value)


def positive(reward: str, option: str, value: Any) -> float:
    """A number above 0."""
    if not number(reward, option, value) > 0:
        raise ValueError(f"{reward}: {option} must be positive, got {value!r}: raise it")
    return float(value)


def whole(reward: str, option: str, value: Any, least: int) -> int:
    """A whole number from ``least`` up."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{reward}: {option} must be a whole number from {least} up, got {value!r}: correct it"
        )
    return value


def text(reward: str, option: str, value: Any) -> str:
    """A text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{reward}: {option} must be a text, got {value!r}: set it")
    return value


def flag(reward: str, option: str, value: Any) -> bool:
    """True or False: a quoted "false" in a recipe would be true."""
    if not isinstance(value, bool):
        raise ValueError(f"{reward}: {option} must be true or false, got {value!r}: correct it")
    return value
