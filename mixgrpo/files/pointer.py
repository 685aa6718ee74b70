"""Files such as ``latest``, which hold the name of something in the same folder."""

from __future__ import annotations

from pathlib import Path

from mixgrpo.files.regular import MIB, read_regular


def is_plain_name(name: object) -> bool:
    """Whether this is the name of something in a folder, and not a path that leads elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\0"}


def read_pointer(pointer: Path) -> str:
    """The text of the file, without surrounding white space.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not a regular file, or too large.
    """
    return read_regular(pointer, MIB).decode(errors="replace").strip()


def named_by(pointer: Path) -> Path | None:
    """The path beside the file that it names; None if it names none or cannot be read."""
    try:
        name = read_pointer(pointer)
    except (OSError, ValueError):
        return None
    return pointer.parent / name if is_plain_name(name) else None
