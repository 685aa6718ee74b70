"""Paths on a command line that may be given names: ``PATH`` or ``NAME=PATH``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def split_name(argument: str) -> tuple[str, Path]:
    """The name, empty where none is given, and the path.

    A path that is there may hold a "=". Raises ValueError if nothing stands before it otherwise.
    """
    name, equals, path = argument.partition("=")
    if not equals or Path(argument).exists():
        return "", Path(argument)
    if not name:
        raise ValueError(f"{argument!r} gives no name; write NAME=PATH or PATH")
    return name, Path(path)


def check_distinct_names(named: Iterable[tuple[str, Path]]) -> None:
    """Raises ValueError if two have one name, with the way to give another."""
    known: dict[str, Path] = {}
    for name, path in named:
        if name in known:
            raise ValueError(
                f"{known[name]} and {path} are both named {name!r}; give one another name: "
                f"NAME={path}"
            )
        known[name] = path
