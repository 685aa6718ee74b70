"""Trainings in processes forked from one that has imported everything: that takes longest."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from environment import ROOT

PRELOADED = ["mixgrpo.trainer", "mixgrpo.report.summary", "mixgrpo.engines.zero"]


def prepare() -> None:
    """For this process and those that it starts: no GPU, threads that sleep while they wait."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


def start(words: Sequence[str], count: int, log: Path) -> list[BaseProcess]:
    """As torchrun would, but that none is stopped when another one fails.

    Args:
        words: the training's command line.
        log: what process 0 says is appended to it; process n appends to the same name with .n.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    processes: list[BaseProcess] = [
        context.Process(target=_train, args=(list(words), rank, count, port, log_of(log, rank)))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def become_rank(rank: int, count: int, port: int) -> None:
    """Gives this process the environment that torchrun would, on one machine."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def log_of(log: Path, rank: int) -> Path:
    return log.with_suffix(f"{log.suffix}.{rank}") if rank else log


def _train(words: list[str], rank: int, count: int, port: int, log: Path) -> None:
    from mixgrpo.commands import main as mixgrpo

    os.chdir(ROOT)  # the recipes name the files of data/shapes from there
    become_rank(rank, count, port)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.exit(mixgrpo(["train", *words]))


def finish(words: Sequence[str], count: int, log: Path) -> None:
    """Trains to the end.

    Raises:
        RuntimeError: it failed; the message ends with what the processes said.
    """
    processes = start(words, count, log)
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        logs = (log_of(log, rank).read_text()[-2000:] for rank in range(count))
        raise RuntimeError(f"the training failed:\n{' '.join(words)}\n{''.join(logs)}")
