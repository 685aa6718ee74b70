"""How long saving a checkpoint blocks the training: asynchronously, and waiting for the disk.

    python scripts/benchmark/saving.py --help

A network of ``--parameters`` with AdamW and an average, as held in training (16 bytes per weight),
is saved several times, with ``--step`` seconds of computation in between. The table shows how long
a save blocks the loop, how long a computation step takes while nothing is written and while the
thread writes, and how long it takes from the start of a save to a complete checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from environment import environment
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from mixgrpo.checkpoint import Position, Saver, latest, open_saved, verify
from mixgrpo.engines.data_parallel import DataParallel
from mixgrpo.engines.distributed import Process
from mixgrpo.engines.ema import Ema

WIDTH = 1024
GIGABYTE = 1e9


@dataclass(frozen=True)
class Timing:
    """Seconds, as medians over the saves.

    Attributes:
        stall: time for which one save blocks the loop, at its start and its end together.
        alone, beside: one computation step, while nothing is written and while a thread writes.
        whole: from the start of a save to its complete checkpoint.
    """

    stall: float
    alone: float
    beside: float
    whole: float


class Training:
    """Layers of WIDTH x WIDTH with the requested number of weights."""

    def __init__(self, parameters: int, device: torch.device) -> None:
        layers = max(1, parameters // WIDTH**2)
        linears = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)]
        self.engine = DataParallel(nn.Sequential(*linears).to(device), device, _adamw)
        self.ema = Ema(self.engine.shards, 0.9)
        self.inputs = torch.randn(8, WIDTH, device=device)

    def compute(self) -> None:
        self.engine.backward(self.engine.module(self.inputs).square().mean())
        self.engine.step()

    def save(self, saver: Saver, position: Position) -> None:
        """Saves in the same way as the trainer."""
        with self.ema.swapped():
            average = saver.copy({"ema": self.engine.weights()})
        saver.save({**average, **self.engine.state()}, position)


def _adamw(parameters: list[nn.Parameter]) -> tuple[Optimizer, LRScheduler]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    return optimizer, LambdaLR(optimizer, lambda step: 1.0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parameters", type=int, default=120_000_000)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument(
        "--step",
        type=float,
        default=0,
        help="seconds of computation after a save; 0: as long as a save takes",
    )
    parser.add_argument("--folder", type=Path, default=None, help="folder on the disk to measure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    for key, value in environment(device).items():
        print(f"{key}: {value}")
    training = Training(given.parameters, device)
    training.compute()
    size = 16 * sum(shard.numel() for shard in training.engine.shards)
    print(f"state: {size / GIGABYTE:.2f} GB\n")
    print(
        "| | stall, s per save | from begin to whole, s | step alone, s | step beside a save, s |"
    )
    print("|---|---|---|---|---|")
    timings = {}
    for name, asynchronous in (("waiting", False), ("asynchronous", True)):
        with tempfile.TemporaryDirectory(dir=given.folder) as root:
            timing = _time(training, Path(root), asynchronous, given)
            timings[name] = timing
            verified = _seconds_to_verify(Path(root))
        print(
            f"| {name} | {timing.stall:.3f} | {timing.whole:.2f} | {timing.alone:.3f} | "
            f"{timing.beside:.3f} |",
            flush=True,
        )
    gain = timings["waiting"].stall / timings["asynchronous"].stall
    print(f"\nthe loop is blocked {gain:.1f} times shorter; verifying takes {verified:.2f} s")
    return 0


def _time(training: Training, root: Path, asynchronous: bool, given: argparse.Namespace) -> Timing:
    saver = Saver(Process(0, 1, training.inputs.device), root, 1, asynchronous)
    stalls, alone, beside, whole = [], [], [], []
    for number in range(given.saves + 1):  # the first one allocates memory for its copies
        begun = _now(training)
        training.save(saver, Position(number, 0, {}))
        stall = perf_counter() - begun
        while saver.under_way:
            beside.append(_seconds_of(training))
            polled = perf_counter()
            saver.poll()
            stall += perf_counter() - polled
        finished = perf_counter() - begun
        until = perf_counter() + (given.step or finished)
        while perf_counter() < until:
            alone.append(_seconds_of(training))
        if number:
            stalls.append(stall)
            whole.append(finished)
    return Timing(median(stalls), median(alone), median(beside or [0.0]), median(whole))


def _seconds_of(training: Training) -> float:
    begun = _now(training)
    training.compute()
    return _now(training) - begun


def _now(training: Training) -> float:
    if training.inputs.device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def _seconds_to_verify(root: Path) -> float:
    newest = latest(root)
    assert newest is not None
    begun = perf_counter()
    saved = open_saved(newest)
    verify(saved, saved.files)
    seconds = perf_counter() - begun
    shutil.rmtree(newest)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
