"""The benchmarks of rewards and of sampling at their smallest."""

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


# ---- sampling at FLUX.1-dev's size


@pytest.fixture
def sampling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import sampling

    return sampling


def test_sampling_prints_the_table(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    options = ("--small", "--device", "cpu", "--dtype", "float32", "--sizes", "32", "64")
    few = ("--steps", "2", "--repeats", "1", "--batch", "2", "--peak", "1e-3")
    codes, said = run(tmp_path, "sampling.py", *options, *few, "--json", str(path))
    assert codes == [0], said
    assert all(line in said for line in ABOUT)
    results = json.loads(path.read_text())["results"]
    assert [found["size"] for found in results] == [32, 64]
    for found in results:
        assert found["evaluation"] == pytest.approx(found["sampling"] / 2)
        assert found["tflops"] == pytest.approx(2 * found["tflop"] / found["evaluation"])
        assert found["share_of_peak"] == pytest.approx(found["tflops"] / 1e-3)


def test_evaluations_are_counted_at_flux_devs_size(sampling: ModuleType) -> None:
    """About 37 TFLOP for the 2025 tokens of 720x720, 74 for the 4096 of 1024x1024."""
    assert sampling.count_tflop(False, 2025) == pytest.approx(37, rel=0.02)
    assert sampling.count_tflop(False, 4096) == pytest.approx(74, rel=0.02)


def test_flux_devs_size_on_a_cpu_is_refused(tmp_path: Path) -> None:
    codes, said = run(tmp_path, "sampling.py", "--device", "cpu")
    assert codes == [2]
    assert "needs a GPU with 40 GB" in said


# ---- an iteration at FLUX.1-dev's size


@pytest.fixture
def flux_iteration(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import flux_iteration

    return flux_iteration


@pytest.mark.parametrize("train", ["lora", "full"])
def test_an_iteration_prints_the_table(
    flux_iteration: ModuleType, train: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    small = ("--small", "--device", "cpu", "--size", "32", "--steps", "4", "--window", "2")
    few = ("--samples", "2", "--optimizer-steps", "1", "--start", "1", "--micro-batch", "2")
    words = ("--train", train, *small, *few, "--peak", "1e-3", "--json", str(path))
    assert flux_iteration.main(words) == 0
    printed = capsys.readouterr().out
    assert all(line in printed for line in (*ABOUT, f"{train} training with adamw_8bit"))
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4
    assert len({line.count("|") for line in rows}) == 1
    published, batched, ours, flash = json.loads(path.read_text())["results"]
    assert published["evaluations"] == {"rollout": 4, "update": 2}
    assert batched["evaluations"] == {"rollout": 4, "update": 2}
    assert ours["evaluations"] == {"rollout": 3, "update": 1.5}
    assert flash["variant"] == "MixGRPO-Flash"
    size = flux_iteration.FluxSize.from_config(flux_iteration.SMALL_TRANSFORMER)
    products = size.products(4, 512)
    backward = products.backward(train == "full")
    one = 3 * products.total + 1.5 * (2 * products.total + backward)
    assert ours["tflops"] * ours["seconds"]["total"] == pytest.approx(2 * one / 1e12)


def test_attention_backends_and_compilers_are_compared(
    flux_iteration: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[str, str]] = []
    monkeypatch.setattr(flux_iteration, "make_task", lambda chosen, policy: policy)
    monkeypatch.setattr(
        flux_iteration,
        "build",
        lambda chosen, knobs: built.append((knobs.compile, knobs.attention)),
    )
    words = ["--small", "--device", "cpu", "--compile", "off", "inductor"]
    words += ["--attention", "native", "flex", "--variants", "published", "MixGRPO"]
    chosen = flux_iteration.parse(words)
    chosen.variants = []  # nothing is measured
    assert list(flux_iteration.results(chosen)) == []
    assert built == [
        *(("off", "native"), ("off", "flex"), ("inductor", "native"), ("inductor", "flex"))
    ]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--device", "cpu"], "needs a GPU with 80 GB"),
        (["--small", "--start", "21"], "the window must end before the last of 25 steps"),
        (["--small", "--samples", "3"], "--samples 3 must be a multiple of --optimizer-steps 4"),
        (["--small", "--size", "100"], "--size must be a multiple of 16, got 100"),
    ],
)
def test_an_iteration_that_cannot_be_run_is_refused(
    flux_iteration: ModuleType, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        flux_iteration.parse(words)
    assert complaint in capsys.readouterr().err
