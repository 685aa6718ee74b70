"""Processes that train or save together, forked from one that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from tiny_world import environment
from trainings import become_rank, free_port

from mixgrpo.engines.distributed import Process

ALONE = Process(0, 1, torch.device("cpu"))
PRELOADED = [
    *("processes", "mixgrpo.trainer", "mixgrpo.report.summary", "mixgrpo.models.export_files"),
    *("torch.distributed.fsdp", "mixgrpo.engines.zero"),
]
ENVIRONMENT = environment()  # before a test changes something


def started(count: int, task: Callable[..., None], *given: Any) -> list[multiprocessing.Process]:
    """``count`` processes that carry out a task of a test file, as torchrun would start them."""
    context = multiprocessing.get_context("forkserver")
    if forkserver._forkserver._forkserver_pid is None:  # this process's threads are not forked
        context.set_forkserver_preload(PRELOADED)
        before = dict(os.environ)
        os.environ.clear()
        os.environ.update(ENVIRONMENT)
        forkserver.ensure_running()
        os.environ.clear()
        os.environ.update(before)
    port = free_port()
    processes = [
        context.Process(target=_as_rank, args=(rank, count, port, task, given))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def together(count: int, task: Callable[..., None], *given: Any) -> None:
    """Lets them finish, which they must without an error."""
    processes = started(count, task, *given)
    for process in processes:
        process.join(600)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * count


class Command:
    """``python -m mixgrpo WORDS`` in ``count`` processes, but that none has to import anything.

    What they say goes to files in ``folder``. With a ``script``, ``python SCRIPT WORDS``.
    """

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        count: int = 1,
        script: Path | None = None,
        **variables: str,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._said = folder / "stdout", folder / "stderr"
        self._processes = started(count, _command, script, list(words), self._said, variables)

    def poll(self) -> int | None:
        return self._processes[0].exitcode

    def send_signal(self, number: int) -> None:
        for process in self._processes:
            assert process.pid is not None
            os.kill(process.pid, number)

    def wait(self) -> list[int | None]:
        """Their exit codes."""
        for process in self._processes:
            process.join(600)
            process.kill()
            process.join()
        return [process.exitcode for process in self._processes]

    @property
    def stdout(self) -> str:
        return self._said[0].read_text()

    @property
    def stderr(self) -> str:
        return self._said[1].read_text()


def _command(
    script: Path | None, words: list[str], said: tuple[Path, Path], variables: dict[str, str]
) -> None:
    for number, path in enumerate(said, start=1):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    os.environ.update(variables)
    sys.argv = [str(script or "mixgrpo"), *words]
    if script is None:
        runpy.run_module("mixgrpo", run_name="__main__")
    else:
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")


def _as_rank(
    rank: int, count: int, port: int, task: Callable[..., None], given: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if count > 1:
        become_rank(rank, count, port)
    task(*given)
