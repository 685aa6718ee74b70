"""The table of metrics against what runs log, and against the report's README."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_world import QUICK, REWARDS, records, train_here

from mixgrpo.run.metrics import METRICS, Metric, describe, table

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def logged(straight, world, tmp_path_factory) -> set[str]:
    """Every name that a run with an average and one with a KL write."""
    folder = tmp_path_factory.mktemp("kl") / "run"
    train_here(world.config(folder, **{**QUICK, "update__kl": 0.1, "update__kl_target": 0.01}))
    return {key for run in (straight, folder) for record in records(run) for key in record}


def pattern(key: str) -> str:
    kind, _, name = key.partition("/")
    return f"{kind}/NAME" if name in REWARDS else key


def test_the_table_holds_what_runs_log_and_nothing_else(logged):
    assert {pattern(key) for key in logged - {"iteration"}} == {metric.key for metric in METRICS}


def test_names_are_described_with_the_rewards_in_them():
    found = describe("validation_ema/my/reward")
    assert found.key == "validation_ema/my/reward"
    assert found.title == "my/reward, validation of the average"
    assert describe("update/kl").unit == "nats"
    assert describe("something/else") == Metric("something/else", "something/else", "", "")


def test_the_readme_shows_the_table():
    assert table() in (ROOT / "mixgrpo" / "report" / "README.md").read_text()
