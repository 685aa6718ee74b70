"""Processes and devices: one process alone, or torchrun's on CPU (gloo) or GPU (NCCL)."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

T = TypeVar("T")
Key = TypeVar("Key")
Value = TypeVar("Value")

PATIENCE = timedelta(hours=2)  # for the slowest process: a service of rewards, a full disk's writes
DRIVER = Path("/proc/driver/nvidia/version")
ROUND = 8  # items that each process works on before results are gathered


@dataclass(frozen=True)
class Process:
    """This process among all of a run."""

    rank: int
    world_size: int
    device: torch.device

    def first(self, context: AbstractContextManager[None]) -> AbstractContextManager[None]:
        """What the first process alone enters."""
        return context if self.rank == 0 else nullcontext()


@contextmanager
def process_group(threads: int) -> Iterator[Process]:
    """Joins the processes that torchrun started; without torchrun there is just this one.

    Args:
        threads: CPU threads of this process; 0 for torch's choice, under torchrun an equal share.

    Raises:
        ValueError: more processes than GPUs, or a GPU that torch cannot use.
    """
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    world_size, local_size = (
        int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    device = _device(local_rank, local_size)
    if threads or local_size > 1:
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_size))
    if "RANK" not in os.environ:
        yield Process(0, 1, device)
        return
    # What is on the CPU goes by gloo on a GPU too: flags and Python's objects then wait for a slow
    # process, where NCCL gives up after minutes, and notice a lost one at once.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    _keep(dist.group.WORLD)
    try:
        yield Process(rank, world_size, device)
    except BaseException:
        if device.type == "cpu":  # NCCL's end would wait for the others, who wait for this process
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def new_group(process: Process) -> dist.ProcessGroup | None:
    """All processes once more, by gloo: for a thread of its own beside the run; None if alone."""
    if process.world_size == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    _keep(group)
    return group


def _keep(group: object) -> None:
    """Keeps a group to the end.

    It is destroyed with whoever held it last. DDP does so holding the interpreter's lock, joins
    gloo's threads, and hangs if one of these wants that lock; Python's own reference, kept here, is
    given up without it.
    """
    atexit.register(lambda group: None, group)


def _device(local_rank: int, local_size: int) -> torch.device:
    if not torch.cuda.is_available():
        wanted = os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1")
        if wanted and DRIVER.exists():
            raise ValueError(
                "there is an NVIDIA driver, but torch cannot use it (too old for CUDA "
                f"{torch.version.cuda}?); update it, run env_setup.sh with a TORCH_INDEX_URL for "
                "an older CUDA, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_size > count:
        raise ValueError(
            f"{local_size} processes on this machine, but torch sees {count} GPUs; start {count}, "
            "or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    # Else float32 convolutions round to 10 bits, and scores differ from those on a CPU.
    torch.backends.cudnn.allow_tf32 = False
    return device


def leave(exit_code: int) -> NoReturn:
    """Ends this process; one of several that failed at once, waiting for no other and no thread."""
    if exit_code and "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def gather_objects(process: Process, value: T) -> list[T]:
    """Every process's value, in the order of their ranks, on every process."""
    if process.world_size == 1:
        return [value]
    gathered: list[T | None] = [None] * process.world_size
    dist.all_gather_object(gathered, value)
    return gathered  # type: ignore[return-value]


def spread(
    process: Process,
    items: Sequence[T],
    do: Callable[[T], dict[Key, Value]],
    label: str | None = None,
) -> Iterator[dict[Key, Value]]:
    """What ``do`` gives for every item, on every process, in rounds; items are dealt like cards.

    Args:
        label: of a progress bar; None shows none.
    """
    step = ROUND * process.world_size
    hidden = label is None or process.rank > 0 or not items
    with tqdm(total=len(items), desc=label, disable=hidden) as progress:
        for start in range(0, len(items), step):
            dealt = items[start : start + step]
            found: dict[Key, Value] = {}
            for item in dealt[process.rank :: process.world_size]:
                found |= do(item)
            parts = gather_objects(process, found)
            yield {key: value for part in parts for key, value in part.items()}
            progress.update(len(dealt))
