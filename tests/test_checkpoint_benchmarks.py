"""The benchmarks of checkpoints, at their smallest."""

from __future__ import annotations

import sys
from pathlib import Path

import kills
import pytest
import saving

from mixgrpo.checks import check
from mixgrpo.commands.train import parse


def test_a_save_is_timed_both_ways(tmp_path, monkeypatch, capsys):
    words = ["--parameters", "1000", "--saves", "1", "--step", "0.01", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["saving.py", *words, "--folder", str(tmp_path)])
    assert saving.main() == 0
    said = capsys.readouterr().out
    assert "state: 0.02 GB" in said  # one layer of 1024 x 1024
    rows = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith(("| w", "| a"))]
    assert [row[0].strip() for row in rows] == ["waiting", "asynchronous"]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_the_run_that_is_killed_is_one_that_trains(tmp_path):
    config = parse(kills.knobs(tmp_path / "run", 30))
    check(config, world_size=2)
    assert config.checkpoint.every == kills.EVERY
    assert config.checkpoint.asynchronous
    assert list(config.rewards) == list(kills.REWARDS)


@pytest.mark.parametrize(
    ("lines", "done"), [(None, 0), ([], 0), (['{"iteration": 3}', '{"iteration": 4, "up'], 3)]
)
def test_iterations_are_counted_in_what_a_killed_run_wrote(tmp_path: Path, lines, done):
    if lines is not None:
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert kills._iterations_done(tmp_path) == done
