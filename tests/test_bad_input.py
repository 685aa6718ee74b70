"""What a user can get wrong: one line that names the value and the remedy, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_world import QUICK, REWARDS, World, copy_run, files_of, training_records

from mixgrpo import checkpoint as checkpoints
from mixgrpo.commands import main
from mixgrpo.config import RewardConfig
from mixgrpo.text.prompt_files import PromptList
from mixgrpo.text.prompts import PromptBatches, read_prompts

Complain = Callable[..., str]


@pytest.fixture
def complain(capfd) -> Complain:
    """Runs a command line that must fail; returns its one line of error."""

    def run(arguments: list[str]) -> str:
        with (
            mock.patch("torch.cuda.is_available", return_value=False),
            mock.patch("mixgrpo.report.summary.summarize", return_value=""),
        ):
            try:
                code = main(arguments)
            except SystemExit as ended:
                code = ended.code
        said = capfd.readouterr()
        assert code not in (0, None)
        assert "Traceback" not in said.out + said.err
        lines = [line for line in said.err.splitlines() if line.startswith("error")]
        assert len(lines) == 1, said.err
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


def quick(world: World, folder: Path, **knobs: Any) -> list[str]:
    return world.arguments(folder, **{**QUICK, **knobs})


# ---- files that are not there


def test_a_missing_model_folder(world, folder, complain):
    line = complain(quick(world, folder, model__path="no/such/model"))
    assert "'no/such/model'" in line
    assert "--model.path" in line
    assert not folder.exists()


def test_a_missing_part_of_the_model(world, folder, tmp_path, complain):
    shutil.copytree(world.model, tmp_path / "half", ignore=shutil.ignore_patterns("vae"))
    line = complain(quick(world, folder, model__path=str(tmp_path / "half")))
    assert str(tmp_path / "half" / "vae") in line
    assert "--model.path" in line
    assert not folder.exists()


def test_a_damaged_model(world, folder, tmp_path, complain):
    broken = tmp_path / "broken"
    shutil.copytree(world.model, broken)
    (weights,) = (broken / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    line = complain(quick(world, folder, model__path=str(broken)))
    assert str(broken) in line
    assert not folder.exists()


@pytest.mark.parametrize("command", ["train", "sample", "preprocess"])
def test_text_encoders_with_each_others_weights(world, folder, tmp_path, complain, command):
    """transformers would draw T5's weights at random and go on."""
    mixed = tmp_path / "mixed"
    shutil.copytree(world.model, mixed)
    shutil.copy(
        mixed / "text_encoder" / "model.safetensors", mixed / "text_encoder_2" / "model.safetensors"
    )
    model, prompts = ["--model.path", str(mixed)], str(world.prompts)
    arguments = {
        "train": quick(world, folder, model__path=str(mixed)),
        "sample": ["sample", *model, "--prompts_file", prompts, "--folder", str(folder)],
        "preprocess": ["preprocess", *model, "--prompts_files", prompts, "--output", str(folder)],
    }
    line = complain(arguments[command])
    assert str(mixed / "text_encoder_2") in line
    assert "missing: shared.weight" in line
    assert "it holds the weights of a CLIP text encoder" in line


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (RewardConfig("hpsv2", model="no/such/clip"), ["'no/such/clip'", "`model`"]),
        (
            RewardConfig("hpsv2", model="ViT-H-14", checkpoint="no/such.pt"),
            ["'no/such.pt'", "`checkpoint`"],
        ),
        (RewardConfig("pickscore", model="no/such/pick"), ["'no/such/pick'", "`model`"]),
        (RewardConfig("imagereward", model="no/such/blip"), ["'no/such/blip'", "`model`"]),
        (RewardConfig("pickscore", model="x" * 300), ["pickscore: no folder 'xxx", "`model`"]),
        (RewardConfig("clip_score", model="x" * 5000), ["neither an architecture of open_clip"]),
        (RewardConfig("hpsv2", checkpoint="y" * 300), ["hpsv2: no file 'yyy", "`checkpoint`"]),
        (
            RewardConfig("imagereward", model="~nobody_at_all/x"),
            ["'~nobody_at_all/x' names no home"],
        ),
        (RewardConfig("hpsv3"), ["'hpsv3'", "did you mean 'hpsv2'"]),
        (RewardConfig("nowhere.to:be_found"), ["'nowhere.to:be_found'", "PYTHONPATH"]),
        (RewardConfig("tiny_world:no_such_reward"), ["'no_such_reward'"]),
        (RewardConfig("jpeg_size", options={"quality": 200}), ["quality", "200"]),
        (RewardConfig("jpeg_size", options={"qualty": 50}), ["qualty", "quality"]),
    ],
)
def test_a_reward_that_cannot_be_made(world, folder, complain, reward, words):
    given = {
        key: value
        for key, value in vars(reward).items()
        if key in ("model", "checkpoint", "options") and value
    }
    arguments = quick(world, folder, rewards={"mine": reward})
    arguments[-1] = arguments[-1].replace('"weight": 1.0', _json_items({"weight": 1.0, **given}))
    line = complain(arguments)
    assert "rewards.mine" in line
    for word in words:
        assert word in line
    assert not folder.exists()


