"""Paths that begin with ``~``, which a shell expands only at the beginning of a word."""

from __future__ import annotations

import os


def expand_home(path: str) -> str:
    """The path with a leading ``~`` or ``~USER`` replaced by that home folder.

    Raises:
        ValueError: there is no such user, or the path contains a null character.
    """
    if "\0" in path:
        raise ValueError(f"{path!r} contains a null character, which no path can; remove it")
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(
            f"{path!r} names no home folder, since there is no such user; write the path in full, "
            f"or './{path}' for a path in the current folder"
        )
    return expanded
