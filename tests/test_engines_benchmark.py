"""The Shapes recipe itself in two processes, by every engine that shards, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from engines import LIMIT, Apart, Run, apart
from tiny_world import ROOT

RECORD = {"update/loss": 1e-6, "update/grad_norm": 0.01, "reward/a": -0.5, "reward/b": 20.0}


@pytest.mark.slow
def test_the_shapes_recipe_in_two_processes_is_that_of_one(tmp_path):
    script = str(ROOT / "scripts" / "benchmark" / "engines.py")
    options = ["--processes", "2", "--iterations", "2", "--engines", "fsdp", "zero2", "zero3"]
    done = subprocess.run(
        [sys.executable, script, *options, "--json", str(tmp_path / "found.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert [(run["trained"], run["engine"]) for run in runs] == [
        (trained, engine) for trained in ("full", "lora") for engine in ("fsdp", "zero2", "zero3")
    ]
    assert all(run["weights"] > 0 for run in runs), "compared with itself"


def test_differences_are_the_largest_of_all_iterations():
    second = {**RECORD, "reward/a": 0.5}
    one = Run([RECORD, second], {"w": torch.tensor([3.0, 4.0])})
    untrained = {"w": torch.zeros(2)}
    assert apart(one, one, untrained) == Apart(0, 0, 0, 0)
    other = {**second, "update/loss": 3e-6, "update/grad_norm": 0.011, "reward/a": 0.6}
    moved = Run([RECORD, other], {"w": torch.tensor([3.0, 4.5])})
    found = apart(moved, one, untrained)
    assert found.loss == pytest.approx(2e-6)
    assert found.grad_norm == pytest.approx(0.1)
    assert found.reward == pytest.approx(0.2)
    assert found.weights == pytest.approx(0.1)
    assert not found.is_within(LIMIT)
    assert Apart(1e-6, 1e-4, 1e-5, 1e-3).is_within(LIMIT)
