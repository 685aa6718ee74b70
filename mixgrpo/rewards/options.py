"""Checks of the options of rewards, which come from recipes and may be of any type."""

from __future__ import annotations

import math
from typing import Any

_SHOWN = 100


def number(reward: str, option: str, value: Any, most: float = math.inf) -> float:
    """Requires a finite number whose absolute value is at most ``most``.

    Each function here raises a ValueError that names the reward, the option and the value. An upper
    limit is one that only a mistake exceeds.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        raise ValueError(f"{reward}: {option} must be a finite number, got {shown(value)}")
    if value < -most:
        raise ValueError(f"{reward}: {option} must be at least {-most:.15g}, got {shown(value)}")
    _check_most(reward, option, value, most)
    return float(value)


def positive(reward: str, option: str, value: Any, most: float = math.inf) -> float:
    """Requires a number above 0 and at most ``most``."""
    if not number(reward, option, value) > 0:
        raise ValueError(f"{reward}: {option} must be positive, got {shown(value)}")
    _check_most(reward, option, value, most)
    return float(value)


def whole(reward: str, option: str, value: Any, least: int, most: float = math.inf) -> int:
    """Requires an integer from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{reward}: {option} must be an integer of at least {least}, got {shown(value)}"
        )
    _check_most(reward, option, value, most)
    return value


def text(reward: str, option: str, value: Any) -> str:
    """Requires a string that is not blank and can be sent and printed."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{reward}: {option} must be a non-empty string, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{reward}: {option} must be valid Unicode, but it contains half of a surrogate pair, "
            f"{value[error.start]!r}; remove it"
        ) from error
    return value


def flag(reward: str, option: str, value: Any) -> bool:
    """Requires a bool, because a quoted "false" in a recipe would be truthy."""
    if not isinstance(value, bool):
        raise ValueError(f"{reward}: {option} must be true or false, got {shown(value)}")
    return value


def shown(value: Any) -> str:
    """The value as a message shows it: at most 100 characters."""
    try:
        written = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4300 digits, for example
        return f"a value of type {type(value).__name__} that is too large to show"
    return written if len(written) <= _SHOWN else f"{written[:_SHOWN]}..."


def _check_most(reward: str, option: str, value: float, most: float) -> None:
    if value > most:
        raise ValueError(f"{reward}: {option} must be at most {most:.15g}, got {shown(value)}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False
