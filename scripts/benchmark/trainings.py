"""Runs trainings in processes forked from one that has done the imports, which take longest."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from environment import ROOT

PRELOADED = [
    *("mixgrpo.trainer", "mixgrpo.report.summary", "mixgrpo.models.export_files"),
    "mixgrpo.engines.zero",
]
_claims: list[socket.socket] = []


def prepare() -> None:
    """Sets up this process and its children: no GPU, and threads that sleep while they wait."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


def start(words: Sequence[str], count: int, log: Path) -> list[BaseProcess]:
    """Starts processes like torchrun, except that none is stopped when another one fails.

    Args:
        words: the training's command line.
        log: file to which process 0 appends its output; process n appends to the name with .n.
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


def free_port(count: int = 1) -> int:
    """The first of ``count`` ports in a row that are this process's until it ends.

    Another that calls this gets others, a job on several hosts takes some from 20000 on, and what
    the system gives to the next connection begins, on Linux, at 32768.
    """
    while True:
        ports = range(first := random.SystemRandom().randrange(10_000, 19_990), first + count)
        claims = [socket.socket(socket.AF_UNIX) for _ in ports]
        try:
            for port, claim in zip(ports, claims, strict=True):
                claim.bind(f"\0mixgrpo-port-{port}")  # a name for one process at a time, no file
                with socket.create_server(("", port)):
                    pass
        except OSError:
            for claim in claims:
                claim.close()
            continue
        _claims.extend(claims)
        return first


def become_rank(rank: int, count: int, port: int) -> None:
    """Gives this process the environment variables of torchrun on one host."""
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
    """Runs a training to its end.

    Raises:
        RuntimeError: if it failed; the message ends with the output of the processes.
    """
    processes = start(words, count, log)
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        logs = (log_of(log, rank).read_text()[-2000:] for rank in range(count))
        raise RuntimeError(f"the training failed:\n{' '.join(words)}\n{''.join(logs)}")
