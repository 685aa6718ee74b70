"""Reports where every process of a run hangs, once one of them makes no progress."""

from __future__ import annotations

import math
import os
import threading
from datetime import timedelta
from time import monotonic, perf_counter
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from mixgrpo.engines.distributed import Process
from mixgrpo.engines.rendezvous import connect, read_place
from mixgrpo.run.guard import end_without_gil_after, indented, speak, stacks

PERIOD = 2.0  # seconds between checks
SUSPENDED = 10.0  # seconds between checks beyond which the process was suspended
TELLING = 5.0  # seconds for the other processes to report where they are
_KEY = "mixgrpo/stalled"


class Watchdog:
    """Ends a process that makes no progress, after every process has reported where it is.

    A process that waits for another one in a collective operation hangs just as that one does.
    Therefore the first process that runs out of patience notifies all others through the store by
    which they met, and each of them prints the stacks of all its threads and exits.
    """

    def __init__(self, patience: float, process: Process) -> None:
        """
        Args:
            patience: seconds without progress; 0 waits forever.
        """
        self.patience = patience
        self.process = process
        self._place, self._since = "before loading", monotonic()
        self._over, self._arming = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def progress(self, place: str) -> None:
        """Records that the process has reached another place."""
        self._place, self._since = place, monotonic()

    def beat(self) -> None:
        """Records that the process is alive, at the same place."""
        self._since = monotonic()

    def __enter__(self) -> Watchdog:
        if self.patience:
            self.progress(self._place)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._arming:
            self._over.set()
            end_without_gil_after(math.inf)

    def _watch(self) -> None:
        store = _store(self.process)
        period = min(PERIOD, self.patience / 4)
        looked = perf_counter()
        while not self._over.wait(period):
            with self._arming:
                if not self._over.is_set():
                    end_without_gil_after(self.patience + PERIOD + TELLING)
            pause, looked = perf_counter() - looked, perf_counter()
            if pause > SUSPENDED + period:  # Ctrl-Z, for example: no thread ran meanwhile
                self._since += pause
            if monotonic() - self._since > self.patience:
                _note(store, f"rank {self.process.rank}")
                self._end(f"no progress for {self.patience:.0f} s (run.patience)")
            try:
                stalled = _noted(store)
            except RuntimeError:  # its host is gone
                store, stalled = None, ""
            if stalled:
                self._end(f"{stalled} makes no progress")

    def _end(self, why: str) -> NoReturn:
        rank, seconds = self.process.rank, monotonic() - self._since
        speak(
            f"error (rank {rank}): {why}; this process has been in phase {self._place!r} for "
            f"{seconds:.0f} s; its threads are at\n{indented(stacks())}"
        )
        if self.process.world_size > 1:
            threading.Event().wait(TELLING)
        os._exit(1)  # any other way to exit would wait for the thread that hangs


def _store(process: Process) -> dist.Store | None:
    """A separate connection to the processes' store, because that of the group may block."""
    if process.world_size == 1:
        return None
    try:
        return connect(read_place(os.environ), timedelta(seconds=60))
    except (RuntimeError, ValueError):  # nobody keeps one
        return None


def _note(store: dist.Store | None, who: str) -> None:
    try:
        if store is not None:
            store.set(_KEY, who)
    except RuntimeError:  # its host is gone
        return


def _noted(store: dist.Store | None) -> str:
    return store.get(_KEY).decode() if store is not None and store.check([_KEY]) else ""
