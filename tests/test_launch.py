"""The launch command: torchrun, whose own complaints do not bury a process's."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from unittest import mock

import pytest
from tiny_world import ROOT, environment

from mixgrpo.__main__ import run as run_main
from mixgrpo.commands import launch as launch_command
from mixgrpo.commands import main
from mixgrpo.commands.command_line import GRACE, grace_of
from mixgrpo.commands.train import parse

LAUNCH = [sys.executable, "-m", "mixgrpo", "launch", "--nproc_per_node", "2"]


def launch(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*LAUNCH, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_a_mistyped_knob_is_told_of_once_and_alone():
    done = launch("train", "--recipe", "shapes_mixgrpo", "--update.lerning_rate", "1")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: there is no knob update.lerning_rate; did you mean update.learning_rate?"
    ]


def test_without_a_command_it_says_how_to_call_it():
    done = launch("trian")
    assert done.returncode == 2
    assert "usage: python -m mixgrpo launch" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nproc_per_node", "two", "train"], "--nproc_per_node is 'two'"),
        (["--nproc_per_node", "0", "train"], "--nproc_per_node is '0'"),
        (["--nproc_per_node", "2", "trian"], "did you mean 'train'?"),
        (["--nprocs", "2", "train"], "usage: python -m mixgrpo launch"),
        (["--nproc_per_node", "1000", "train"], "--nproc_per_node is 1000, but this host has"),
        (["--nproc_per_node", "\u00b2", "train"], "must be a positive whole number"),
        (["--nnodes", "0", "train"], "--nnodes is '0'"),
        (["--nnodes", "x", "train"], "--nnodes is 'x'"),
        (["--nnodes", "2:1", "train"], "--nnodes is '2:1'"),
        (["--nnodes", "2", "--node_rank", "2", "train"], "--node_rank is 2, but --nnodes is 2"),
        (["--nnodes", "2", "--master_port", "99999", "train"], "--master_port is 99999"),
        (["--nnodes", "2", "--standalone", "train"], "--standalone is for one host"),
        (["--max_restarts", "-1", "train"], "max_restarts must be >= 0"),
        (["--rdzv_conf", "x", "train"], "'x' must have a value"),
        (["--nnodes", "2", "--rdzv_backend", "nope", "train"], "'nope' is not registered"),
    ],
)
def test_mistyped_options_are_one_line(capfd, words, said):
    assert main(["launch", *words]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert said in line


@dataclass
class Failure:
    exitcode: int


@pytest.mark.parametrize(
    ("exit_codes", "expected"),
    [
        ([], 33),  # told to stop: it may save
        ([143], 33),  # another was told to, and has saved already
        ([129], 33),
        ([1], launch_command.FAILED_PATIENCE),
        ([143, -9], launch_command.FAILED_PATIENCE),
    ],
)
def test_processes_get_their_time_only_if_none_has_failed(exit_codes, expected):
    context = mock.Mock(_failures={i: Failure(code) for i, code in enumerate(exit_codes)})
    close = mock.Mock()
    launch_command._closing(close, grace=33)(context, signal.SIGTERM)
    close.assert_called_once_with(context, signal.SIGTERM, expected)


def test_a_signal_that_comes_twice_ends_the_launcher_no_sooner():
    heard = mock.Mock()
    handler = launch_command._heeded_once(heard)
    handler(signal.SIGTERM, None)
    handler(signal.SIGTERM, None)
    heard.assert_called_once_with(signal.SIGTERM, None)


def test_the_time_to_save_is_the_runs():
    assert grace_of(parse(["--run.grace", "77"])) == 77
    assert grace_of(object()) == GRACE


def test_an_unforeseen_error_of_a_process_names_its_rank(monkeypatch, capfd):
    monkeypatch.setattr("mixgrpo.__main__.main", mock.Mock(side_effect=KeyError("unforeseen")))
    with pytest.raises(KeyError):
        run_main()
    monkeypatch.setenv("RANK", "3")
    assert run_main() == 1
    told = capfd.readouterr().err
    assert told.startswith("error (rank 3):\nTraceback (most recent call last):")
    assert told.endswith("KeyError: 'unforeseen'\n")


def test_help_says_where_the_options_are(capfd):
    assert main(["launch", "--help"]) == 0
    assert "COMMAND --help" in capfd.readouterr().out


def test_what_a_process_complains_of_is_not_buried():
    done = launch("train", "--recipe", "shapes_mixgrpo", "--batch.prompts", "3")
    assert done.returncode == 1
    assert "batch.prompts (3) must be a multiple of the number of processes (2)" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2


DEADLY = """
import os, signal, time
def reward(images, texts):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_process_that_was_killed_is_told_of_and_takes_a_hung_one_along(tmp_path):
    (tmp_path / "deadly.py").write_text(DEADLY)
    done = subprocess.run(
        [*LAUNCH, "train", "--recipe", "shapes_mixgrpo", "--run.folder", str(tmp_path / "run"),
         "--rewards.mine.kind", "deadly:reward", "--validation.prompts", "2"],
        cwd=ROOT, env=environment(PYTHONPATH=f"{tmp_path}:{ROOT}"),
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGKILL
    assert "was killed by SIGKILL" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_told_in_a_sentence(capfd):
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        several = ["--nnodes", "2", "--master_port", port]
        assert main(["launch", *several, "train", "--recipe", "shapes_mixgrpo"]) == 1
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error"))
    assert f"port {port} of this host is in use" in line


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_save_and_end(tmp_path):
    folder = tmp_path / "run"
    words = ["train", "--recipe", "shapes_mixgrpo", "--run.folder", str(folder)]
    small = ["--validation.prompts", "2", "--batch.prompts", "2", "--log.progress", "false"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [*LAUNCH, *words, *small], cwd=ROOT, env=environment(), stderr=said
        )
    deadline = time.monotonic() + 600
    while not (folder / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait(60)
    while "error: stopped by SIGTERM" not in (tmp_path / "said").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (folder / "checkpoints" / "latest").exists()
    handle = os.open(folder, os.O_RDONLY)
    while time.monotonic() < deadline:  # the folder is free again
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        time.sleep(0.1)
    os.close(handle)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_ends_all_processes(tmp_path, number):
    folder = tmp_path / "run"
    arguments = ["train", "--recipe", "shapes_mixgrpo", "--run.folder", str(folder)]
    small = ["--validation.prompts", "2", "--batch.prompts", "2", "--log.progress", "false"]
    process = subprocess.Popen(
        [*LAUNCH, *arguments, *small],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 600
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None, "it ended before the signal"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 128 + number
    assert "continue with --run.resume true" in errors
    assert "Traceback" not in errors
    assert (folder / "checkpoints" / "latest").exists()


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ({}, "None 1000"),
        ({"LOCAL_WORLD_SIZE": "1"}, "None 1000"),
        ({"LOCAL_WORLD_SIZE": "2"}, "passive None"),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_WAIT_POLICY": "active"}, "active None"),
        ({"GOMP_SPINCOUNT": "7"}, "None 7"),
        ({"LOCAL_WORLD_SIZE": "0"}, "None 1000"),
        ({"LOCAL_WORLD_SIZE": "x"}, "passive None"),  # reported later
    ],
)
def test_threads_sleep_where_processes_share_the_cores(given: dict[str, str], policy: str) -> None:
    """Before torch is imported, which reads it."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "LOCAL_WORLD_SIZE")
    others = {name: value for name, value in os.environ.items() if name not in names}
    shown = (
        "import os, sys, mixgrpo.__main__; "
        "print(*map(os.environ.get, ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", shown],
        env={**others, **given},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"{policy} False"
