"""Reports where every process of a run hangs, once one of them makes no progress."""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
from datetime import timedelta
from time import monotonic
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from mixgrpo.engines.distributed import Process
from mixgrpo.engines.rendezvous import connect, read_place

PERIOD = 2.0  # seconds between checks
TELLING = 5.0  # seconds for the other processes to report where they are
_KEY = "mixgrpo/stalled"


class Watchdog:
    """Ends a process that makes no progress, after every process has reported where it is.

    A process that waits for another one in a collective operation hangs just as that one does.
    Therefore the first process that runs out of patience notifies all others through torchrun's
    store, and each of them prints the stacks of all its threads and exits.
    """

    def __init__(self, patience: float, process: Process) -> None:
        """
        Args:
            patience: seconds without progress; 0 waits forever.
        """
        self.patience = patience
        self.process = process
        self._place, self._since = "before loading", monotonic()
        self._over = threading.Event()
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
        self._over.set()

    def _watch(self) -> None:
        store = _store(self.process)
        while not self._over.wait(min(PERIOD, self.patience / 4)):
            if monotonic() - self._since > self.patience:
                _note(store, f"rank {self.process.rank}")
                self._end(f"no progress for {self.patience:.0f} s (run.patience)")
            stalled = _noted(store)
            if stalled:
                self._end(f"{stalled} makes no progress")

    def _end(self, why: str) -> NoReturn:
        rank, seconds = self.process.rank, monotonic() - self._since
        sys.stderr.write(
            f"error (rank {rank}): {why}; this process has been in phase {self._place!r} for "
            f"{seconds:.0f} s; its threads are at\n{_indented(stacks())}\n"
        )
        sys.stderr.flush()
        if self.process.world_size > 1:
            threading.Event().wait(TELLING)
        os._exit(1)  # any other way to exit would wait for the thread that hangs


def stacks() -> str:
    """The stack of every thread of this process, the innermost call first."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace").strip()


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() if line)


def _store(process: Process) -> dist.Store | None:
    """A separate connection to torchrun's store, because that of the process group may block."""
    if process.world_size == 1:
        return None
    try:
        return connect(read_place(os.environ), timedelta(seconds=60))
    except (RuntimeError, ValueError):  # not started by torchrun
        return None


def _note(store: dist.Store | None, who: str) -> None:
    try:
        if store is not None:
            store.set(_KEY, who)
    except RuntimeError:  # its host is gone
        return


def _noted(store: dist.Store | None) -> str:
    try:
        return store.get(_KEY).decode() if store is not None and store.check([_KEY]) else ""
    except RuntimeError:
        return ""
