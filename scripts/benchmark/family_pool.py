"""A pool of single-threaded worker processes, which perform tasks until a deadline."""

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
    """A pool of workers, to which tasks are handed out in order.

    Args:
        count: number of workers.
        perform: performs a task in a worker; must be importable by its name.
        deadline: time by ``monotonic`` at which workers get SIGTERM and no more tasks are started.
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
        """Performs the tasks; returns whether all were finished before the deadline.

        Args:
            done: called with each task that is finished.

        Raises:
            RuntimeError: if a worker ended or failed; the message gives the reason.
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
        """Ends the workers and waits for them; busy workers save first."""
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
    """Context with workers that are always ended on exit."""
    workers = Pool(count, perform, deadline)
    try:
        yield workers
    finally:
        workers.close()


def _serve(connection: Connection, perform: Callable[[Any], Any]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    # Ctrl-C reaches every process of a terminal; workers are ended by SIGTERM instead.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError):
        while True:
            task = connection.recv()
            try:
                perform(task)
            except Exception as error:
                if getattr(error, "exit_code", 0) > 128:  # a signal stopped it, and it has saved
                    sys.exit(0)
                connection.send(f"{type(error).__name__}: {error}")
            else:
                connection.send(None)
