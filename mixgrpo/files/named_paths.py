"""Strings that may be paths, and paths with optional names: ``PATH`` or ``NAME=PATH``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mixgrpo.files.home import expand_home


def find_path(text: str) -> Path | None:
    """The existing file or folder that a string names; None if there is none.

    Any string may be given: also text that is too long for a name, or contains NUL.
    """
    try:
        path = Path(expand_home(text))
        return path if text and path.exists() else None
    except (OSError, ValueError):
        return None


def split_name(argument: str) -> tuple[str, Path]:
    """The name, empty if none is given, and the path.

    An existing path may contain "=". A leading ``~`` of the path is the home folder. Raises
    ValueError if the name before "=", or the path, is empty.
    """
    name, equals, path = argument.partition("=")
    if not (path if equals else argument).strip():
        raise ValueError(f"{argument!r} has no path; write NAME=PATH or PATH")
    if not equals or find_path(argument):
        return "", Path(expand_home(argument))
    if not name:
        raise ValueError(f"{argument!r} has no name before '='; write NAME=PATH or PATH")
    return name, Path(expand_home(path))


def check_distinct_names(named: Iterable[tuple[str, Path]]) -> None:
    """Raises ValueError if two paths have the same name; the message shows how to rename one."""
    known: dict[str, Path] = {}
    for name, path in named:
        if name in known:
            raise ValueError(
                f"{known[name]} and {path} are both named {name!r}; give one of them another name: "
                f"NAME={path}"
            )
        known[name] = path
