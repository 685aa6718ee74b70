"""Ends a process in time after a signal, whatever hangs in it."""

from __future__ import annotations

import faulthandler
import math
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from types import TracebackType
from typing import NoReturn

from mixgrpo.hosts.job import PARENT

TWICE = 1.0  # seconds; what comes sooner is the same request, passed on by a launcher or by SLURM
PERIOD = 1.0  # seconds between looks at the parent
LATE = 5.0  # seconds after which a process that cannot even run this thread is ended
SPEAKING = 2.0  # seconds for a message, because a terminal may be stopped
_stop_by = math.inf  # time by ``monotonic`` by which a process that was asked to stop is ended
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def stops() -> list[signal.Signals]:
    """The signals that ask a process to stop; SIGHUP is not one of them under ``nohup``."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in _STOPS if not (ignored and number == signal.SIGHUP)]


class Guard:
    """Context in which a thread sees to it that this process ends when it is asked to.

    Signal handlers of Python run between two instructions of the main thread: never, if that
    thread waits for a reward or a kernel that hangs. This thread is told of signals at once.

    - After the first signal the process has ``grace`` seconds to save and exit. Then its stacks are
      printed, and it is ended.
    - A second SIGINT (Ctrl-C), more than a second after the first signal, ends it at once.
    - Ctrl-Z suspends it.
    - If the process that started it has ended without a word, it gets SIGTERM: nobody waits for it.
    """

    def __init__(self, grace: float, left: Callable[[], str]) -> None:
        """
        Args:
            left: says what has been saved, and how to continue.
        """
        self.grace = grace
        self.left = left
        self.asked: int | None = None
        self._asked_at = 0.0
        self._parent = _parent()
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)

    def __enter__(self) -> Guard:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._suspend = signal.getsignal(signal.SIGTSTP)
        if self._suspend == signal.SIG_DFL:
            signal.signal(signal.SIGTSTP, lambda number, frame: None)  # heard by the thread
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._before)
        os.write(self._write, b"\0")
        self._thread.join()
        signal.signal(signal.SIGTSTP, self._suspend)
        _end_without_gil_by(math.inf)
        os.close(self._read)
        os.close(self._write)

    # ---- in the thread

    def _watch(self) -> None:
        while True:
            late_in = self._asked_at + self.grace - monotonic() if self.asked else PERIOD
            if select.select([self._read], [], [], min(PERIOD, max(0.0, late_in)))[0]:
                for number in os.read(self._read, 4096):
                    if number == 0:
                        return
                    self._hear(number)
            if self.asked and monotonic() >= self._asked_at + self.grace:
                self.end_late()
            if self._parent is not None and os.getppid() != self._parent:
                self._parent = None
                speak("error: the process that started this one has ended; this one ends, too")
                os.kill(os.getpid(), signal.SIGTERM)

    def _hear(self, number: int) -> None:
        if number == signal.SIGTSTP:  # Ctrl-Z: the time until it continues does not count
            faulthandler.cancel_dump_traceback_later()
            suspended_at = monotonic()
            os.kill(os.getpid(), signal.SIGSTOP)
            if self.asked is not None:
                self._asked_at += monotonic() - suspended_at
                _end_without_gil_by(self._asked_at + self.grace + LATE)
        if number not in stops():
            return
        if self.asked is None:
            self.asked, self._asked_at = number, monotonic()
            _end_without_gil_by(self._asked_at + self.grace + LATE)
            self.first()
        elif number == signal.SIGINT and monotonic() - self._asked_at > TWICE:
            _end_without_gil_by(monotonic() + LATE)
            self.second()

    def first(self) -> None:
        """Called when the process is asked to stop; its own handlers do what is needed."""

    def second(self) -> NoReturn:
        """Ends the process at once."""
        if os.environ.get("RANK", "0") == "0":
            speak(f"error: stopped at once by a second SIGINT; {self.left()}")
        os._exit(128 + signal.SIGINT)

    def end_late(self) -> NoReturn:
        """Ends the process, which has not ended in time."""
        assert self.asked is not None
        rank, name = os.environ.get("RANK", "0"), signal.Signals(self.asked).name
        speak(
            f"error (rank {rank}): still running {self.grace:.0f} s (run.grace) after {name}; its "
            f"threads are at\n{indented(stacks())}"
        )
        if rank == "0":
            speak(f"error: ended; {self.left()}")
        os._exit(128 + self.asked)


def _parent() -> int | None:
    """The process without which this one must end; None if it may go on alone.

    The variable is removed, since it is not meant for processes that this one starts.
    """
    told = os.environ.pop(PARENT, "")
    if told.isdecimal():
        return int(told)
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def end_without_gil_after(seconds: float) -> None:
    """Prints all stacks and ends the process after so many seconds unless this is called again:
    also if a thread, of C code that hangs for example, holds the GIL all the time."""
    left = min(seconds, _stop_by - monotonic())
    if left == math.inf:
        faulthandler.cancel_dump_traceback_later()
        return
    with suppress(OSError, ValueError, OverflowError):  # standard error is closed, for example
        faulthandler.dump_traceback_later(max(0.1, left), exit=True, file=_error_output())


def _end_without_gil_by(deadline: float) -> None:
    global _stop_by  # noqa: PLW0603 - there is one such timer per process
    _stop_by = deadline
    end_without_gil_after(math.inf)


def _error_output() -> int:
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # closed, or replaced by a buffer
        return 2


def speak(text: str) -> None:
    """Prints to standard error without waiting long for whoever reads it, or holds its lock."""

    def write() -> None:
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(SPEAKING)


def stacks() -> str:
    """The stack of every thread of this process, the innermost call first."""
    with os.fdopen(os.memfd_create("stacks"), "w+b") as file:  # even if the disk is full
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace").strip()


def indented(text: str) -> str:
    """The lines of a text, indented, without empty ones."""
    return "\n".join(f"    {line}" for line in text.splitlines() if line)
