"""Processes that train or save together, forked from one that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

import torch
from tiny_world import environment
from trainings import become_rank, free_port

from mixgrpo.engines.distributed import Process

ALONE = Process(0, 1, torch.device("cpu"))
PRELOADED = ["processes", "mixgrpo.trainer", "mixgrpo.report.summary", "torch.distributed.fsdp"]


def started(count: int, task: Callable[..., None], *given: Any) -> list[multiprocessing.Process]:
    """``count`` processes that carry out a task of a test file, as torchrun would start them."""
    context = multiprocessing.get_context("forkserver")
    if forkserver._forkserver._forkserver_pid is None:  # this process's threads are not forked
        context.set_forkserver_preload(PRELOADED)
        before = dict(os.environ)
        os.environ.update(environment())
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


def _as_rank(
    rank: int, count: int, port: int, task: Callable[..., None], given: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if count > 1:
        become_rank(rank, count, port)
    task(*given)
