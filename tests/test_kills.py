"""Training processes killed (SIGKILL) at the worst moments: resumed, the run is the same run."""

from __future__ import annotations

import os
import signal
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny_world
from processes import started
from tiny_world import (
    World,
    checkpoint_folder,
    copy_run,
    records,
    same,
    saved_tensors,
    train_here,
    training_records,
    without_times,
)

from mixgrpo import checkpoint as checkpoints
from mixgrpo.commands import main

pytestmark = pytest.mark.slow

ITERATIONS = 4
KNOBS = {
    "run__iterations": ITERATIONS,
    "validation__every": 0,
    "validation__steps": 2,
    "validation__prompts": 2,
    "validation__pictures": 0,
    "checkpoint__every": 1,
    "checkpoint__keep": 0,
}


def _train(words: list[str], place: str, call: int) -> None:
    """Trains; rank 1 dies at the ``call``-th time that it comes to the place."""
    calls = count(1)
    fsync = os.fsync

    def die_in_time(*given: Any) -> None:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    def flushing(handle: int) -> None:
        die_in_time()
        fsync(handle)

    if os.environ["RANK"] == "1" and place == "a rollout":
        tiny_world._wait_at_gate = die_in_time
    if os.environ["RANK"] == "1" and place == "a save":
        os.fsync = flushing
    with mock.patch("mixgrpo.report.summary.summarize", return_value=""):
        raise SystemExit(main(words))


def run(
    world: World, folder: Path, place: str = "", call: int = 0, count: int = 2, **knobs: Any
) -> list[int]:
    """Exit codes of processes that train; the second is killed at the place."""
    words = world.arguments(folder, **{**KNOBS, **knobs})
    processes = started(count, _train, words, place, call)
    for process in processes:
        process.join(600)
        process.kill()
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run(world, folder) == [0, 0]
    return folder


def test_killed_in_a_rollout_and_in_a_save_the_run_is_the_same(world, folder, uninterrupted):
    # One validation and two iterations come before the third one's rewards.
    assert run(world, folder, "a rollout", 4) == [1, -signal.SIGKILL]
    first = checkpoints.open_saved(checkpoints.latest(folder / "checkpoints")).position.iteration
    assert 1 <= first <= 2
    assert run(world, folder, "a save", 2, run__resume=True) == [1, -signal.SIGKILL]
    newest = checkpoints.latest(folder / "checkpoints")
    assert checkpoints.open_saved(newest).position.iteration == first
    assert run(world, folder, run__resume=True) == [0, 0]

    last, expected = (checkpoint_folder(f, ITERATIONS) for f in (folder, uninterrupted))
    for part in ("model", "ema", "optimizer"):
        assert same(saved_tensors(last, part), saved_tensors(expected, part)), part
    assert without_times(records(folder)) == without_times(records(uninterrupted))


def test_what_two_processes_saved_one_continues(world, uninterrupted, folder):
    copy_run(uninterrupted, folder, 2)
    train_here(world.config(folder, **KNOBS, run__resume=True))
    assert_continues(folder, uninterrupted)


@pytest.mark.four_processes
def test_what_four_processes_saved_two_continue(world, tmp_path):
    """By hand: pytest -m four_processes."""
    four, two = tmp_path / "four", tmp_path / "two"
    assert run(world, four, count=4, batch__prompts=4) == [0, 0, 0, 0]
    copy_run(four, two, 2)
    assert run(world, two, batch__prompts=4, run__resume=True) == [0, 0]
    assert_continues(two, four)


def assert_continues(folder: Path, uninterrupted: Path) -> None:
    """From iteration 3 on, but for the rounding of other batch shapes."""
    ours, theirs = (training_records(f)[2:] for f in (folder, uninterrupted))
    assert [record["iteration"] for record in ours] == [3, 4]
    for one, two in zip(ours, theirs, strict=True):
        for key in ("update/loss", "update/grad_norm", "reward/redness", "reward/contrast"):
            assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-6), key
    model, expected = (
        saved_tensors(checkpoint_folder(f, ITERATIONS)) for f in (folder, uninterrupted)
    )
    assert all((model[name] - expected[name]).abs().max() < 1e-5 for name in expected)