def _json_items(values: dict[str, Any]) -> str:
    return json.dumps(values)[1:-1]


@pytest.mark.parametrize("knob", ["batch.prompts_file", "validation.prompts_file"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not a file"),
        (b"", "contains no prompt"),
        (b"\n  \n\t\n", "contains no prompt"),
        ("ein roter Kreis\nein gr\xfcner Kreis\n".encode("latin-1"), "not UTF-8 (line 2)"),
        (b'{"prompt": "a"}\n{"caption": "b"}\n', "line 2 has no key 'prompt'"),
        (b'["a", "b"]\n', "is a JSON array, not JSONL; convert it with: python -c "),
        (b"id,prompt\n1,a cat\n", "is a CSV file"),
        (b"\x1f\x8b\x08", "is compressed by gzip; unpack it with: gunzip -k "),
    ],
)
def test_prompt_files(world, folder, tmp_path, complain, knob, content, words):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    line = complain(quick(world, folder, **{knob.replace(".", "__"): str(path)}))
    assert knob in line
    assert str(path) in line
    assert words in line
    assert not folder.exists()


def test_blank_lines_are_skipped_and_duplicates_kept(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffeins\n\n  zwei  \r\neins\n\n".encode())
    assert read_prompts(str(path), "batch.prompts_file").texts == ["eins", "zwei", "eins"]


def test_a_line_is_a_prompt_whatever_is_in_it(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\u2028still one\ntwo\x0cstill two\n", encoding="utf-8")
    assert len(read_prompts(str(path), "batch.prompts_file")) == 2


def test_fewer_prompts_than_a_batch_are_repeated(tmp_path):
    batches = PromptBatches(PromptList.plain(["one", "two"]), per_iteration=5, seed=0)
    assert sorted(batches.at(0).texts + batches.at(1).texts) == ["one"] * 5 + ["two"] * 5


def test_long_prompts_are_truncated_with_one_warning_that_counts_them(
    world, folder, tmp_path, capfd
):
    path = tmp_path / "long.txt"
    path.write_text("red " * 30 + "\na red circle\n" + "blue " * 40 + "\n")
    with (
        mock.patch("torch.cuda.is_available", return_value=False),
        mock.patch("mixgrpo.report.summary.summarize", return_value=""),
    ):
        assert main(quick(world, folder, batch__prompts_file=str(path))) == 0
    said = capfd.readouterr()
    warnings = [
        line
        for line in (said.out + said.err).splitlines()
        if "truncated" in line or "longer than" in line
    ]
    assert len(warnings) == 1, warnings
    assert "2 of 4 training and validation prompts" in warnings[0]


def test_code_beside_a_tokenizer_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    from transformers import CLIPConfig

    from mixgrpo.rewards.pickscore import _load_processor

    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (tmp_path / name).write_text("{}")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    with pytest.raises(ValueError, match="contains custom code"):
        _load_processor(tmp_path, CLIPConfig())
    assert not ran.exists()


# ---- commands, recipes, knobs


def test_an_unknown_command(complain):
    line = complain(["trian", "--recipe", "shapes_mixgrpo"])
    assert "'trian'" in line
    assert "did you mean 'train'" in line


def importing_raises(error: BaseException) -> mock.Mock:
    return mock.Mock(import_module=mock.Mock(side_effect=error))


def test_a_python_without_the_packages(complain):
    missing = ModuleNotFoundError(name="yaml.loader")
    with mock.patch("mixgrpo.commands.importlib", importing_raises(missing)):
        line = complain(["train", "--recipe", "shapes_mixgrpo"])
    assert "the package yaml.loader is not installed" in line
    assert "bash env_setup.sh" in line


def test_an_interrupt_while_modules_are_imported(complain):
    with mock.patch("mixgrpo.commands.importlib", importing_raises(KeyboardInterrupt())):
        assert "interrupted before the command started" in complain(["train"])


def test_an_unknown_recipe(complain):
    line = complain(["train", "--recipe", "shape_mixgrpo"])
    assert "'shape_mixgrpo'" in line
    assert "did you mean 'shapes_mixgrpo'" in line
    assert "flux_mixgrpo" in line


def test_an_unknown_recipe_that_is_near_none(complain):
    line = complain(["train", "--recipe=zzz"])
    assert "'zzz'" in line
    assert "did you mean" not in line
    assert "shapes_mixgrpo" in line


def test_a_recipe_that_is_no_yaml(tmp_path, complain):
    (tmp_path / "mine.yaml").write_text("window: {size: 3\nbatch: [")
    assert "mine.yaml" in complain(["train", "--recipe", str(tmp_path / "mine.yaml")])


def test_an_unknown_key_in_a_recipe(tmp_path, complain):
    (tmp_path / "mine.yaml").write_text("window: {sise: 3}\n")
    line = complain(["train", "--recipe", str(tmp_path / "mine.yaml")])
    assert "window.sise" in line
    assert "window.size" in line


def test_an_unknown_key_on_the_command_line(complain):
    line = complain(["train", "--recipe", "shapes_mixgrpo", "--windw.size", "3"])
    assert "windw.size" in line
    assert "window.size" in line


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"window__size": 5}, ["size 5", "5 steps", "1..4"]),
        ({"window__start": 3}, ["size 2", "start 3", "5 steps", "valid starts are 0..2"]),
        (
            {"window__strategy": "frozen", "window__start": 9},
            ["start 9", "valid starts are 0..2"],
        ),
        ({"batch__samples": 1, "update__optimizer_steps": 1}, ["batch.samples is 1", "at least 2"]),
        (
            {"batch__samples": 5},
            ["batch.samples (5)", "update.optimizer_steps (2)", "--batch.samples to 6"],
        ),
        ({"model__height": 60}, ["model.height is 60", "multiple of 16"]),
        ({"scoring__max_failed": 1.5}, ["scoring.max_failed is 1.5", "at most 1"]),
        ({"rewards": {}}, ["no reward"]),
    ],
)
def test_numbers_that_do_not_fit(world, folder, complain, knobs, words):
    line = complain(quick(world, folder, **knobs))
    for word in words:
        assert word in line
    assert not folder.exists()


