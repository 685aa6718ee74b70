"""Files that are whole or not there, whatever kills the process that writes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

PARTIAL = "partial_"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` make a file under another name, flushes it, and only then names it ``path``.

    Raises:
        OSError: it could not be written; what was there before is untouched.
    """
    partial = path.with_name(PARTIAL + path.name)
    try:
        write(partial)
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Until the disk has it, a rename may survive a crash that the contents do not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
