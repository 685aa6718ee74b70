"""Stopping a run from outside: signals request a checkpoint and an exit."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from time import monotonic
from types import FrameType

from mixgrpo.run.guard import TWICE, stops


class TrainingStopped(RuntimeError):
    """Training ended early and left a checkpoint to resume from; the message gives the reason."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class SamplingStopped(Exception):
    """A signal arrived while images were being sampled; the weights are those of an iteration."""


class StopRequest:
    """Whether SIGTERM, SIGHUP or SIGINT (Ctrl-C) has requested a stop, and which of them."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextlib.contextmanager
    def from_signals(self) -> Iterator[None]:
        """Context in which a signal is a request; a second one that is SIGINT raises
        KeyboardInterrupt."""
        asked_at = 0.0

        def ask(number: int, frame: FrameType | None) -> None:
            nonlocal asked_at
            if self.signal is None:
                self.signal, asked_at = number, monotonic()
            elif number == signal.SIGINT and monotonic() - asked_at > TWICE:
                raise KeyboardInterrupt

        before = {number: signal.signal(number, ask) for number in stops()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
