"""A training on two hosts, one of which is cut off in the middle; the script's own way.

The hosts are network namespaces of this machine with an sshd each. In continuous integration
MIXGRPO_TWO_HOSTS=required makes a machine on which there can be none a failure.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import hosts_world
import pytest
from hosts_world import Hosts, two_hosts
from tiny_world import QUICK, REWARDS, ROOT, Gate, World, environment, training_records

pytestmark = pytest.mark.slow

CANARY = "canary0123456789canary0123456789canary01"
LOST_AFTER = 6  # seconds


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    reason = hosts_world.missing()
    if reason:
        is_required = os.environ.get("MIXGRPO_TWO_HOSTS") == "required"
        (pytest.fail if is_required else pytest.skip)(f"no hosts: {reason}")
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A repository whose hostfile names the two hosts, with this Python."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copytree(ROOT / "hosts", tmp_path / "hosts")
    (tmp_path / "hosts" / "hostfile").write_text("first slots=2 # meet here\nsecond slots=2\n")
    (tmp_path / "env_setup.sh").write_text("")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return tmp_path


def start(place: Path, hosts: Hosts, words: list[str], **more: str) -> subprocess.Popen[str]:
    command = ["bash", "scripts/finetune/finetune_flux_mixgrpo.sh", *words]
    return subprocess.Popen(
        hosts.inside(*command),
        cwd=place,
        env=environment(**hosts.environment, WANDB_API_KEY=CANARY, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_until(running: subprocess.Popen[str], text: str) -> str:
    """What it says, to the line with this text."""
    assert running.stdout is not None
    said = ""
    for line in running.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(said)


def process_list() -> str:
    """Of all hosts, which share this machine."""
    return subprocess.run(
        ["ps", "axww", "-o", "args"], check=True, capture_output=True, text=True
    ).stdout


def files_with(text: str, *folders: Path) -> list[Path]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    return [path for path in files if text.encode() in path.read_bytes()]


def parts_left(place: Path) -> list[Path]:
    """Files in which a host is told its part of a job of this place."""
    left = []
    for path in Path("/tmp").glob("mixgrpo-*.json"):
        with suppress(FileNotFoundError):  # another test's, which has been taken
            left += [path] if str(place) in path.read_text() else []
    return left


def test_a_host_cut_off_ends_the_run_which_goes_on_when_it_is_back(
    world: World, place: Path, hosts: Hosts
) -> None:
    folder, gate = place / "a run", Gate(place, call=3)  # validation, first and second iteration
    knobs = {**QUICK, "run__iterations": 3, "batch__prompts": 4, "checkpoint__every": 1}
    knobs["checkpoint__asynchronous"] = False  # the first is whole when the second iteration begins
    words = world.arguments(folder, **knobs, rewards={"redness": REWARDS["redness"]})[1:]
    recipe = place / "scripts" / "recipes" / "tiny.yaml"
    recipe.write_text('log:\n  project: "it\'s %h $HOME"\n')
    options = ["--lost-after", str(LOST_AFTER), "--max-restarts", "1", "--wait", "300"]
    running = start(place, hosts, [*options, "--recipe", str(recipe), *words], **gate.environment)
    assert running.stdout is not None
    try:
        gate.wait_until_reached(running)
        assert "mixgrpo train" in process_list()
        assert CANARY not in process_list()
        hosts.cut_off(1)
        told = read_until(running, "lost second")
        gate.open()
        told += read_until(running, "waiting up to 300 s for second")
        hosts.bring_back(1)
        rest = running.stdout.read()
        assert running.wait(timeout=600) == 0, rest
    finally:
        running.kill()
        hosts.bring_back(1)
    assert "restart 1 of 1" in told
    assert "iterations 2 to 3 on 4 x cpu" in rest
    assert [record["iteration"] for record in training_records(folder)] == [1, 2, 3]
    saved = json.loads((folder / "config.json").read_text())
    assert saved["config"]["log"]["project"] == "it's %h $HOME"
    for name in hosts_world.NAMES:
        assert "attempt 2" in (folder / "logs" / f"{name}.log").read_text()
    assert not files_with(CANARY, place, hosts.root)
    assert not parts_left(place)
