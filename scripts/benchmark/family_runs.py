"""Performs the runs of family.py: trains, measures and stores the result as a small JSON file."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from family_members import REFERENCE, Member, Settings, configuration

from mixgrpo.assembly import make_windows
from mixgrpo.checkpoint import CheckpointError
from mixgrpo.config import Config
from mixgrpo.files.revision import git_revision
from mixgrpo.run.stopping import TrainingStopped
from mixgrpo.run.tracking import read_metrics

TEST_CAPTIONS = Path(__file__).resolve().parents[2] / "data" / "shapes" / "prompts_test.txt"
SPEED_ITERATIONS = 5  # the first one warms up and is not counted
Record = Mapping[str, Any]
Train = Callable[[Config], Any]


@dataclass(frozen=True)
class Task:
    """A run, or a measurement of a member's speed.

    Attributes:
        seed: seed of the run; None measures the speed.
        iterations: ascending numbers of iterations after which the run is validated.
    """

    member: Member
    seed: int | None
    iterations: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.member.name}_{'speed' if self.seed is None else f'seed{self.seed}'}"

    def result(self, folder: Path, iterations: int) -> Path:
        """The file of the result after this many iterations."""
        return folder / "results" / f"{self.name}_{iterations}.json"

    def is_done(self, folder: Path) -> bool:
        return all(self.result(folder, iterations).exists() for iterations in self.iterations)


def perform(task: Task, settings: Settings, folder: Path, train: Train | None = None) -> None:
    """Trains to each of the task's iterations that has no result yet, and writes its result.

    A run that failed (for example with non-finite weights) gets a result with its error, and is
    retried once that file is deleted.

    Args:
        train: replaces mixgrpo.trainer.train.

    Raises:
        TrainingStopped: if a signal stopped it; the same call continues from its checkpoint.
        CheckpointError: if nothing can be saved.
    """
    if train is None:
        from transformers.utils.logging import disable_progress_bar

        from mixgrpo.trainer import train

        disable_progress_bar()
    run = folder / "runs" / task.name
    captions = write_captions(folder, settings.captions)
    config = configuration(task.member, settings, task.seed or 0, run, captions)
    planned = make_windows(config)
    if task.seed is None:
        _make_quick(config, task.member, settings)
    for iterations in task.iterations:
        path = task.result(folder, iterations)
        if path.exists():
            continue
        config.run.iterations = iterations
        found = _train(train, config, run)
        if task.seed is None and "error" not in found:
            starts = [planned.at(i).start for i in range(settings.iterations)]
            records = read_metrics(run)
            found = {
                "seconds_per_iteration": expected_seconds(records, starts),
                "base": scores_at(records, 0),
            }
        about = {"member": task.member.name, "seed": task.seed, "iterations": iterations}
        found = {**about, **found, "revision": git_revision()}
        write_whole(path, json.dumps(found, indent=1) + "\n")
    for bulky in ("checkpoints", "model", "pictures"):
        shutil.rmtree(run / bulky, ignore_errors=True)


def write_captions(folder: Path, count: int) -> Path:
    """The file of this many test captions; a caption's noise depends on its position in it."""
    (folder / "results").mkdir(parents=True, exist_ok=True)
    path = folder / "captions.txt"
    captions = itertools.cycle(TEST_CAPTIONS.read_text().splitlines())
    write_whole(path, "".join(f"{line}\n" for line in itertools.islice(captions, count)))
    return path


def _make_quick(config: Config, member: Member, settings: Settings) -> None:
    """Times an iteration at each window in a short run; MixGRPO's also scores the base model."""
    pace = config.window.iters_per_window * SPEED_ITERATIONS / settings.iterations
    config.window.iters_per_window = max(1, round(pace))
    if member.name == REFERENCE:
        config.validation.before = True
    else:
        config.validation.prompts = 1


def _train(train: Train, config: Config, run: Path) -> dict[str, Any]:
    run.mkdir(parents=True, exist_ok=True)
    try:
        with (run / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
            train(config)
    except CheckpointError:  # for example a full disk: the other runs would fail too
        raise
    except (RuntimeError, ValueError) as error:
        if isinstance(error, TrainingStopped) and error.exit_code > 128:
            raise
        return {"error": f"{type(error).__name__}: {error}"}
    return measured(read_metrics(run), config.run.iterations)


def measured(records: Sequence[Record], iterations: int) -> dict[str, Any]:
    """Scores after this many iterations, and the time that they took."""
    done = [r for r in records if r["iteration"] <= iterations and "window/start" in r]
    seconds = [seconds_of(record) for record in done]
    starts = [int(record["window/start"]) for record in done]
    return {
        "scores": scores_at(records, iterations),
        "seconds": sum(seconds),
        "seconds_per_iteration": median(seconds),
        "evaluations": {
            "rollout": fmean(record["rollout/evaluations_per_image"] for record in done),
            "update": fmean(record["update/evaluations_per_image"] for record in done),
        },
        "windows": {str(start): starts.count(start) for start in sorted(set(starts))},
    }


def scores_at(records: Sequence[Record], iterations: int) -> dict[str, float]:
    """The validation's scores by reward, after this many iterations."""
    return {
        key.removeprefix("validation/"): value
        for record in records
        if record["iteration"] == iterations
        for key, value in record.items()
        if key.startswith("validation/")
    }


def seconds_of(record: Record) -> float:
    """Seconds of one iteration: all phases except time that overlapped with other phases."""
    phases = (key for key in record if key.startswith("seconds/"))
    return sum(record[key] for key in phases if key != "seconds/reward_hidden")


def expected_seconds(records: Sequence[Record], starts: Sequence[int]) -> float:
    """Seconds per iteration of a run whose windows start so; medians at each start."""
    done = [r for r in records if "window/start" in r and r["iteration"] > 1]
    by_start: dict[int, list[float]] = {}
    for record in done:
        by_start.setdefault(int(record["window/start"]), []).append(seconds_of(record))
    otherwise = median(seconds_of(record) for record in done)
    return fmean(median(by_start.get(start, [otherwise])) for start in starts)


def at_equal_time(budget: float, seconds_per_iteration: float) -> int:
    """The number of iterations that a member does in this many seconds, at least one."""
    return max(1, round(budget / seconds_per_iteration))


def write_whole(path: Path, text: str) -> None:
    """Writes a file atomically, even if another process writes it at the same time."""
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)
