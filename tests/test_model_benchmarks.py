"""The benchmarks of rewards and of engines at their smallest."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from processes import Command

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "scripts" / "benchmark"
ABOUT = ("hardware:", "software:", "revision:", "command:")


def run(folder: Path, script: str, *options: str, count: int = 1) -> tuple[list[int | None], str]:
    """Exit codes and what was printed, in which a failure's reason is."""
    done = Command(options, folder / "said", count, FOLDER / script)
    return done.wait(), done.stdout + done.stderr


def test_scoring_prints_the_table(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    options = ("--device", "cpu", "--images", "4", "--repeats", "1", "--json", str(path))
    codes, said = run(tmp_path, "scoring.py", *options)
    assert codes == [0], said
    assert all(line in said for line in ABOUT)
    assert "4 images of 64 pixels, models of data/shapes, float32" in said
    results = json.loads(path.read_text())["results"]
    assert [found["reward"] for found in results] == [
        *("hpsv2", "clip_score", "pickscore", "imagereward")
    ]
    for found in results:
        assert found["ratio"] == pytest.approx(found["batched"] / found["one"])
        assert found["difference"] < 1e-4


@pytest.mark.slow
def test_bytes_are_counted_in_two_processes(tmp_path: Path) -> None:
    """DDP gathers nothing and all-reduces every weight's gradient, float32, in each step."""
    path = tmp_path / "results.json"
    options = ["--engines", "ddp", "fsdp", "--steps", "4", "--json", str(path)]
    codes, said = run(tmp_path, "gathering.py", *options, count=2)
    assert codes == [0, 0], said
    found = {(r["engine"], r["gather"]): r for r in json.loads(path.read_text())["results"]}
    ddp, once = found["ddp", "-"], found["fsdp", "once"]
    assert ddp["rollout_gathered"] == ddp["update_gathered"] == 0
    assert once["reduced"] == pytest.approx(ddp["reduced"] / 2, rel=0.01), "scattered, not summed"
    assert once["rollout_gathered"] == pytest.approx(once["update_gathered"] / 2, rel=0.01)
    more = found["fsdp", "evaluation"]
    assert more["rollout_gathered"] > 3 * once["rollout_gathered"]


def test_parity_prints_the_table(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    rewards = ("--rewards", "hpsv2", "clip_score", "pickscore")
    words = ("--small", "--device", "cpu", *rewards, "--json", str(path))
    codes, said = run(tmp_path, "reward_parity.py", *words)
    assert codes == [0], said
    assert all(line in said for line in ABOUT)
    for found in json.loads(path.read_text())["results"]:
        assert found["same_pixels"] < 1e-4 < found["resized"]
        assert 1e-4 < found["bfloat16"] < found["spread"]


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import reward_parity

    return reward_parity


def test_parity_fails_when_the_scores_differ(
    parity: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = parity.clip.hpsv2
    wrong = {"hpsv2": lambda *inputs, **files: right(*inputs, **files) + 1e-3}
    monkeypatch.setattr(parity, "ORACLES", wrong)
    assert parity.main(["--small", "--rewards", "hpsv2"]) == 1
    assert "DIFFERENT: more than 1e-05" in capsys.readouterr().out


def test_files_choose_the_rewards(parity: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "HPS_v2.1_compressed.pt"
    file.touch()
    files = ("--hpsv2", str(file), "--pickscore", str(tmp_path))
    (first, second) = parity.cases(parity.parse(files), tmp_path)
    assert first.options == {"model": "ViT-H-14", "checkpoint": str(file)}
    assert (first.edge, first.weights) == (224, "published file")
    assert second.options == {"model": str(tmp_path), "processor": str(tmp_path)}
    assert parity.parse([]).rewards == ["hpsv2", "clip_score", "pickscore", "imagereward"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--hpsv2", "gone.pt"], "there is no gone.pt"),
        (["--small", "--pickscore", "."], "--small takes the files of data/shapes"),
        (["--images", "1"], "--images must be at least 2"),
    ],
)
def test_parity_refuses_what_cannot_be_run(
    parity: ModuleType, options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parity.parse(options)
    assert complaint in capsys.readouterr().err
