"""What cannot be written to standard output and error ends no command."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, TextIO


def make_lenient() -> None:
    """Lets a command go on if nobody reads its output, or if the disk of its log is full.

    A training must not be lost because the terminal or the ``tee`` behind it is gone. If standard
    input, output or error is closed, the null device takes its place: otherwise a file that is
    opened later, a checkpoint for example, would, and would receive what is printed. Characters
    that the terminal's encoding lacks, as in a prompt in Chinese, are printed as escapes.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stdout = Lenient(sys.stdout or _null())
    sys.stderr = Lenient(sys.stderr or _null())


def what_is_lost() -> str:
    """Why not all of standard output could be written; empty if it was, or nobody reads it."""
    sys.stdout.flush()
    return getattr(sys.stdout, "lost", "")


def _null() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


class Lenient:
    """A text stream that drops what cannot be written.

    Attributes:
        lost: why something was dropped, unless its reader has closed the stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost = ""

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._note(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._note(error)
            # What is left in the buffer would be written again and again, and fail at the exit.
            self._drop()

    def _note(self, error: OSError) -> None:
        if error.errno != errno.EPIPE:
            self.lost = error.strerror or str(error)

    def _drop(self) -> None:
        """Empties the stream's buffer into the null device."""
        handle = self._stream.fileno()
        kept, null = os.dup(handle), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, handle)
            self._stream.flush()
        finally:
            os.dup2(kept, handle)
            os.close(kept)
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
