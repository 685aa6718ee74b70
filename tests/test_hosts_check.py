"""Comparing hosts: facts, differences with their remedies, the table, the whole command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import hosts_here
import pytest
from tiny_world import ROOT, World, environment

from mixgrpo.commands import main
from mixgrpo.config import Config, RewardConfig, flatten
from mixgrpo.files.revision import exact_revision, git_revision
from mixgrpo.hosts import check
from mixgrpo.hosts.check import Report, complaints, data_paths, table
from mixgrpo.hosts.facts import Facts

FACTS = Facts(
    python="3.11.7",
    packages={"torch": "2.11.0", "wandb": "0.31.0"},
    revision="0123456789abcdef",
    files={"prompts.txt": "10 bytes, aa"},
    gpus="8 x H100",
    driver="570.1",
)


def said(*facts: Facts, **report: object) -> list[str]:
    """The complaints of hosts a, b, ... with these facts; ``report`` changes the last one's."""
    reports = {"abc"[i]: Report(facts=each) for i, each in enumerate(facts)}
    last = list(reports)[-1]
    reports[last] = replace(reports[last], **report)  # type: ignore[arg-type]
    return list(complaints(reports, list(FACTS.files)))


def test_two_hosts_with_other_changes_have_other_revisions(tmp_path):
    def git(*words: str) -> None:
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *author, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    clean = exact_revision(tmp_path)
    assert clean == git_revision(tmp_path)
    found = []
    for text in ("two", "three", "two"):
        (tmp_path / "file").write_text(text)
        found.append(exact_revision(tmp_path))
    assert found[0] == found[2] != found[1]
    assert all(revision.startswith(f"{clean}-dirty-") for revision in found)


def test_equal_hosts_are_no_complaint():
    assert said(FACTS, FACTS, FACTS) == []
    assert said(FACTS, FACTS, clock=-0.9) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"python": "3.12.1"},
            "b: Python 3.12.1, a has 3.11.7; run PYTHON=/path/to/python3.11 bash env_setup.sh "
            "there",
        ),
        (
            {"packages": {"torch": "2.10.0", "wandb": "0.31.0"}},
            "b: torch 2.10.0, a has 2.11.0; run bash env_setup.sh there",
        ),
        (
            {"revision": "0123456789abcdef-dirty"},
            "b: revision 0123456789abcdef-dirty, a has 0123456789abcdef; commit, then git pull "
            "there",
        ),
        (
            {"files": {"prompts.txt": "10 bytes, bb"}},
            "b: prompts.txt is 10 bytes, bb, a has 10 bytes, aa; copy the correct one to the "
            "other host",
        ),
        (
            {"files": {"prompts.txt": "missing"}},
            "b: prompts.txt is missing; bash scripts/download_models.sh, or copy it from a host "
            "that has it",
        ),
        (
            {"gpus": "4 x H100"},
            "b: GPUs 4 x H100, a has 8 x H100; set slots=N in the hostfile for "
            "unequal GPUs, and install the same driver",
        ),
    ],
)
def test_each_difference_is_one_line_with_its_remedy(change, line):
    assert said(FACTS, replace(FACTS, **change)) == [line]


def test_what_all_lack_is_told_of_each():
    nothing = replace(FACTS, packages={"torch": "none", "wandb": "0.31.0"})
    assert [line.split(";")[0] for line in said(nothing, nothing)] == [
        "a: torch none, a has none",
        "b: torch none, a has none",
    ]


def test_clocks_apart_are_told_of():
    assert said(FACTS, FACTS, clock=7.25)[0].startswith("b: its clock is 7.2 s ahead; start a")
    assert said(FACTS, FACTS, clock=-61)[0].startswith("b: its clock is 61.0 s behind; start a")


@pytest.mark.parametrize(
    ("before", "there", "after", "ahead"),
    [(10.0, 11.0, 12.0, 0.0), (10.0, 9.0, 12.0, -1.0), (10.0, 15.0, 12.0, 3.0)],
)
def test_a_clock_is_right_if_its_time_is_between_question_and_answer(
    monkeypatch, before, there, after, ahead
):
    times = iter([before, after])
    monkeypatch.setattr(check, "time", lambda: next(times))
    monkeypatch.setattr(check, "on_host", lambda host, script: f"{there}\n")
    assert check.clock_ahead("a") == ahead


