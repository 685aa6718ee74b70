"""Reading JSON files that others may have written: what has no definite meaning is refused."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from mixgrpo.files.regular import MIB, read_regular

MOST = 256 * MIB
_OF_A_MODEL = 64 * MIB
DEEPEST = 100  # levels of lists and objects; Python's own limit depends on the caller


def read_json(path: Path, most: int = MOST) -> Any:
    """The value in a JSON file of at most ``most`` bytes; its numbers are finite.

    Raises:
        OSError: it does not exist or cannot be read.
        ValueError: it is not a regular file, is larger, or is not valid JSON; the message begins
            with the path, and lacks a remedy.
    """
    content = read_regular(path, most)
    try:
        return parse_json(content.decode("utf-8-sig"))
    except ValueError as error:  # includes UnicodeDecodeError
        raise ValueError(f"{path} is not valid JSON ({error})") from error


def read_object(path: Path, most: int = MOST) -> dict[str, Any]:
    """The object in a JSON file, such as one with settings.

    Raises:
        OSError, ValueError: see ``read_json``; also if the value is not an object.
    """
    content = read_json(path, most)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a file of a downloaded model, such as a config.json of at most 64 MiB.

    Raises:
        OSError, ValueError: see ``read_object``; the message says to fetch the file again.
    """
    try:
        return read_object(path, _OF_A_MODEL)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing; fetch it again") from error
    except ValueError as error:
        raise ValueError(f"{error}; fetch it again") from error


def is_number(value: object) -> bool:
    """Whether the value is a finite number; booleans and integers too large for float are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not valid JSON, nests too deeply, repeats a name within an object, or has
            a number that no float holds.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_distinct,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_whole,
        )
    except RecursionError as error:
        raise ValueError(f"it nests more than {DEEPEST} levels") from error
    _check_depth(value, DEEPEST)
    return value


def _distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {reprlib.repr(name)} occurs twice in one object")
        found[name] = value
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {reprlib.repr(digits)} is too large")
    return value


def _whole(digits: str) -> int:
    _finite(digits)
    return int(digits)


def _check_depth(value: Any, left: int) -> None:
    if not isinstance(value, dict | list):
        return
    if not left:
        raise ValueError(f"it nests more than {DEEPEST} levels")
    for each in value.values() if isinstance(value, dict) else value:
        _check_depth(each, left - 1)
