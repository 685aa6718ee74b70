"""What is particular to GPUs: their errors, deterministic kernels, clocks that do not wait."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

# How the libraries below torch say that memory is missing.
_NO_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Cuda failure 2",
    "Cuda failure 'out of memory'",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU had too little memory: for torch itself, or for a library that torch calls."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # Other errors may quote the message of a server that has run out of memory.
    own = (torch.AcceleratorError, torch.distributed.DistError)
    is_own = type(error) is RuntimeError or isinstance(error, own)
    return is_own and any(words in str(error) for words in _NO_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """Whether a kernel failed, after which nothing else works on the GPU in this process."""
    return isinstance(error, torch.AcceleratorError)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Context in which torch uses deterministic kernels only, if ``wanted``.

    To be entered before anything is evaluated: attention in rollout and update must use the same
    kernels, and which ones are deterministic decides which are used. An operation that has no
    deterministic kernel raises a RuntimeError that names it.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at cuBLAS's first use
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # else every new tensor would be written twice
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filled


class Clock:
    """Times what a device does without waiting for it: by events on a GPU.

    An event is passed when all that was launched before it is done; if nothing is under way, at
    once. Two events therefore enclose the device's work and its waiting for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Any:
        """A moment, to be passed to ``seconds``."""
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, first: Any, second: Any) -> float:
        """Seconds between two moments; waits until the second one has passed."""
        if self.device.type != "cuda":
            return float(second - first)
        second.synchronize()
        return float(first.elapsed_time(second)) / 1000
