"""The paper's comparison in miniature: every recipe and the ablations, on the Shapes world.

    python scripts/benchmark/family.py --minutes 85     # run it again to continue
    python scripts/benchmark/family.py --report-only    # tables and plots from the results

Every finished run leaves a small JSON file in the folder; a run that was stopped leaves its
checkpoint. The results so far are collected in the output (JSON), with tables (.md) and plots
(.png) next to it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import monotonic

from family_members import KEY, Settings, members
from family_pool import Pool, pool
from family_report import report
from family_results import (
    collect,
    equal_times,
    keep_settings,
    read_speeds,
    speed_tasks,
    training_tasks,
)
from family_runs import Task, perform

from mixgrpo.files.disk import write_text_whole

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "benchmark" / "results"


# --- doing them -----------------------------------------------------------------------------------


def train_all(chosen: argparse.Namespace, settings: Settings) -> None:
    """Does the remaining runs until the time is over; prints a line for each run."""
    everyone = members(settings.iterations)
    begun = monotonic()
    deadline = begun + 60 * chosen.minutes
    work = partial(perform, settings=settings, folder=chosen.folder)
    with pool(chosen.parallel, work, deadline) as workers:
        if not _do(workers, speed_tasks(everyone), chosen.folder, begun):
            return
        speeds = read_speeds(chosen.folder)
        tasks = training_tasks(everyone, settings, equal_times(speeds, settings.iterations))
        _do(workers, tasks, chosen.folder, begun)


def _do(workers: Pool, tasks: Sequence[Task], folder: Path, begun: float) -> bool:
    waiting = [task for task in tasks if not task.is_done(folder)]
    count = len(tasks) - len(waiting)

    def tell(task: Task) -> None:
        nonlocal count
        count += 1
        last = json.loads(task.result(folder, task.iterations[-1]).read_text())
        scores = last.get("scores", {})
        said = last.get("error") or (
            f"all_right {scores['all_right']:.3f}" if "all_right" in scores
            else f"{last['seconds_per_iteration']:.2f} s per iteration"
        )  # fmt: skip
        minutes = (monotonic() - begun) / 60
        print(f"{minutes:5.1f} min  {count:3d}/{len(tasks)}  {task.name}: {said}", flush=True)

    return workers.run(waiting, tell)


# --- the report ----------------------------------------------------------------------------------


def write_report(output: Path) -> str:
    """Writes the .md and .png files next to the JSON; returns the Markdown.

    Raises:
        FileNotFoundError: if the JSON does not exist.
    """
    from family_plots import plot_ablations, plot_recipes

    if not output.is_file():
        raise FileNotFoundError(f"{output} does not exist; run without --report-only first")
    found = json.loads(output.read_text())
    remarks = output.with_name(f"{output.stem}_comments.json")
    comments = json.loads(remarks.read_text()) if remarks.is_file() else {}
    text = report(found, comments)
    write_text_whole(output.with_suffix(".md"), text)
    plot_recipes(found, output.with_name(f"{output.stem}_recipes.png"))
    plot_ablations(found, output.with_name(f"{output.stem}_ablations.png"))
    return text


# --- the command ----------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, usual = parser.add_argument, Settings()
    add(
        "--minutes",
        type=float,
        default=85.0,
        help="time limit; stopped runs continue the next time",
    )
    add("--parallel", type=int, default=2, help="number of concurrent runs, with one thread each")
    add("--iterations", type=int, default=usual.iterations, help="iterations of every run")
    add("--prompts", type=int, default=usual.prompts, help="prompts per iteration")
    add(
        "--learning-rate",
        type=float,
        default=usual.learning_rate,
        help="learning rate of every recipe",
    )
    add("--captions", type=int, default=usual.captions, help="captions of the validation")
    add("--seeds", type=int, nargs="+", default=usual.seeds, help="seeds of the recipes")
    add("--key-seeds", type=int, nargs="*", default=usual.key_seeds,
        help=f"additional seeds of {', '.join(KEY)}")  # fmt: skip
    add("--ablation-seeds", type=int, nargs="*", default=usual.ablation_seeds)
    add("--folder", type=Path, default=ROOT / "runs" / "family", help="folder of the runs")
    add(
        "--output", type=Path, default=RESULTS / "family.json", help="file of the collected results"
    )
    add("--report-only", action="store_true", help="only write tables and plots from the output")
    chosen = parser.parse_args(arguments)
    for name in ("minutes", "parallel", "iterations", "prompts", "captions"):
        if getattr(chosen, name) <= 0:
            parser.error(f"--{name} must be positive")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    if not chosen.report_only:
        settings = Settings(
            iterations=chosen.iterations,
            prompts=chosen.prompts,
            learning_rate=chosen.learning_rate,
            captions=chosen.captions,
            seeds=tuple(chosen.seeds),
            key_seeds=tuple(chosen.key_seeds),
            ablation_seeds=tuple(chosen.ablation_seeds),
        )
        try:
            _measure(chosen, settings)
        except (ValueError, RuntimeError, StopIteration) as error:
            sys.exit(f"error: {error}")
    try:
        print(write_report(chosen.output))
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    return 0


def _measure(chosen: argparse.Namespace, settings: Settings) -> None:
    import torch
    from environment import environment

    torch.set_num_threads(1)
    os.chdir(ROOT)  # the recipes name the files of data/shapes from there
    keep_settings(chosen.folder, settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the workers must not outlive it
    try:
        train_all(chosen, settings)
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", flush=True)
    more = {"settings": {**asdict(settings), "parallel": chosen.parallel}}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = collect(chosen.folder, settings, {**environment(device), **more})
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    write_text_whole(chosen.output, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
