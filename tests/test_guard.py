"""A process that was asked to stop ends in time, whatever hangs in it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from forks import SOON, exit_code, forked, until
from tiny_world import ROOT, environment

from mixgrpo.commands.command_line import carry_out
from mixgrpo.commands.train import how_to_continue
from mixgrpo.config import Config, RunConfig
from mixgrpo.hosts.job import PARENT
from mixgrpo.run import guard
from mixgrpo.run.guard import Guard, end_without_gil_after
from mixgrpo.run.stopping import StopRequest


def a_thread_that_hangs(told: Path) -> None:
    (told.parent / "hangs").touch()
    time.sleep(600)


def waiting_for_a_thread(told: Path, grace: float) -> int:
    """A command that waits, as a training does, for a thread that hangs, whatever it is asked."""

    def action() -> None:
        with StopRequest().from_signals():
            thread = threading.Thread(target=a_thread_that_hangs, args=(told,))
            thread.start()
            while thread.is_alive():
                thread.join(600)

    return carry_out(action, (ValueError,), "all is saved", grace)


def hanging(told: Path) -> None:
    until((told.parent / "hangs").exists)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_after_its_grace_a_process_says_where_it_hangs_and_ends(tmp_path, number):
    told = tmp_path / "told"
    with forked(told, lambda: waiting_for_a_thread(told, 0.3)) as pid:
        hanging(told)
        os.kill(pid, number)
        assert exit_code(pid) == 128 + number
    assert f"still running 0 s (run.grace) after {number.name}" in told.read_text()
    assert "in a_thread_that_hangs" in told.read_text()
    assert "error: ended; all is saved" in told.read_text()


def test_a_second_ctrl_c_ends_a_process_at_once(tmp_path):
    told = tmp_path / "told"
    guard_twice = guard.TWICE

    def act() -> int:
        guard.TWICE = 0.3
        return waiting_for_a_thread(told, 600)

    with forked(told, act) as pid:
        hanging(told)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):  # the same, passed on
            os.kill(pid, number)
        time.sleep(0.5)
        os.kill(pid, signal.SIGTERM)  # SLURM repeats it
        time.sleep(0.2)
        assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        os.kill(pid, signal.SIGINT)
        assert exit_code(pid) == 128 + signal.SIGINT
    assert told.read_text() == "error: stopped at once by a second SIGINT; all is saved\n"
    assert guard_twice == guard.TWICE == 1.0


def test_only_the_first_process_says_what_is_saved(tmp_path):
    told = tmp_path / "told"
    with forked(told, lambda: waiting_for_a_thread(told, 0.2), RANK="1") as pid:
        hanging(told)
        os.kill(pid, signal.SIGTERM)
        assert exit_code(pid) == 128 + signal.SIGTERM
    assert "error (rank 1): still running" in told.read_text()
    assert "all is saved" not in told.read_text()


def test_a_process_whose_launcher_was_killed_ends(tmp_path):
    told = tmp_path / "told"
    gone = str(os.getppid())  # any process but the one that it is really started by
    with forked(told, lambda: waiting_for_a_thread(told, 0.2), **{PARENT: gone}) as pid:
        assert exit_code(pid) == 128 + signal.SIGTERM
    assert "the process that started this one has ended" in told.read_text()


def test_one_whose_launcher_lives_goes_on_and_its_children_know_nothing_of_it(monkeypatch):
    monkeypatch.setenv(PARENT, str(os.getppid()))
    monkeypatch.setattr(guard, "PERIOD", 0.02)
    with Guard(600, str):
        assert PARENT not in os.environ
        time.sleep(0.2)


def test_code_that_never_releases_the_gil_is_ended(tmp_path):
    told = tmp_path / "told"

    def act() -> int:
        end_without_gil_after(0.3)
        re.match(r"(a+)+$", "a" * 60 + "b")  # takes years, and hears no signal
        return 0

    with forked(told, act) as pid:
        assert exit_code(pid) == 1
    assert "Timeout" in told.read_text()
    assert "in act" in told.read_text()


def test_ctrl_z_suspends_and_a_timer_does_not_run_meanwhile(tmp_path):
    told = tmp_path / "told"

    def act() -> int:
        with Guard(600, str):
            end_without_gil_after(0.6)
            (tmp_path / "ready").touch()
            time.sleep(1.0)
        return 7

    with forked(told, act) as pid:
        until((tmp_path / "ready").exists)
        os.kill(pid, signal.SIGTSTP)
        stopped = os.WSTOPPED | os.WNOWAIT | os.WNOHANG
        until(lambda: os.waitid(os.P_PID, pid, stopped) is not None)
        time.sleep(0.8)
        os.kill(pid, signal.SIGCONT)
        assert exit_code(pid) == 7


def test_under_nohup_a_closed_terminal_changes_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest().from_signals():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_nobody_reads_does_not_keep_a_process(tmp_path):
    """As after Ctrl-S: whoever writes waits."""
    told = tmp_path / "told"
    read, write = os.pipe()

    def act() -> int:
        guard.SPEAKING = 0.2
        sys.stderr = os.fdopen(write, "w", buffering=1)
        os.set_blocking(write, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(write, b"x" * 4096)
        os.set_blocking(write, True)
        return waiting_for_a_thread(told, 0.2)

    with forked(told, act) as pid:
        hanging(told)
        os.kill(pid, signal.SIGTERM)
        assert exit_code(pid) == 128 + signal.SIGTERM
    os.close(read)
    os.close(write)


def test_what_is_saved_is_the_newest_checkpoint(tmp_path):
    config = Config(run=RunConfig(folder=str(tmp_path)))
    assert how_to_continue(config).startswith("nothing has been saved")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("iteration_00000004\n")
    assert "checkpoints/iteration_00000004; continue with --run.resume true" in how_to_continue(
        config
    )
    (tmp_path / "checkpoints" / "latest").unlink()
    os.mkfifo(tmp_path / "checkpoints" / "latest")
    assert how_to_continue(config).startswith("nothing has been saved")


# ---- output that cannot be written


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        ("| head -c 1", 0, ""),
        (">&-", 0, ""),
        ("2>&-", 0, "usage"),
        ("<&- >&- 2>&-", 0, ""),
        ("> /dev/full", 1, "error: standard output could not be written (No space left on device)"),
        ("> /dev/full 2>&1", 1, ""),
    ],
)
def test_output_that_cannot_be_written_ends_no_command(redirected, code, said):
    command = f"{sys.executable} -m mixgrpo --help {redirected}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SOON,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
