"""The program that proves and measures on a GPU: every part runs here, on a CPU, with small models.

What only a GPU can show is in ``test_gpu.py``, which the program's part ``right`` runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_gpu import GPU, fake_gpu
from gpu import __main__ as program
from gpu import outside, plan, tables
from gpu.evaluation import kind_of
from gpu.iterations import Batches, Wanted, batch_sizes
from gpu.job import Job, append, latest
from gpu.models import FULL, SMALL
from gpu.parts import PARTS, Part

from mixgrpo.config import ModelConfig
from mixgrpo.files.json_lines import read_objects
from mixgrpo.planning.network import network_of

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "benchmark" / "gpu.sh"
ELSEWHERE = "right"  # its tests run by themselves


def record(part: str, name: str, **values: Any) -> dict[str, Any]:
    return {"part": part, "name": name, **values}


# ---- the whole program


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    names = [part.name for part in PARTS if part.name != ELSEWHERE]
    words = ["bash", str(SCRIPT), "--small", "--out", str(tmp_path), "--parts", *names]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    log = tmp_path / "cpu.log"
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()[-4000:]
    found = latest(read_objects(tmp_path / "cpu.jsonl"))
    assert list(found) == names
    for part, results in found.items():
        assert results["ended"]["exit_code"] == 0, part
        assert len(results) > 3, part
    assert tables.failures(found) == []
    variants = {result["variant"] for result in found["lora"].values() if "variant" in result}
    assert variants == {"published", "MixGRPO", "MixGRPO-Flash", "MixGRPO-Flash*"}
    distances = {name: r["distance"] for name, r in found["outside"].items() if "distance" in r}
    assert distances["as in the window"] == distances["no activations kept"] == 0
    assert 0 < distances["merged"] < distances["float8"] < 0.1
    for heading in ("LoRA, small models,", "All weights trained", "One evaluation", "float8"):
        assert heading in done.stdout
    for line in done.stdout.splitlines():
        assert line.count("|") in (0, *range(3, 12)), line


def parts_of(folder: Path, **sources: str) -> tuple[Part, ...]:
    """Parts whose modules have these sources."""
    package = folder / "planted"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    return tuple(PlantedPart(name, name, 30, 0) for name in sources)


class PlantedPart(Part):
    """A part that lies in another package."""

    @property
    def module(self) -> str:
        return f"planted.{self.name}"


REPORTS = """
from gpu.job import Job, main

def perform(job: Job) -> None:
    job.report("first", seconds_per_iteration=1.5)
    {then}

