"""The machine: what it is, and the two ceilings that shares are of.

A matrix product in bfloat16 bounds what computes, a copy within the device's memory bounds what
moves data. Both are measured on random numbers: on zeros, a GPU is faster.
"""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from environment import environment

from gpu.job import Job, main

GIB = 2**30
# [M, K] x [K, N]: a large square, and FLUX.1-dev's largest product for one and for twelve images.
PRODUCTS = {
    "8192 x 8192 x 8192": (8192, 8192, 8192),
    "one image, 2537 x 3072 x 12288": (2537, 3072, 12288),
    "twelve images, 30444 x 3072 x 12288": (30444, 3072, 12288),
}
SMALL_PRODUCTS = {"256 x 256 x 256": (256, 256, 256)}
CEILING = "ceiling"


def perform(job: Job) -> None:
    device = torch.device(job.device)
    job.report("machine", **describe(device), small=job.small)
    rates = {}
    for name, sides in (SMALL_PRODUCTS if job.small else PRODUCTS).items():
        job.attempt(f"product {name}", lambda sides=sides: product(device, sides))
        rates[name] = job.earlier(job.part)[f"product {name}"].get("tflops") or 0.0
    job.attempt("copy", lambda: copy(device, 2**20 if job.small else GIB))
    job.report(CEILING, tflops=max(rates.values()))


def describe(device: torch.device) -> dict[str, object]:
    """Name, memory, driver and versions; what CUDA takes of the memory before any tensor."""
    found: dict[str, object] = dict(environment(device))
    found["python"] = platform.python_version()
    found["allocator"] = os.environ.get("PYTORCH_ALLOC_CONF", "torch's default")
    if device.type != "cuda":
        return found
    torch.zeros(1, device=device)
    free, total = torch.cuda.mem_get_info(device)
    cuda, driver = torch.version.cuda, driver_version()
    found |= {"card": torch.cuda.get_device_name(device), "cuda": cuda, "driver": driver}
    found["memory_gib"] = total / GIB
    found["context_gib"] = (total - free - torch.cuda.memory_reserved(device)) / GIB
    return found


def driver_version() -> str:
    """The NVIDIA driver's version; "unknown" where its program is missing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.stdout.splitlines()[0].strip()


def product(device: torch.device, sides: tuple[int, int, int]) -> dict[str, float]:
    """TFLOP/s of a bfloat16 matrix product."""
    m, k, n = sides
    a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    seconds = seconds_of(lambda: a @ b.t(), device)
    return {"seconds": seconds, "tflops": 2 * m * k * n / seconds / 1e12}


def copy(device: torch.device, count: int) -> dict[str, float]:
    """GB/s of a copy of ``count`` bytes within the device, bytes read and bytes written."""
    source = torch.empty(count, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device)
    return {"seconds": seconds, "gb_per_second": 2 * count / seconds / 1e9}


def seconds_of(
    work: Callable[[], object], device: torch.device, repeats: int = 10, warm_up: int = 3
) -> float:
    """Median seconds of a piece of work, by CUDA events on a GPU."""
    for _ in range(warm_up):
        work()
    if device.type != "cuda":
        return median(_timed(work) for _ in range(repeats))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize(device)
    pairs = itertools.pairwise(marks)
    return median(first.elapsed_time(second) for first, second in pairs) / 1000


def _timed(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


if __name__ == "__main__":
    main("machine", perform)
