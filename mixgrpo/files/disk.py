"""Files that are whole or not there, and folders that one command at a time writes into."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def own_folder(name: str, knob: str) -> Iterator[None]:
    """Makes the folder if it is not there; inside, no other command gets it.

    A new one in which nothing was written goes again with an error.

    The lock ends with the process, however that ends. File systems without locks do without.

    Args:
        knob: the dotted name of the setting that holds ``name``, for the messages.

    Raises:
        ValueError: the name is empty or a file's, or another command has the folder.
        OSError: the folder cannot be made.
    """
    if not name.strip():
        raise ValueError(f"{knob} is empty; name a folder")
    is_new = not os.path.exists(name)
    try:
        os.makedirs(name, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"{knob} is {name!r}, which is or lies under a file; name a folder"
        ) from error
    handle = os.open(name, os.O_RDONLY)
    try:
        _lock(handle, name, knob)
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # where something was written, it stays
                os.rmdir(name)
        raise
    finally:
        os.close(handle)


def _lock(handle: int, name: str, knob: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            raise ValueError(
                f"{knob} is {name!r}, into which another command is writing; wait for it, or "
                "choose another folder"
            ) from error
