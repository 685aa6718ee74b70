"""The family on the Shapes world: as many of ``family.py``'s runs as fit into the time left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import sleep

from gpu.job import Job, main

SCRIPT = Path(__file__).resolve().parents[1] / "family.py"
SAVING = 25.0  # seconds that are left for ending: runs save a checkpoint when they are stopped
ENOUGH = 2  # runs, with small
PARALLEL = 6  # trainings of small models at a time on one GPU
SMALL = ("--iterations", "2", "--prompts", "1", "--captions", "4", "--parallel", "2")


def perform(job: Job) -> None:
    # Of the runs themselves nothing is kept: next time they are to be timed again.
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        train(job, folder)
        for path in ended(folder):
            found = json.loads(path.read_text())
            scores = found.get("scores", {})
            job.report(
                path.stem,
                seconds_per_iteration=found.get("seconds_per_iteration"),
                all_right=scores.get("all_right"),
                error=found.get("error"),
            )
        if not ended(folder):
            raise RuntimeError("not one run of family.py has ended; the log says why")
        job.report("runs", done=len(ended(folder)))


def train(job: Job, folder: Path) -> None:
    """Lets family.py train until the time is over or, with ``small``, enough runs have ended."""
    seconds = max(10.0, job.left() - SAVING)
    words = [sys.executable, str(SCRIPT), "--minutes", f"{seconds / 60:.3f}"]
    words += ["--folder", str(folder), "--output", str(folder / "family.json")]
    words += SMALL if job.small else ("--parallel", str(PARALLEL))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if job.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    # What it prints goes to this part's log; a table that lacks runs is no failure.
    process = subprocess.Popen(words, env=environment)
    while process.poll() is None:
        if job.small and len(ended(folder)) >= ENOUGH:
            process.terminate()
            process.wait()
        sleep(0.2)


def ended(folder: Path) -> list[Path]:
    """The results of the runs that have ended."""
    return sorted((folder / "results").glob("*.json"))


if __name__ == "__main__":
    main("shapes", perform)
