"""Processes forked from the tests' own, so that none has to import torch."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SOON = 20.0  # seconds


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def forked(told: Path, act: Callable[[], int], **variables: str) -> Iterator[int]:
    """A process that exits with what ``act`` returns; it is killed if the test fails."""
    pid = os.fork()
    if pid == 0:
        try:
            os.environ.update(variables)
            sys.stderr = sys.stdout = told.open("w", buffering=1)
            os._exit(act())
        except BaseException:
            os._exit(99)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def exit_code(pid: int) -> int:
    """Waits for the process to end, but does not reap it."""
    deadline = time.monotonic() + SOON
    while (ended := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is None:
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.01)
    return ended.si_status


def said(told: Path) -> str:
    """What a process has printed so far."""
    return told.read_text() if told.exists() else ""
