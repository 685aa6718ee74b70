"""Checkpoints: exact, whole or not at all, whatever fails and whenever the process dies."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import resource
import signal
import time
from dataclasses import replace
from itertools import count
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from tiny_world import environment, same

from mixgrpo import checkpoint as checkpoints
from mixgrpo.checkpoint import Checkpoint, CheckpointError, latest, load, save

ELEMENTS = 30_000


def example(iteration: int) -> Checkpoint:
    """Its tensors tell the iteration."""
    generator = torch.Generator().manual_seed(iteration)
    weights = {
        "a.weight": torch.full([ELEMENTS], float(iteration)),
        "b.weight": torch.randn(3, 5, generator=generator),
        "b.half": torch.randn(7, generator=generator).bfloat16(),
    }
    moments = {
        "step": torch.tensor(float(iteration)),
        "exp_avg": torch.randn(4, generator=generator),
        "exp_avg_sq": torch.rand(4, generator=generator),
    }
    optimizer = {
        "state": {0: moments},
        "param_groups": [{"lr": 1e-5, "betas": (0.9, 0.999), "fused": None, "params": [0]}],
    }
    return Checkpoint(
        iteration=iteration,
        weights=weights,
        ema={name: weight * 0.5 for name, weight in weights.items()},
        ema_updates=iteration * 3,
        engine={"optimizer": optimizer, "schedule": {"last_epoch": iteration}},
        config={"update.learning_rate": 1e-5, "rewards.a.options": {}, "window.envelope": [0, 9]},
    )


def assert_whole(path: Path | None, iteration: int) -> None:
    assert path is not None
    expected, found = example(iteration), load(path)
    for part in ("iteration", "weights", "ema", "ema_updates", "engine", "config"):
        assert same(getattr(expected, part), getattr(found, part)), part


def partials(root: Path) -> list[Path]:
    return list(root.glob("partial_*"))


def test_what_is_saved_is_read_back_exactly(tmp_path):
    path = save(tmp_path / "checkpoints", example(25), keep=2)
    assert path == tmp_path / "checkpoints" / "iteration_00000025"
    assert latest(tmp_path / "checkpoints") == path
    assert_whole(path, 25)


def test_without_an_average(tmp_path):
    save(tmp_path, replace(example(1), ema={}), keep=0)
    assert load(latest(tmp_path)).ema == {}


def test_no_checkpoint_yet(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4])])
def test_the_newest_are_kept(tmp_path, keep, left):
    for iteration in (1, 2, 3, 4):
        save(tmp_path, example(iteration), keep)
    names = sorted(path.name for path in tmp_path.glob("iteration_*"))
    assert names == [f"iteration_{iteration:08d}" for iteration in left]
    assert_whole(latest(tmp_path), 4)


@pytest.mark.parametrize("keep", [1, 2])
def test_after_going_back_to_an_older_one_the_new_one_is_kept(tmp_path, keep):
    """What the message about a damaged checkpoint advises must not lose what is saved next."""
    for iteration in (10, 20, 30):
        save(tmp_path, example(iteration), keep=0)
    (tmp_path / "latest").write_text("iteration_00000010\n")
    save(tmp_path, example(15), keep)
    assert_whole(latest(tmp_path), 15)


def test_the_same_iteration_is_saved_twice(tmp_path):
    """As by a signal right after a checkpoint that was due."""
    for _ in range(2):
        save(tmp_path, example(5), keep=1)
        assert_whole(latest(tmp_path), 5)


def test_a_checkpoint_from_before_going_back_is_replaced(tmp_path):
    for iteration in (10, 20):
        save(tmp_path, example(iteration), keep=0)
    (tmp_path / "latest").write_text("iteration_00000010\n")
    save(tmp_path, replace(example(20), ema_updates=99), keep=0)
    assert load(latest(tmp_path)).ema_updates == 99


def test_abandoned_partial_folders_are_removed(tmp_path):
    abandoned = tmp_path / "partial_iteration_00000007"
    abandoned.mkdir()
    (abandoned / "weights.safetensors").write_bytes(b"half")
    assert latest(tmp_path) is None
    save(tmp_path, example(8), keep=1)
    assert partials(tmp_path) == []


# ---- a write that fails


WRITES = [
    *[(checkpoints, "save_file", call) for call in (1, 2)],
    (torch, "save", 1),
    (Path, "mkdir", 2),
    *[(Path, "write_text", call) for call in (1, 2)],
    *[(os, "fsync", call) for call in range(1, 8)],
    (Path, "rename", 1),
    (os, "replace", 1),
]


def fail_at(patch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """From now on, this function's ``call``-th call finds the disk full."""
    real, calls = getattr(owner, name), count(1)

    def failing(*given, **named):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given, **named)

    patch.setattr(owner, name, failing)


