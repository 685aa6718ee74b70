"""Worker processes that do one task after the other, each with one thread, until a deadline."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any

PATIENCE = 120.0  # seconds that a worker gets to save its checkpoint


class Pool:
    """As many workers as are to run at once; tasks are handed out in their order.

    Args:
        count: of workers.
        perform: does a task in a worker; importable by its name.
        deadline: by ``monotonic``; then the workers get SIGTERM, and no task is begun.
    """

    def __init__(self, count: int, perform: Callable[[Any], Any], deadline: float) -> None:
        self.deadline = deadline
        context = multiprocessing.get_context("spawn")
        self.workers: dict[Connection, BaseProcess] = {}
        self.busy: dict[Connection, Any] = {}
        for _ in range(count):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs, perform), daemon=True)
            worker.start()
            theirs.close()
            self.workers[ours] = worker

    def run(self, tasks: Sequence[Any], done: Callable[[Any], None]) -> bool:
        """Does the tasks; whether all were done before the deadline.

        Args:
            done: called with each task that is finished.

        Raises:
            RuntimeError: a worker ended or failed; the message says how.
        """
        waiting, busy = deque(tasks), self.busy
        for connection in self.workers:
            if waiting and monotonic() < self.deadline:
                busy[connection] = waiting.popleft()
                connection.send(busy[connection])
        while busy:
            ready = wait(list(busy), timeout=max(0.0, self.deadline - monotonic()))
            if not ready:
                return False
            for connection in ready:
                assert isinstance(connection, Connection)
                task = busy.pop(connection)
                _raise_failure(connection, task)
                done(task)
                if waiting and monotonic() < self.deadline:
                    busy[connection] = waiting.popleft()
                    connection.send(busy[connection])
        return not waiting

    def close(self) -> None:
        """Tells the workers to end, those at work to save first; waits for them."""
        for connection, worker in self.workers.items():
            if connection in self.busy:
                worker.terminate()
            connection.close()
        for worker in self.workers.values():
            worker.join(PATIENCE)
            if worker.is_alive():
                worker.kill()


def _raise_failure(connection: Connection, task: Any) -> None:
    try:
        failure = connection.recv()
    except EOFError:
        failure = "its process ended; the run's log.txt may say why"
    if failure is not None:
        raise RuntimeError(f"{task.name}: {failure}")


@contextlib.contextmanager
def pool(count: int, perform: Callable[[Any], Any], deadline: float) -> Iterator[Pool]:
    """Workers that are gone at the end, whatever happens inside."""
    workers = Pool(count, perform, deadline)
    try:
        yield workers
    finally:
        workers.close()


def _serve(connection: Connection, perform: Callable[[Any], Any]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    # Ctrl-C reaches every process of a terminal; what is under way is told to end by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError):
        while True:
            task = connection.recv()
            try:
                perform(task)
            except Exception as error:
                if getattr(error, "exit_code", 0) > 128:  # it was told to stop, and has saved
                    sys.exit(0)
                connection.send(f"{type(error).__name__}: {error}")
            else:
                connection.send(None)
