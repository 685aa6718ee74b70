"""Processes and devices: a single process, or those of torchrun on CPU (gloo) or GPU (NCCL)."""

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

from mixgrpo.engines.rendezvous import join_group, read_place

T = TypeVar("T")
Key = TypeVar("Key")
Value = TypeVar("Value")

PATIENCE = timedelta(hours=2)  # timeout for the slowest process, which may wait for rewards or disk
DRIVER = Path("/proc/driver/nvidia/version")
ROUND = 8  # items that each process handles before results are gathered


@dataclass(frozen=True)
class Process:
    """This process within the process group of a run."""

    rank: int
    world_size: int
    device: torch.device

    def first(self, context: AbstractContextManager[None]) -> AbstractContextManager[None]:
        """Returns the context on rank 0 and a null context on all other ranks."""
        return context if self.rank == 0 else nullcontext()


@contextmanager
def process_group(threads: int) -> Iterator[Process]:
    """Joins the process group of torchrun; without torchrun, this process runs alone.

    Args:
        threads: CPU threads of this process; 0 for torch's default or, with several processes on
            a host, an equal share of the cores.

    Raises:
        ValueError: if torchrun's variables contradict each other, there are more processes than
            GPUs, or torch cannot use the GPU.
        OSError: the other processes have not come.
    """
    place = read_place(os.environ)
    device = _device(place.local_rank, place.local_size)
    if threads or place.local_size > 1:
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // place.local_size))
    if place.is_alone:
        yield Process(0, 1, device)
        return
    # On a GPU, too, CPU tensors are communicated by gloo: flags and Python objects then wait for a
    # slow process, where NCCL times out after minutes, and a lost process is noticed at once.
    # For the same reason no device is named here: barriers would then go through NCCL.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    join_group(place, backend, PATIENCE)
    _keep(dist.group.WORLD)
    try:
        yield Process(place.rank, place.world_size, device)
    except BaseException:
        if device.type == "cpu":  # with NCCL this would wait for processes that wait for this one
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def new_group(process: Process) -> dist.ProcessGroup | None:
    """A second gloo group of all processes, for use in a separate thread; None if there is one."""
    if process.world_size == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    _keep(group)
    return group


def _keep(group: object) -> None:
    """Keeps a reference to a group until the interpreter exits.

    A group is destroyed together with its last reference. If that is DDP's, the destructor joins
    gloo's threads while it holds the GIL, and hangs if one of them needs it. The reference kept
    here is released without the GIL.
    """
    atexit.register(lambda group: None, group)


def _device(local_rank: int, local_size: int) -> torch.device:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        if visible not in ("", "-1") and DRIVER.exists():
            choice = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible}"
            raise ValueError(
                f"there is an NVIDIA driver, but torch cannot use it{choice} (it may be too old "
                f"for CUDA {torch.version.cuda}); update it, run env_setup.sh with a "
                "TORCH_INDEX_URL for an older CUDA, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if max(local_size, local_rank + 1) > count:
        wanted = (
            f"there are {local_size} processes on this host"
            if local_size > count
            else f"LOCAL_RANK is {local_rank}"
        )
        raise ValueError(
            f"{wanted}, but torch sees {count} GPUs; start {count} processes, or set "
            "CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    # With TF32, float32 convolutions would round to 10 bits and scores would differ from the CPU's.
    torch.backends.cudnn.allow_tf32 = False
    return device


def leave(exit_code: int) -> NoReturn:
    """Ends this process; after a failure under torchrun, or a signal, waits for no other process or
    thread, such as that of a reward that hangs."""
    if exit_code > 128 or (exit_code and "RANK" in os.environ):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def gather_objects(process: Process, value: T) -> list[T]:
    """Gathers the value of every process, in rank order, on every process."""
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
    """Applies ``do`` to all items, distributed round-robin over the processes.

    Yields the merged results of one round at a time, on every process.

    Args:
        label: label of the progress bar; None shows no progress bar.
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
