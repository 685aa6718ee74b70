"""Checks of the devices: GPUs and their driver, or the CPU."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from mixgrpo.config import Config
from mixgrpo.doctor.lines import Line, error, ok, size, warning
from mixgrpo.engines.distributed import DRIVER

_MEMORY = Path("/proc/meminfo")


def check_devices(config: Config, processes: int) -> Iterator[Line]:
    if torch.cuda.is_available():
        yield from _gpus(processes)
        return
    if DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1"):
        yield error(
            "devices",
            f"the NVIDIA driver {driver_version()} is installed, but torch (built for CUDA "
            f"{torch.version.cuda}) cannot use it",
            "update the driver, or run TORCH_INDEX_URL=... bash env_setup.sh to install a torch "
            "for an older CUDA, or set CUDA_VISIBLE_DEVICES= to run on the CPU",
        )
        return
    cores, memory = len(os.sched_getaffinity(0)), memory_available()
    free = f"{size(memory)} of memory available" if memory else "memory unknown"
    yield ok("devices", f"no GPU; {cores} CPU cores, {free}")
    if processes > cores:
        yield warning(
            "devices",
            f"{processes} processes share {cores} cores",
            f"start no more than {cores} on this machine",
        )


def _gpus(processes: int) -> Iterator[Line]:
    count = torch.cuda.device_count()
    for number in range(count):
        found = torch.cuda.get_device_properties(number)
        free, _ = torch.cuda.mem_get_info(number)
        yield ok(
            "devices",
            f"GPU {number}: {found.name}, {size(found.total_memory)}, {size(free)} free, driver "
            f"{driver_version()}",
        )
    if processes > count:
        machines = -(-processes // count)
        text = f"{processes} processes, one per GPU, need {machines} machines of {count} GPUs"
        if processes % count:
            yield error("devices", text, f"start a multiple of {count} processes")
        else:
            text = f"{text}; only this machine is checked"
            yield warning("devices", text, "run bash scripts/hosts/check.sh to check all of them")


def processes_here(processes: int) -> int:
    """Number of processes on this machine, out of ``processes``; 0 means one per GPU, or one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = processes or max(1, count)
    return min(wanted, count) if count else wanted


def memory_of_a_process(processes: int) -> int | None:
    """Bytes available to one process: those of a GPU, or its share of the free memory."""
    if torch.cuda.is_available():
        return min(
            torch.cuda.get_device_properties(number).total_memory
            for number in range(torch.cuda.device_count())
        )
    available = memory_available()
    return available and available // processes_here(processes)


def memory_available() -> int | None:
    """Bytes that programs can still allocate; None where the system does not report it."""
    try:
        found = re.search(
            r"^MemAvailable:\s*(\d+) kB", _MEMORY.read_text(encoding="utf-8"), re.MULTILINE
        )
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def driver_version() -> str:
    try:
        found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return "unknown"
    return found[1] if found else "unknown"
