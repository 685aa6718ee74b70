"""Atomic writes of files, and folders that only one command at a time may write to."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mixgrpo.files.regular import check_regular

PARTIAL = "partial_"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` create a file under a temporary name, flushes it, and renames it to ``path``.

    Raises:
        OSError: the file could not be written; an existing file is untouched.
        ValueError: see ``check_replaceable``.
    """
    check_replaceable(path)
    partial = path.with_name(PARTIAL + path.name)
    try:
        partial.unlink(missing_ok=True)  # of a killed process, or a link
        write(partial)
        flush(partial)
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # which that of a full disk does not name
        raise
    flush(path.parent)


def write_text_whole(path: Path, text: str) -> None:
    """Writes UTF-8 text by ``write_whole``, whatever the locale.

    Lone surrogates, as in names of files that are not UTF-8, are written as JSON escapes them.
    """
    data = text.encode("utf-8", errors="backslashreplace")
    write_whole(path, lambda partial: partial.write_bytes(data))


def check_replaceable(path: Path) -> None:
    """Raises ValueError if no file can be at ``path``, or something else is, such as a device.

    A rename would replace that. Call this before long work whose result will be written there.
    """
    try:
        if path.exists():
            check_regular(path)
        partial = path.with_name(PARTIAL + path.name)
        if partial.is_dir():
            check_regular(partial)
        above = existing(path.absolute().parent)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); name another") from error
    except ValueError as error:
        raise ValueError(f"{error}, so it is not replaced; name another path") from error
    if not above.is_dir():
        raise ValueError(f"{path} lies below {above}, which is not a folder; name another path")


def existing(path: Path) -> Path:
    """The path, or its nearest parent that exists; absolute."""
    whole = path.absolute()
    return next(place for place in (whole, *whole.parents) if place.exists())


def first_free(folder: Path, pattern: str) -> Path:
    """The first of ``pattern.format(1)``, ``pattern.format(2)``, ... that is not taken."""
    paths = (folder / pattern.format(number) for number in itertools.count(1))
    return next(path for path in paths if not path.exists())


def flush(path: Path) -> None:
    """Flushes a path to the disk; otherwise a rename may survive a crash but not the contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def own_folder(name: str, knob: str) -> Iterator[None]:
    """Creates the folder if it does not exist, and locks it against other commands.

    If an error occurs, a new folder in which nothing was written is removed.

    The lock ends with the process, however it ends. On file systems without locks, there is none.

    Args:
        knob: the dotted name of the setting that holds ``name``, for the messages.

    Raises:
        ValueError: the name is empty or that of a file, or another command holds the lock.
        OSError: the folder cannot be created.
    """
    if not name.strip():
        raise ValueError(f"{knob} is empty; name a folder")
    is_new = not os.path.exists(name)
    try:
        os.makedirs(name, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"{knob} is {name!r}, which is a file or lies below one; name a folder"
        ) from error
    except OSError as error:
        raise OSError(
            f"{knob} is {name!r}, which cannot be made ({error.strerror}); name a folder where you "
            "may write"
        ) from error
    handle = os.open(name, os.O_RDONLY)
    try:
        _lock(handle, name, knob)
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # a folder that is not empty is kept
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
                f"{knob} is {name!r}, to which another command is writing; wait for it to finish, "
                "or choose another folder"
            ) from error
