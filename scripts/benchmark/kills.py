"""Kills a training repeatedly at random times, and resumes it every time.

    python scripts/benchmark/kills.py --help

Two processes train on the smallest Shapes configuration and save asynchronously after every
iteration. One of the two, drawn at random, is killed (SIGKILL) at a random time; the other is
terminated, as by torchrun, and killed if it does not end. After every kill, the checkpoint that
``latest`` names is verified and the lost iterations are counted. Finally the run finishes, and its
last checkpoint is compared with that of an uninterrupted run. The exit code is 1 if a checkpoint
did not load, if more was lost than the work since the last save, or if the results differ.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from environment import environment
from trainings import finish, prepare, start

from mixgrpo.checkpoint import Saved, Shards, choose
from mixgrpo.engines.distributed import Process

EVERY = 1  # iterations between saves
# A save is complete by the end of the next iteration, so a save that is lost was begun after the
# iteration before the last one.
MOST = 2 * EVERY
PATIENCE = 10  # seconds until the remaining process is killed, as with torchrun
SMALLEST = """
--model.path data/shapes/flux --model.compute_dtype float32 --model.height 64 --model.width 64
--model.text_length 16 --model.gradient_checkpointing false --batch.prompts 2 --batch.samples 4
--batch.prompts_file data/shapes/prompts.txt --validation.prompts_file data/shapes/prompts_test.txt
--sampling.steps 4 --window.size 2 --window.iters_per_window 3 --update.optimizer_steps 2
--ema.decay 0.9 --validation.every 0 --validation.prompts 2 --validation.steps 2
--validation.pictures 0 --run.threads 1 --log.progress false --log.wandb disabled
--checkpoint.keep 2
"""
REWARDS = {"jpeg": {"kind": "jpeg_size"}, "facts": {"kind": "mixgrpo.shapes.judge:facts_right"}}


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        seconds: seconds after the start of the processes.
        rank: rank of the killed process; None if the run had already ended.
        done: iterations that the run had logged.
        kept: iterations in the newest checkpoint; 0 if there is none.
    """

    seconds: float
    rank: int | None
    done: int
    kept: int


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=80, help="length of the run")
    parser.add_argument(
        "--longest", type=float, default=0, help="latest time of a kill in seconds; 0 measures it"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the times and ranks")
    given = parser.parse_args()
    for key, value in environment(torch.device("cpu")).items():
        print(f"{key}: {value}")
    with tempfile.TemporaryDirectory() as name:
        try:
            return _compare(Path(name), given)
        except RuntimeError as error:
            sys.exit(f"error: {error}")


def _compare(folder: Path, given: argparse.Namespace) -> int:
    began = perf_counter()
    untouched = _run(folder / "untouched", given.iterations)
    duration = perf_counter() - began
    print(f"untouched: {given.iterations} iterations in {duration:.0f} s")
    draw, kills = random.Random(given.seed), []
    longest = given.longest or duration / 8
    print("kill | after s | rank | iterations done | in the newest checkpoint | lost")
    for number in range(given.kills):
        kills.append(_kill(folder / "killed", given.iterations, draw, longest))
        kill = kills[-1]
        print(
            f"{number + 1:4} | {kill.seconds:7.2f} | {kill.rank} | {kill.done} | {kill.kept} | "
            f"{kill.done - kill.kept}",
            flush=True,
        )
    same = _same(untouched, _run(folder / "killed", given.iterations))
    most = max(kill.done - kill.kept for kill in kills)
    print(f"most that was lost: {most} iterations (a save every {EVERY}, {MOST} allowed)")
    print(f"every `latest` loaded; the last checkpoint is {'the same' if same else 'ANOTHER'}")
    return 0 if same and most <= MOST else 1


def _kill(folder: Path, iterations: int, draw: random.Random, longest: float) -> Kill:
    seconds, victim = draw.uniform(0, longest), draw.randrange(2)
    processes = start(knobs(folder, iterations), 2, _log(folder))
    processes[victim].join(seconds)
    killed = processes[victim].is_alive()
    processes[victim].kill()
    processes[victim].join()
    assert not killed or processes[victim].exitcode == -signal.SIGKILL
    other = processes[1 - victim]
    if killed:
        other.terminate()
    other.join(PATIENCE if killed else None)
    other.kill()
    other.join()
    saved = _newest(folder)
    return Kill(
        seconds,
        victim if killed else None,
        _iterations_done(folder),
        saved.position.iteration if saved else 0,
    )


def _run(folder: Path, iterations: int) -> Saved:
    """Runs a training to its end; returns its last checkpoint."""
    finish(knobs(folder, iterations), 2, _log(folder))
    saved = _newest(folder)
    assert saved is not None
    assert saved.position.iteration == iterations
    return saved


def _log(folder: Path) -> Path:
    return folder.with_suffix(".log")


def _newest(folder: Path) -> Saved | None:
    """Verifies a checkpoint; raises an error if it does not load."""
    saved = choose(Process(0, 1, torch.device("cpu")), folder / "checkpoints", "latest")
    if saved is not None:
        Shards(saved.path).whole("model")
    return saved


def _iterations_done(folder: Path) -> int:
    done = 0
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            done = max(done, json.loads(line)["iteration"])
        except json.JSONDecodeError:  # killed while it was written
            break
    return done


def _same(first: Saved, second: Saved) -> bool:
    for part in ("model", "ema", "optimizer"):
        one, two = (Shards(saved.path).whole(part) for saved in (first, second))
        if one.keys() != two.keys() or not all(torch.equal(one[name], two[name]) for name in one):
            return False
    return True


def knobs(folder: Path, iterations: int) -> list[str]:
    """The options of the training's command line."""
    return [
        *SMALLEST.split(),
        *("--run.folder", str(folder), "--run.iterations", str(iterations), "--run.resume", "true"),
        *("--checkpoint.every", str(EVERY), "--rewards", json.dumps(REWARDS)),
    ]


if __name__ == "__main__":
    prepare()
    sys.exit(main())
