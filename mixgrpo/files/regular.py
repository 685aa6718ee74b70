"""Reading files that a configuration or another file names: regular files only, up to a size.

Opening a FIFO waits for a writer, and a device such as /dev/zero never ends.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}
MIB = 2**20


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading in binary mode.

    Raises:
        OSError: it does not exist or cannot be opened.
        ValueError: it is not a regular file, or a link to one.
    """
    check_regular(path)
    # It may be exchanged for a FIFO between the two calls.
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def check_regular(path: Path) -> None:
    """Raises ValueError if the path is something other than a regular file; it must exist."""
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind != stat.S_IFREG:
        raise ValueError(f"{path} is {_KINDS.get(kind, 'no regular file')}, not a regular file")


def check_regular_files(folder: Path) -> None:
    """Raises ValueError if it is not a folder, or something in it is neither file nor folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; fetch it again")
    for entry in folder.iterdir():
        if entry.exists() and not entry.is_dir():
            check_regular(entry)


def read_regular(path: Path, most: int) -> bytes:
    """The contents of a file of at most ``most`` bytes.

    Raises:
        OSError: it does not exist or cannot be read.
        ValueError: it is not a regular file, or is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            # Not read(most + 1), which allocates that much before it reads.
            content = b"" if size > most else file.read(min(most, size + MIB) + 1)
        except OSError as error:  # which names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
    if max(size, len(content)) > most:
        raise ValueError(f"{path} is larger than {most / MIB:g} MiB, the most that is read here")
    return content
