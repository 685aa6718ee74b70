"""A process that hangs tells where, and so do those that wait for it."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import Command
from tiny_world import CPU, QUICK, World

from mixgrpo.assembly import watched
from mixgrpo.config import RewardConfig
from mixgrpo.engines.distributed import Process
from mixgrpo.run import watchdog
from mixgrpo.run.tracking import Phases
from mixgrpo.run.watchdog import Watchdog

TIMEOUT = timedelta(seconds=20)


class Clock:
    """The watchdog's, which goes only as far as it is told: no slow machine runs out of patience.

    In a process that was forked it goes on alone.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.looks = 0

    def __call__(self) -> float:
        self.looks += threading.current_thread().name == "watchdog"
        return self.seconds

    def let_pass(self, seconds: float) -> None:
        """Returns once the watchdog has looked at what time it is then."""
        self.seconds += seconds
        seen = self.looks + 1  # it may be at one look already
        while self.looks <= seen:
            time.sleep(0.01)


def a_reward_that_hangs(clock: Clock) -> None:
    clock.seconds += 100
    time.sleep(600)


def a_collective_that_waits(begun: Path) -> None:
    begun.touch()
    time.sleep(600)


def forked(told: Path, act: Callable[[], None]) -> int:
    """Number of a process that does this, its standard error going to a file."""
    pid = os.fork()
    if pid:
        return pid
    try:
        sys.stderr = told.open("w")
        act()
        os._exit(0)
    except BaseException:
        os._exit(99)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(watchdog, "PERIOD", 0.02)
    monkeypatch.setattr(watchdog, "TELLING", 1.0)
    clock = Clock()
    monkeypatch.setattr(watchdog, "monotonic", clock)
    return clock


def test_a_process_that_hangs_tells_where(tmp_path, hasty):
    def act() -> None:
        with Watchdog(4, Process(0, 1, CPU)) as dog:
            dog.progress("reward")
            a_reward_that_hangs(hasty)

    assert exit_code(forked(tmp_path / "told", act)) == 1
    told = (tmp_path / "told").read_text()
    assert re.match(
        r"error \(rank 0\): no progress for 4 s \(run.patience\); this process has been in phase "
        r"'reward' for 100 s; its threads are at\n",
        told,
    )
    assert "in a_reward_that_hangs" in told


def test_every_process_tells_its_place(tmp_path, hasty, monkeypatch):
    """Also one whose own patience is far from its end."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def waits() -> None:
        with Watchdog(600, Process(0, 2, CPU)) as dog:
            dog.progress("update")
            a_collective_that_waits(tmp_path / "waiting")

    def hangs() -> None:
        with Watchdog(8, Process(1, 2, CPU)) as dog:
            dog.progress("reward")
            while not (tmp_path / "waiting").exists():
                time.sleep(0.01)
            a_reward_that_hangs(hasty)

    processes = [forked(tmp_path / "0", waits), forked(tmp_path / "1", hangs)]
    assert [exit_code(process) for process in processes] == [1, 1]
    assert "error (rank 0): rank 1 makes no progress; " in (tmp_path / "0").read_text()
    assert "in a_collective_that_waits" in (tmp_path / "0").read_text()
    assert "error (rank 1): no progress" in (tmp_path / "1").read_text()
    assert "in a_reward_that_hangs" in (tmp_path / "1").read_text()


def test_evaluations_are_signs_of_life(tmp_path, hasty):
    """A phase may take longer than the patience if it goes on; its name stays."""

    def act() -> None:
        with Watchdog(4, Process(0, 1, CPU)) as dog:
            dog.progress("update")
            evaluate = watched(lambda x, sigma, text: x, dog.beat)
            for _ in range(3):
                hasty.seconds += 3
                evaluate(None, None, None)
            a_reward_that_hangs(hasty)

    assert exit_code(forked(tmp_path / "told", act)) == 1
    assert "in phase 'update' for 100 s" in (tmp_path / "told").read_text()


@pytest.mark.parametrize("patience", [0, 0.8])
def test_progress_or_no_limit_keeps_it_still(tmp_path, hasty, patience):
    def act() -> None:
        with Watchdog(patience, Process(0, 1, CPU)) as dog:
            assert dog._thread.is_alive() == bool(patience)
            for _ in range(8 if patience else 0):
                dog.progress("rollout")
                hasty.let_pass(0.2)
        hasty.seconds += 100  # it is over
        time.sleep(0.5)

    assert exit_code(forked(tmp_path / "told", act)) == 0
    assert (tmp_path / "told").read_text() == ""


def test_phases_say_where_a_process_is():
    places: list[str] = []
    phases = Phases(torch.device("cpu"), places.append)
    with phases("rollout"), phases("decode"):
        pass
    assert places == ["rollout", "decode", "rollout", "between phases"]


@pytest.mark.slow
def test_a_hung_reward_ends_a_training(world: World, folder: Path):
    rewards = {"stuck": RewardConfig(kind="tiny_world:stuck")}
    words = world.arguments(folder, **QUICK, run__patience=15, rewards=rewards)
    done = Command(words, folder)
    assert done.wait() == [1]
    assert "no progress for 15 s (run.patience); this process has been in phase" in done.stderr
    assert "in stuck" in done.stderr  # the rewards' thread
    assert "trainer.py" in done.stderr  # the one that waits for it
