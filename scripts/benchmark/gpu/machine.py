"""The machine: what it is, and the two ceilings that shares are of.

A matrix product in bfloat16 bounds what computes, a copy within the device's memory bounds what
moves data. Both are measured on random numbers: on zeros, a GPU is faster.
"""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from environment import environment

from gpu.job import Job, main
from mixgrpo.devices import Clock
from mixgrpo.hosts.facts import ask_nvidia

GIB = 2**30
# [M, K] x [K, N]: a large square, and FLUX.1-dev's largest product for one and for twelve images.
PRODUCTS = {
    "8192 x 8192 x 8192": (8192, 8192, 8192),
    "one image, 2537 x 3072 x 12288": (2537, 3072, 12288),
    "twelve images, 30444 x 3072 x 12288": (30444, 3072, 12288),
}
SMALL_PRODUCTS = {"256 x 256 x 256": (256, 256, 256)}


def perform(job: Job) -> None:
    device = torch.device(job.device)
    job.report("machine", **describe(device), small=job.small)
    for name, sides in (SMALL_PRODUCTS if job.small else PRODUCTS).items():
        job.attempt(f"product {name}", partial(product, device, sides))
    job.attempt("copy", partial(copy, device, 2**20 if job.small else GIB))
    measured = (result.get("tflops") or 0.0 for result in job.earlier(job.part).values())
    job.report("ceiling", tflops=max(measured))


def describe(device: torch.device) -> dict[str, object]:
    """Name, memory, driver and versions; what CUDA takes of the memory before any tensor."""
    found: dict[str, object] = dict(environment(device))
    found["python"] = platform.python_version()
    found["allocator"] = os.environ.get("PYTORCH_ALLOC_CONF", "torch's default")
    if device.type != "cuda":
        return found
    torch.zeros(1, device=device)
    free, total = torch.cuda.mem_get_info(device)
    cuda, driver = torch.version.cuda, next(iter(ask_nvidia("driver_version")), "unknown")
    found |= {"card": torch.cuda.get_device_name(device), "cuda": cuda, "driver": driver}
    found["memory_gib"] = total / GIB
    found["context_gib"] = (total - free - torch.cuda.memory_reserved(device)) / GIB
    return found


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
    clock = Clock(device)
    for _ in range(warm_up):
        work()
    marks = [clock.now()]
    for _ in range(repeats):
        work()
        marks.append(clock.now())
    return median(clock.seconds(*pair) for pair in itertools.pairwise(marks))


if __name__ == "__main__":
    main("machine", perform)