main(__name__.rpartition(".")[2] if __name__ != "__main__" else "{name}", perform)
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Path]]:
    """Runs the program with planted parts; returns its exit code and the file of its results."""

    def run(minutes: float = 1.0, **then: str) -> tuple[int, Path]:
        sources = {name: REPORTS.format(name=name, then=text) for name, text in then.items()}
        parts = parts_of(tmp_path, **sources)
        monkeypatch.setattr(program, "PARTS", parts)
        monkeypatch.setattr(tables, "PARTS", parts)
        monkeypatch.setattr(tables, "MAKERS", {part.name: lambda found: [] for part in parts})
        paths = (tmp_path, ROOT / "scripts" / "benchmark", ROOT)
        monkeypatch.setenv("PYTHONPATH", ":".join(map(str, paths)))
        out = tmp_path / "out"
        words = ["--small", "--out", str(out), "--minutes", str(minutes)]
        return program.main(words), out / "cpu.jsonl"

    return run


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(
    planted: Callable[..., tuple[int, Path]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(program, "CPU_SECONDS", 4.0)
    code, path = planted(
        fails='raise ValueError("planted")',
        crashes="import os; os.abort()",
        hangs="import time; time.sleep(600)",
        works='job.report("last", seconds_per_iteration=2.0)',
    )
    assert code == 1
    found = latest(read_objects(path))
    assert all("first" in results for results in found.values()), "what was there is kept"
    assert found["fails"]["ended"]["error"].endswith("ValueError: planted")
    assert found["crashes"]["ended"]["exit_code"] == -6
    assert found["hangs"]["ended"]["error"] == "stopped after 4 s, its limit"
    assert found["works"]["ended"]["exit_code"] == 0
    assert "last" in found["works"]
    said = capsys.readouterr().out
    assert "- fails, failed: ValueError: planted" in said
    assert "- hangs, failed: stopped after 4 s, its limit" in said
    assert "works, failed" not in said


def test_a_part_without_time_is_told_and_keeps_its_earlier_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpu.jsonl"
    append(path, record("shapes", "began"))
    append(path, record("shapes", "runs", done=3))
    monkeypatch.setattr(program, "PARTS", (replace(PARTS[-2], name="shapes", least=1e6),))
    assert program.main(["--small", "--out", str(tmp_path), "--parts", "shapes"]) == 0
    found = latest(read_objects(path))["shapes"]
    assert found["runs"] == {"done": 3}
    assert found["not started"]["skipped"].endswith("s were left, it needs 1000000")


def test_a_program_that_is_stopped_ends_its_part_and_shows_what_it_has(tmp_path: Path) -> None:
    """As a time limit around it would stop it."""
    source = REPORTS.format(name="shapes", then="import time; time.sleep(600)")
    parts_of(tmp_path, waits=source)
    main = (
        "import sys; from gpu import __main__ as program, tables; from gpu.parts import Part\n"
        "class Planted(Part):\n    module = 'planted.waits'\n"
        "program.PARTS = tables.PARTS = (Planted('shapes', '', 30, 0),)\n"
        "sys.exit(program.main(['--small', '--parts', 'shapes', '--out', sys.argv[1]]))\n"
    )
    paths = (tmp_path, ROOT / "scripts" / "benchmark", ROOT)
    process = subprocess.Popen(
        [sys.executable, "-c", main, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": ":".join(map(str, paths))},
    )  # fmt: skip
    results = tmp_path / "cpu.jsonl"
    for _ in range(600):
        if len(read_objects(results)) == 2:  # began, first
            break
        time.sleep(0.1)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "| first | 1.50 | - |" in said
    assert "stopped; the parts that had not ended can be run with --parts" in said
    waiting = subprocess.run(
        ["pgrep", "-f", str(results)], capture_output=True, text=True, check=False
    )
    assert waiting.stdout == ""


def test_a_part_that_runs_again_replaces_its_results(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for name, value in (("began", 0), ("a", 1), ("b", 2), ("began", 0), ("a", 3)):
        append(path, record("lora", name, value=value))
    append(path, record("full", "a", value=float("nan")))
    path.write_text(path.read_text() + '{"part": "lora", "na')  # the program was killed here
    found = latest(read_objects(path))
    assert found["lora"] == {"began": {"value": 0}, "a": {"value": 3}}
    assert found["full"] == {"a": {"value": None}}


@pytest.mark.parametrize("works", [True, False])
def test_the_allocator_is_the_trainings_unless_it_does_not_work(
    works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)

    def ask(words: list[str], **given: Any) -> SimpleNamespace:
        fails = not works and "PYTORCH_ALLOC_CONF" in os.environ
        return SimpleNamespace(returncode=int(fails), stdout="H100\n", stderr="no such setting")

    monkeypatch.setattr(program.subprocess, "run", ask)
    assert program.card_name() == "H100"
    expected = "expandable_segments:True" if works else None
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that what was set is undone


def test_without_a_gpu_small_is_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "card_name", lambda: "")
    assert program.main([]) == 1
    assert "torch sees no GPU; --small runs every part on the CPU" in capsys.readouterr().err


def test_a_python_without_torch_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(
        "#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n"
    )
    bare.chmod(0o755)
    monkeypatch.setattr(program.sys, "executable", str(bare))
    with pytest.raises(SystemExit, match=f"torch does not work in {bare}: ModuleNotFoundError"):
        program.main([])


def test_the_tests_are_reported_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the part ``right`` reports them; the plugin works in another pytest's process as well."""
    from gpu.right import Recorder

    path = tmp_path / "results.jsonl"
    recorder = Recorder(Job("right", "cpu", True, path, 1e9))
    nodes = {"passed": "", "failed": "line\n\nE  assert 1 == 2\nfile.py:3: AssertionError"}
    for outcome, text in nodes.items():
        for when in ("setup", "call", "teardown"):
            told = "passed" if when != "call" else outcome
            report = SimpleNamespace(
                when=when,
                outcome=told,
                nodeid=f"t.py::test_{outcome}",
                duration=1.0,
                longreprtext=text,
            )
            recorder.pytest_runtest_logreport(report)
    found = latest(read_objects(path))["right"]
    assert found["test_passed"] == {"outcome": "passed", "seconds": 1.0}
    assert found["test_failed"]["error"].endswith("file.py:3: AssertionError")
    assert tables.failures({"right": found}) == [
        "- right, test_failed, failed: file.py:3: AssertionError"
    ]
    assert tables.right({"right": found}) == ["Tests on the device: 1 of 2 passed in 2 s."]


# ---- what the parts count


def test_the_batch_sizes_that_warm_up_are_those_of_an_iteration() -> None:
    task = SimpleNamespace(
        text=[0], images=12, optimizer_steps=4, micro_batch=8, update_batch=6,
        window=SimpleNamespace(size=4),
    )  # fmt: skip
    assert batch_sizes(task, "published") == {(1, False), (1, True)}
    # The prefix, 8 + 4 images; and 1 + 3 * 3 evaluations of an optimizer step, 6 + 4.
    expected = {(1, False), (8, False), (4, False), (6, True), (4, True)}
    assert batch_sizes(task, "MixGRPO") == expected


def test_names_tell_short_forms_apart() -> None:
    assert Wanted("MixGRPO", "inductor", 12, 25).name(FULL) == "MixGRPO, inductor, 12 images"
    assert Wanted("MixGRPO", "off", 4, 6).name(FULL) == "MixGRPO, 4 images, 6 steps"


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", "matrix product"),
        ("pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("triton_poi_fused_add_mul_3", "compiled"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_cat_7", "compiled"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>",
            "elementwise",
        ),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel", "norm"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>", "copy"),
        ("something new", "other"),
    ],
)
def test_kernels_have_kinds(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_the_plan_of_the_published_size(tmp_path: Path) -> None:
    """Frozen bfloat16 weights, float32 adapters with gradients and 8-bit moments, one block's
    activations; no text encoders, rewards or context."""
    knobs = ModelConfig(train="lora", path="", height=720, width=720)
    folder = FULL.write_folder(tmp_path)
    found = plan.planned_memory(FULL, knobs, Batches(12, 10), folder)
    assert (found.text, found.rewards, found.context) == (0, 0, 0)
    adapters = sum(network_of(knobs).adapted(64, "all"))
    assert found.weights == 2 * 11_901_408_320 + 4 * adapters
    assert found.states == 12 * 10 * 2025 * 64 * 4
    measured: Mapping[str, Any] = {
        "batches": [12, 10], "images": 12, "tflop": 9890.0, "seconds": {"total": 30.0},
        "memory_gib": {"allocated": 40.0}, "window": [5, 9], "optimizer_steps": 4,
        "model": {"train": "lora", "lora_rank": 64},
    }  # fmt: skip
    compared = plan.comparison(FULL, folder, measured, plan.Question())
    assert compared["planned_gib"] == pytest.approx(found.peak / 2**30)
    assert compared["planned_seconds"] == pytest.approx(25.0)
    assert compared["measured_seconds"] == 30.0
    # Of four images, no batch has more than four, and an optimizer step four evaluations.
    few = plan.comparison(FULL, folder, {**measured, "images": 4}, plan.Question())
    assert few["planned_gib"] * 2**30 == pytest.approx(
        plan.planned_memory(FULL, knobs, Batches(4, 4), folder, 4).peak
    )


def test_full_training_goes_on_with_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the plan was too hopeful."""
    from gpu import full

    tried: list[tuple[str, int]] = []

    class Bench:
        def __init__(self, job: Job, scale: object, knobs: object, batches: Batches) -> None:
            self.batches = batches

        def measure(self, wanted: Wanted) -> bool:
            tried.append((wanted.variant, self.batches.update))
            return self.batches.update <= 3

    monkeypatch.setattr(full, "Bench", Bench)
    full.perform(Job("full", "cpu", True, tmp_path / "results.jsonl", 1e9))
    assert tried[:4] == [("MixGRPO", 10), ("MixGRPO", 5), ("MixGRPO", 3), ("published", 3)]


def test_full_training_takes_the_largest_batches_that_fit() -> None:
    from gpu.full import CHOICES, fitting

    knobs = FULL.knobs(train="full", weights="bfloat16_stochastic", compute_dtype="bfloat16")
    assert fitting(FULL, knobs, float("inf")) == CHOICES[0]
    assert fitting(FULL, knobs, 10.0) == CHOICES[-1]
    on_80 = fitting(FULL, knobs, 79.2)
    assert CHOICES.index(on_80) > CHOICES.index(fitting(FULL, knobs, 139.8))


# ---- float8 outside the window


def test_float8_products_are_near_the_exact_ones() -> None:
    """Both operands are rounded to four significant bits: an error of about 2^-4/sqrt(3) each,
    relative to values whose errors average out over the sum."""
    layer = torch.nn.Linear(128, 96).bfloat16()
    x = torch.randn(2, 5, 128).bfloat16()
    found, expected = outside.Float8Linear(layer)(x), layer(x).detach()
    assert found.dtype == torch.bfloat16
    assert found.shape == expected.shape
    error = float((found - expected).norm() / expected.norm())
    assert 0.005 < error < 0.06


def test_float8_on_a_gpu_has_a_scale_for_every_row() -> None:
    """The kernels' own checks of shapes and layouts, on a GPU that exists in shapes only."""
    layer = torch.nn.Linear(128, 96).bfloat16()
    with fake_gpu() as gpu:
        found = outside.Float8Linear(gpu.place(layer))
        assert found.scale.shape == (96, 1)
        assert found(torch.randn(2, 5, 128, device=GPU).bfloat16()).shape == (2, 5, 96)


def test_merged_adapters_leave_the_velocity() -> None:
    from gpu.models import build, move_adapters, text_for

    knobs = SMALL.knobs(train="lora", compute_dtype="float32", gradient_checkpointing=False)
    policy = build(SMALL, knobs, torch.device("cpu"))
    move_adapters(policy.module)
    x = torch.randn(2, *policy.latent_shape)
    inputs = (x, torch.tensor([0.3, 0.8]), text_for(policy, 2))
    with torch.no_grad():
        expected = policy.velocity(policy.module)(*inputs)
        merged = outside.merged(policy.module)
        found = policy.velocity(merged)(*inputs)
        with_adapters = policy.velocity(policy.module)(*inputs)
        base = policy.without_adapters(policy.module)(*inputs)
    assert not any(".lora_" in name for name, _ in merged.named_parameters())
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(with_adapters, expected), "the policy keeps its own weights"
    assert not torch.allclose(base, expected, atol=1e-3)


# ---- the tables


def test_the_readme_has_the_tables_of_the_kept_results() -> None:
    text = (ROOT / "scripts" / "benchmark" / "README.md").read_text()
    shown = text.partition(tables.BEGIN)[2].partition(tables.END)[0].strip()
    assert shown == tables.report(program.KEPT)


def test_a_table_compares_with_the_published_way_and_the_ceiling(tmp_path: Path) -> None:
    path = tmp_path / "results" / "card.jsonl"
    path.parent.mkdir()
    common = {"compile": "off", "steps": 25, "of": 12, "memory_gib": {"allocated": 30.0}}
    common["evaluations"] = {"rollout": 25.0, "update": 4.0}
    for part, name, values in (
        ("machine", "machine", {"card": "NVIDIA H100", "software": "torch", "revision": "abc"}),
        ("machine", "ceiling", {"tflops": 800.0}),
        ("lora", "published", {**common, "variant": "published", "images": 4, "tflops": 200.0,
                               "seconds": seconds(17.0)}),
        ("lora", "published, inductor", {**common, "variant": "published", "images": 4,
                                         "compile": "inductor", "tflops": 400.0,
                                         "seconds": seconds(9.0)}),
        ("lora", "MixGRPO", {**common, "variant": "MixGRPO", "images": 12, "tflops": 400.0,
                             "seconds": seconds(24.5)}),
        ("full", "MixGRPO", {"error": "OutOfMemoryError: CUDA out of memory. Tried"}),
        ("shapes", "not started", {"skipped": "3 s were left, it needs 40"}),
    ):  # fmt: skip
        append(path, record(part, name, **values))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.write_readme(readme, path.parent)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "**NVIDIA H100**, torch; revision abc" in text
    # Three times as many images take three times 16 s, and the optimizer's 1 s as before: 49 s.
    assert "= 17.00 | 1.00 | (49.00) | 25.00 + 4.00 | 200 | 25% | 30.0 GiB | 1.00x |" in text
    assert "= 24.50 | 1.00 | 24.50 | 25.00 + 4.00 | 400 | 50% | 30.0 GiB | 2.00x |" in text
    assert "- full, MixGRPO, failed: OutOfMemoryError: CUDA out of memory. Tried" in text
    assert "- shapes, not started: 3 s were left, it needs 40" in text


def seconds(total: float) -> dict[str, float]:
    phases = {"rollout": total / 2, "decode": total / 8, "update": 3 * total / 8}
    return {**phases, "total": total, "optimizer": 1.0}