def test_prompts_that_two_processes_cannot_share(world, folder, complain, monkeypatch):
    from mixgrpo import trainer
    from mixgrpo.engines.distributed import Process

    process = mock.MagicMock()
    process.return_value.__enter__.return_value = Process(0, 2, mock.sentinel.device)
    process.return_value.__exit__.return_value = None
    monkeypatch.setattr(trainer, "process_group", process)
    line = complain(quick(world, folder, batch__prompts=3))
    assert "batch.prompts (3)" in line
    assert "(2)" in line
    assert "--batch.prompts to 4" in line
    assert not folder.exists()


# ---- a reward that never works


def test_a_reward_that_fails_on_its_whole_first_batch(world, folder, complain):
    rewards = {**REWARDS, "service": RewardConfig("tiny_world:broken")}
    line = complain(quick(world, folder, rewards=rewards))
    assert "'service'" in line
    assert "does not answer" in line


# ---- runs that are there already


@pytest.fixture
def held(straight, folder) -> Path:
    """A folder with a run of two iterations."""
    copy_run(straight, folder, 2)
    shutil.copy2(straight / "config.json", folder / "config.json")
    return folder


def test_a_folder_that_holds_a_run(world, held, complain):
    before = files_of(held)
    line = complain(world.arguments(held))
    assert str(held) in line
    assert "iteration_00000002" in line
    assert "--run.resume true" in line
    assert "--run.folder" in line
    assert files_of(held) == before


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"update__learning_rate": 0.5}, "update.learning_rate was 0.0001, is 0.5"),
        ({"window__size": 3}, "window.size was 2, is 3"),
        ({"rewards": {"jpeg": RewardConfig("jpeg_size")}}, "rewards.redness.weight was 2.0"),
        ({"run__iterations": 1}, "has 2 iterations, run.iterations is 1"),
    ],
)
def test_a_resumed_run_with_another_recipe(world, held, complain, knobs, words):
    before = files_of(held)
    line = complain(world.arguments(held, run__resume=True, **knobs))
    assert words in line
    assert files_of(held) == before


