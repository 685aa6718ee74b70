"""Stopping a run from outside: signals that ask for a checkpoint and an end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from time import monotonic
from types import FrameType


class TrainingStopped(RuntimeError):
    """Training ended early, with a resumable checkpoint behind; the message says why."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class SamplingStopped(Exception):
    """A signal came while pictures were being sampled; the weights are whole."""


class StopRequest:
    """Whether SIGTERM or Ctrl-C has asked for an end, and which of them."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextlib.contextmanager
    def from_signals(self) -> Iterator[None]:
        """Inside, a signal is a request; a later one raises KeyboardInterrupt at once."""
        asked_at = 0.0

        def ask(number: int, frame: FrameType | None) -> None:
            nonlocal asked_at
            # A terminal and torchrun both pass on one Ctrl-C, so the same moment counts once.
            if self.signal is not None and monotonic() - asked_at > 2:
                raise KeyboardInterrupt
            self.signal, asked_at = number, monotonic()

        before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
