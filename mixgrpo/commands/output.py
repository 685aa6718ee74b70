"""Standard output and error that cannot be written end no command."""

from __future__ import annotations

import os
import sys
from typing import Any


def make_lenient() -> None:
    """Lets a command go on if nobody reads its output, or if the disk of its log is full.

    A training must not be lost because the terminal or the ``tee`` behind it is gone. If standard
    input, output or error is closed, the null device takes its place: otherwise a file that is
    opened later, a checkpoint for example, would, and would receive what is printed.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    sys.stdout = _lenient(sys.stdout, 1)
    sys.stderr = _lenient(sys.stderr, 2)


def _lenient(stream: Any, handle: int) -> Any:
    return _Lenient(stream or open(handle, "w", encoding="utf-8", closefd=False))


class _Lenient:
    """A text stream that drops what cannot be written."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            # What is left in the buffer would be written again and again, and fail at the exit.
            self._drop()

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
