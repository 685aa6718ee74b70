"""The benchmark script, at its smallest."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from processes import Command
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "benchmark" / "speed.py"
TINY = [
    *("--random-small", "--device", "cpu", "--iterations", "1", "--optimizer-steps", "1"),
    *("--prompts", "1", "--samples", "2", "--steps", "4", "--window", "2", "--start", "1"),
]


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("speed", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setitem(sys.modules, "speed", module)
    spec.loader.exec_module(module)
    return module


def test_prints_the_table(tmp_path: Path) -> None:
    words = [*TINY, "--json", str(tmp_path / "results.json")]
    done = Command(words, tmp_path / "said", script=SCRIPT)
    assert done.wait() == [0], done.stdout + done.stderr
    for line in ("hardware:", "software:", "revision:", "command:", "task:", "gradients: equal"):
        assert line in done.stdout
    rows = [line.split()[0] for line in done.stdout.splitlines()[-7:]]
    ours = ["batched", "MixGRPO", "MixGRPO-Flash"]
    assert rows == ["published", *ours, *(f"published/{name}" for name in ours)]

    results = json.loads((tmp_path / "results.json").read_text())
    variants = results["variants"]
    assert variants["published"]["evaluations"] == {"rollout": 4, "update": 2}
    assert variants["batched"]["evaluations"] == {"rollout": 4, "update": 2}
    assert variants["MixGRPO"]["evaluations"] == {"rollout": 3, "update": 1.5}
    assert variants["MixGRPO-Flash"]["evaluations"] == {"rollout": 3, "update": 1.5}
    assert all(value <= 1e-3 for value in results["gradient_difference"].values())
    latents = {name: variant["latents_mb"] for name, variant in variants.items()}
    assert latents["published"] == 2 * 5 * 16 * 64 * 4 / 2**20
    assert results["ratios"]["MixGRPO"]["evaluations"]["rollout"] == pytest.approx(4 / 3)


def test_the_train_command_is_timed_on_the_same_task(
    speed: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own, with the median over the same number of iterations."""
    tiny = ["--model", str(ROOT / "data/shapes/flux"), *TINY[1:], "--steps", "3", "--start", "0"]
    assert speed.main([*tiny, "--train", "--json", str(tmp_path / "results.json")]) == 0
    train, ratio = capsys.readouterr().out.splitlines()[-2:]
    assert train.startswith("train command ")
    assert ratio.startswith("train command/MixGRPO ")
    found = json.loads((tmp_path / "results.json").read_text())["train"]
    assert set(found) == {"rollout", "decode", "update", "total"}
    assert found["total"] == pytest.approx(sum(found[p] for p in ("rollout", "decode", "update")))


def test_fails_when_the_gradients_differ(
    speed: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = speed.Published.loss

    def wrong(self: object, *inputs: object) -> Tensor:
        return 1.01 * right(self, *inputs)

    monkeypatch.setattr(speed.Published, "loss", wrong)
    assert speed.main(TINY) == 1
    assert "gradients: DIFFERENT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        (["--start", "2"], "the window must end before the last of 4 steps"),
        (["--optimizer-steps", "3"], "--samples 2 must be a multiple of --optimizer-steps 3"),
        (["--iterations", "0"], "must be at least 1"),
        (["--train"], "--train needs a model folder"),
    ],
)
def test_refuses_what_cannot_be_run(
    speed: ModuleType, option: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        speed.parse([*TINY, *option])
    assert complaint in capsys.readouterr().err