@pytest.mark.parametrize("knob", ["batch.prompts_file", "validation.prompts_file"])
def test_a_resumed_run_with_other_prompts(world, folder, tmp_path, complain, knob):
    file = tmp_path / "mine.txt"
    file.write_text("a red circle on a gray background\n" * 3)
    knobs = {knob.replace(".", "__"): str(file)}
    assert main(quick(world, folder, **knobs)) == 0
    file.write_text("a blue circle on a gray background\n" * 3)
    line = complain(quick(world, folder, **knobs, run__resume=True, run__iterations=2))
    assert f"{knob} is {str(file)!r}, whose contents are not those of the saved run" in line


def test_a_damaged_checkpoint(world, held, complain):
    newest = checkpoints.latest(held / "checkpoints")
    (newest / "model_00000.distcp").write_bytes(b"no weights")
    before = files_of(held)
    line = complain(world.arguments(held, run__resume=True))
    assert str(newest) in line
    assert "--run.resume_from undamaged" in line
    assert files_of(held) == before


def test_a_folder_that_cannot_be_made(world, tmp_path, complain):
    (tmp_path / "file").write_text("a file, not a folder")
    line = complain(quick(world, tmp_path / "file" / "run"))
    assert str(tmp_path / "file") in line


def test_a_full_disk_while_saving(world, held, complain, monkeypatch):
    flush = os.fsync

    def full(handle: int) -> None:
        if "/checkpoints" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(handle)

    monkeypatch.setattr(os, "fsync", full)
    line = complain(world.arguments(held, run__resume=True, run__iterations=3))
    assert "No space left on device" in line
    assert "free some disk space" in line
    assert "--run.resume true" in line
    monkeypatch.undo()
    saved = checkpoints.open_saved(checkpoints.latest(held / "checkpoints"))
    assert saved.position.iteration == 2
    assert [r["iteration"] for r in training_records(held)] == [1, 2, 3]


def test_a_full_disk_at_the_start(world, held, complain, monkeypatch):
    before = (held / "metrics.jsonl").read_bytes()
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=full))
    line = complain(world.arguments(held, run__resume=True, run__iterations=3))
    assert f"cannot write {held}" in line
    assert "No space left on device" in line
    assert "free some disk space" in line
    assert (held / "metrics.jsonl").read_bytes() == before


def test_a_full_disk_while_exporting_is_one_error_and_keeps_the_checkpoint(
    world, folder, complain, monkeypatch
):
    full = OSError(errno.ENOSPC, "No space left on device", str(folder / "model"))
    with monkeypatch.context() as patch:
        patch.setattr("mixgrpo.models.export.export_weights", mock.Mock(side_effect=full))
        line = complain(quick(world, folder))
    newest = checkpoints.latest(folder / "checkpoints")
    assert "No space left on device" in line
    assert "--run.resume true" in line
    assert f"python -m mixgrpo export {newest} --output" in line
    assert main(["export", str(newest), "--output", str(folder / "later")]) == 0
    assert any((folder / "later").iterdir())


def test_a_gpu_that_is_too_small_is_told_with_an_estimate(world, folder, complain):
    """The tiny transformer in float32 with gradients, two moments and an average."""
    from mixgrpo.planning.memory import explain_training

    with (
        mock.patch("mixgrpo.trainer.rollout", side_effect=torch.OutOfMemoryError("!")),
        mock.patch("mixgrpo.trainer.memory_of", return_value=24 * 2**30),
    ):
        line = complain(quick(world, folder))
    assert "the GPU's 24.0 GiB are not enough" in line
    assert "lower --model.lora_rank" in line
    config = world.config(folder)
    count = sum(p.numel() for p in world.policy().module.parameters())
    said = explain_training(config, 2**30)
    assert f"the transformer (full) needs about {count * 4 * 5 / 2**30:.1f} GiB" in said
    assert "--model.train lora" in said