def test_the_table_has_a_row_for_each_host():
    less = replace(FACTS, packages={"torch": "2.11.0", "wandb": "none"}, gpus="none", driver="none")
    reports = {
        "a": Report(facts=FACTS),
        "a-longer-name": Report(0.5, less),
        "c": Report(fault="not reached (no route)"),
        "d": Report(fault="mixgrpo does not run there"),
    }
    assert table(reports).splitlines() == [
        "host           reached  Python  packages  revision  data    clock   GPUs      driver",
        "a              yes      3.11.7  2 of 2    01234567  1 of 1  +0.0 s  8 x H100  570.1",
        "a-longer-name  yes      3.11.7  1 of 2    01234567  1 of 1  +0.5 s  none      none",
        "c              no       ?       ?         ?         ?       ?       ?         ?",
        "d              yes      ?       ?         ?         ?       ?       ?         ?",
    ]


def test_a_recipes_data_are_the_paths_that_it_names(tmp_path):
    (tmp_path / "weights").touch()
    config = Config(
        rewards={
            "a": RewardConfig(kind="hpsv2", model="ViT-H-14", checkpoint="data/a.pt"),
            "b": RewardConfig(kind="pickscore", model="weights"),
        }
    )
    assert data_paths(flatten(config), tmp_path) == [
        *(config.batch.prompts_file, config.validation.prompts_file, config.model.path),
        *("data/a.pt", "weights"),
    ]


# ---- on this machine


def test_a_hosts_facts_are_found_without_torch(tmp_path):
    (tmp_path / "file").write_text("0123456789")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").write_text("01234")
    question = {"folder": str(tmp_path), "paths": ["file", "folder", "none"]}
    program = "import runpy, sys; runpy.run_module('mixgrpo.hosts.facts', run_name='__main__')"
    program += "; sys.exit('torch' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(question), env=environment(), cwd=ROOT, check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    facts = Facts(**json.loads(answer))
    assert facts.python == sys.version.split()[0]
    assert facts.packages["torch"] == version("torch")
    assert facts.packages["jsonargparse"] == version("jsonargparse")
    assert facts.files["file"].startswith("10 bytes, ")
    assert facts.files["folder"].startswith("5 bytes, ")
    assert facts.files["none"] == "missing"


def test_the_command_compares_and_tries_an_all_reduce(
    world: World, tmp_path: Path, monkeypatch, capfd
):
    """Of three hosts, of which one is away; then of two."""
    hosts_here.install(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "hostfile").write_text("127.0.0.4\n127.0.0.2\n127.0.0.3\n")
    (tmp_path / "calls.127.0.0.3.away").touch()
    words = world.arguments(tmp_path / "run")[1:]
    assert main(["hosts", "--hostfile", "hostfile", "check", *words]) == 1
    told = capfd.readouterr().out
    assert "127.0.0.3: not reached (ssh: connect to host 127.0.0.3 port 22" in told
    assert "`ssh 127.0.0.3 true` must work from here without a password" in told
    assert "all-reduce" not in told
    (tmp_path / "hostfile").write_text("127.0.0.4\n127.0.0.2\n")
    assert main(["hosts", "--hostfile", "hostfile", "check", *words]) == 0
    told = capfd.readouterr().out
    assert "127.0.0.2: all-reduce with gloo: correct, " in told
    assert told.endswith("2 hosts, no differences\n")


def test_one_machine_is_not_compared(tmp_path, capsys):
    (tmp_path / "hostfile").write_text("localhost\n")
    words = ["hosts", "--hostfile", str(tmp_path / "hostfile"), "check"]
    assert main([*words, "--recipe", "shapes_mixgrpo"]) == 0
    assert "names only this machine, so there is nothing to compare" in capsys.readouterr().out