@pytest.mark.parametrize(("owner", "name", "call"), WRITES)
def test_a_full_disk_leaves_what_was_saved(tmp_path, monkeypatch, owner, name, call):
    save(tmp_path, example(1), keep=1)
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, call)
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, example(2), keep=1)
    message = str(caught.value)
    assert "No space left on device" in message
    assert str(latest(tmp_path)) in message
    assert "free some disk space" in message
    assert "--run.resume true" in message
    assert "\n" not in message
    assert_whole(latest(tmp_path), 1)
    assert partials(tmp_path) == []

    save(tmp_path, example(2), keep=1)
    assert_whole(latest(tmp_path), 2)


@pytest.mark.parametrize(("owner", "name", "call"), WRITES)
def test_saving_an_iteration_again_cannot_lose_it(tmp_path, monkeypatch, owner, name, call):
    save(tmp_path, example(1), keep=1)
    with monkeypatch.context() as patch, contextlib.suppress(CheckpointError):
        fail_at(patch, owner, name, call)
        save(tmp_path, example(1), keep=1)
    assert_whole(latest(tmp_path), 1)


def test_a_full_disk_at_the_first_checkpoint(tmp_path, monkeypatch):
    fail_at(monkeypatch, checkpoints, "save_file", 1)
    with pytest.raises(CheckpointError, match=r"none was saved before.*free some disk space"):
        save(tmp_path, example(1), keep=1)
    assert latest(tmp_path) is None
    assert partials(tmp_path) == []


# ---- other processes: files that may not grow, and kill -9. They start without pytest's threads.


@pytest.fixture(scope="module")
def processes():
    """Forked from a process that has imported torch once, but has none of this one's threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_checkpoint"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        forkserver.ensure_running()
    return context


def _save_on_a_full_disk(root: str, limit: int, said: str) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as on a full disk, an error and not a death
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save(Path(root), example(2), keep=1)
    except CheckpointError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path(said).write_text(str(error))


@pytest.mark.parametrize("limit", [ELEMENTS * 2, 200], ids=["the weights", "every file"])
def test_a_file_that_cannot_grow_leaves_what_was_saved(tmp_path, processes, limit):
    root, said = tmp_path / "checkpoints", tmp_path / "said"
    save(root, example(1), keep=1)
    child = processes.Process(target=_save_on_a_full_disk, args=(str(root), limit, str(said)))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert "free some disk space" in said.read_text()
    assert_whole(latest(root), 1)
    assert partials(root) == []


def _save_for_ever(root: str, first: int) -> None:
    torch.set_num_threads(1)
    for number in count(2 * first):
        save(Path(root), example(number // 2), keep=1)  # each is saved twice


def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(tmp_path, processes):
    root = tmp_path / "checkpoints"
    save(root, example(1), keep=1)
    for delay in [0.0015 * number for number in range(20)]:  # a save takes a few milliseconds
        before = (root / "latest").read_text()
        first = int(before.split("_")[1]) + 1
        child = processes.Process(target=_save_for_ever, args=(str(root), first))
        child.start()
        while child.is_alive() and (root / "latest").read_text() == before:
            time.sleep(0.001)
        time.sleep(delay)
        child.kill()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        found = latest(root)
        assert_whole(found, int(found.name.split("_")[1]))


# ---- damaged


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [truncate, empty, zeros, Path.unlink])
@pytest.mark.parametrize(
    "name", ["weights.safetensors", "ema.safetensors", "optimizer.pt", "state.json"]
)
def test_a_damaged_file_is_named_with_the_way_out(tmp_path, name, damage):
    save(tmp_path, example(1), keep=0)
    newest = save(tmp_path, example(2), keep=0)
    damage(newest / name)
    with pytest.raises(CheckpointError) as caught:
        load(latest(tmp_path))
    message = str(caught.value)
    assert str(newest) in message or newest.name in message
    assert "latest" in message
    assert "\n" not in message
    (tmp_path / "latest").write_text("iteration_00000001\n")
    assert_whole(latest(tmp_path), 1)


def test_a_pointer_to_nothing_is_an_error(tmp_path):
    save(tmp_path, example(1), keep=0)
    (tmp_path / "latest").write_text("iteration_00000009\n")
    with pytest.raises(CheckpointError, match="'iteration_00000009', which is not there"):
        latest(tmp_path)
