"""A small all-reduce with one process per host: ``python -m mixgrpo.hosts.allreduce``."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from time import perf_counter

import torch
import torch.distributed as dist

from mixgrpo.files.messages import in_one_line

WITHIN = timedelta(seconds=60)
ELEMENTS = 1 << 22  # float32: 16 MiB


def main() -> int:
    """Sums a tensor over all hosts, twice; returns 0 if the sum is correct."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    rank, hosts = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # By default, a timeout of NCCL ends the process without a word to Python.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    try:
        dist.init_process_group(backend, timeout=WITHIN)
        for _ in range(2):  # the first one opens the connections
            tensor = torch.full((ELEMENTS,), float(rank + 1), device=device)
            start = perf_counter()
            dist.all_reduce(tensor)
            is_right = bool((tensor == hosts * (hosts + 1) / 2).all())
            seconds = perf_counter() - start
        dist.destroy_process_group()
    except RuntimeError as error:  # the base class of torch.distributed's own errors
        print(f"error: all-reduce with {backend} failed: {in_one_line(error)}", flush=True)
        return 1
    speed = ELEMENTS * 4 / 2**20 / seconds
    print(f"all-reduce with {backend}: {'correct' if is_right else 'WRONG'}, {speed:.0f} MiB/s")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
