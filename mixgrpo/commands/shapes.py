"""``python -m mixgrpo shapes``: rebuilds the Shapes world's captions and checkpoints."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def run(arguments: Sequence[str]) -> int:
    """Builds the wanted parts, several at a time; returns the exit code."""
    from mixgrpo.shapes.build import CHAINS

    known = [part for chain in CHAINS for part in chain]
    parser = argparse.ArgumentParser(
        prog="python -m mixgrpo shapes",
        description="Rebuilds the Shapes world's captions and checkpoints, seeded.",
    )
    parser.add_argument("--folder", type=Path, default=Path("data/shapes"))
    parser.add_argument("--only", nargs="+", choices=known, default=known, help="parts to build")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="parts built at a time, one core each"
    )
    chosen = parser.parse_args(arguments)
    wanted = [[part for part in chain if part in chosen.only] for chain in CHAINS]
    start = time.perf_counter()
    # Fresh processes with one thread each: for models of this size two parts side by side are
    # twice as fast as two threads on one, and the results do not depend on the machine's cores.
    pool = ProcessPoolExecutor(
        max(1, chosen.processes), multiprocessing.get_context("spawn"), _one_thread
    )
    with pool:
        jobs = [pool.submit(_build, chain, chosen.folder) for chain in wanted if chain]
        for job in jobs:
            job.result()
    print(f"{' '.join(chosen.only)}: {time.perf_counter() - start:.0f} s")
    return 0


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")


def _build(chain: list[str], folder: Path) -> None:
    from mixgrpo.shapes.build import PARTS

    for part in chain:
        start = time.perf_counter()
        PARTS[part](folder)
        print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
