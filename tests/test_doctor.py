"""Every line that the doctor can say, from what is made wrong on purpose."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixgrpo import doctor
from mixgrpo.checkpoint import Position
from mixgrpo.checkpoint.manifest import write_manifest
from mixgrpo.commands import main
from mixgrpo.config import Config, EngineConfig, RewardConfig, flatten
from mixgrpo.doctor import environment, guarded
from mixgrpo.doctor.devices import check_devices
from mixgrpo.doctor.lines import Line, error, exit_code, fetching, ok, render, size, warning
from mixgrpo.doctor.model import check_model
from mixgrpo.doctor.prompts import check_prompts, check_text
from mixgrpo.doctor.rewards import check_rewards
from mixgrpo.doctor.room import (
    check_disk,
    check_memory,
    checkpoint_bytes,
    exported_bytes,
    kept_checkpoints,
    memory_needed,
)
from mixgrpo.doctor.run import check_folder, check_knobs, check_wandb
from mixgrpo.planning.memory import trained_weights, training_memory
from mixgrpo.text.embeddings import Index, Record, Shard, shard_path, write_index

SHAPES = Path(__file__).parent.parent / "data" / "shapes"
SECRET = "sk-0123456789abcdef"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def without_gpu() -> Iterator[None]:
    with mock.patch("torch.cuda.is_available", return_value=False):
        yield


def shapes(folder: Path, **knobs: Any) -> Config:
    """A configuration on the Shapes world's model and prompts."""
    config = Config(rewards={"small": RewardConfig("jpeg_size")})
    given = {
        "run__folder": str(folder / "run"),
        "model__path": str(SHAPES / "flux"),
        "model__compute_dtype": "float32",
        "model__height": 64,
        "model__width": 64,
        "model__text_length": 16,
        "model__gradient_checkpointing": False,
        "batch__prompts_file": str(SHAPES / "prompts_test.txt"),
        "validation__prompts_file": str(folder / "other.txt"),
        "batch__prompts": 2,
        **knobs,
    }
    (folder / "other.txt").write_text("a small pond\n")
    for path, value in given.items():
        section, _, name = path.partition("__")
        if name:
            assert hasattr(getattr(config, section), name)
            setattr(getattr(config, section), name, value)
        else:
            setattr(config, section, value)
    return config


def only(lines: Any, level: str) -> Line:
    """The one line of this level."""
    (line,) = [line for line in lines if line.level == level]
    return line


def copy_of_model(folder: Path) -> Path:
    return Path(shutil.copytree(SHAPES / "flux", folder / "flux"))


# ---- lines


def test_exit_codes() -> None:
    assert exit_code([ok("a", "b"), warning("a", "b", "c")]) == 0
    assert exit_code([ok("a", "b"), error("a", "b", "c")]) == 1


def test_lines_are_wrapped_but_commands_and_paths_stay_whole() -> None:
    path = "/a" * 70
    text = render([error("model", "word " * 40 + path, "bash env_setup.sh")])
    assert path in text
    assert all(len(row) <= 100 for row in text.splitlines() if path not in row)
    assert text.splitlines()[-1].strip() == "-> bash env_setup.sh"


def test_sizes() -> None:
    found = [size(count) for count in (5, 1536, 3 * 2**20, 2**40)]
    assert found == ["5 B", "1.5 KiB", "3.0 MiB", "1024.0 GiB"]


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("data/models/FLUX.1-dev", "bash scripts/download_models.sh flux"),
        ("data/models/hpsv2/HPS_v2.1_compressed.pt", "bash scripts/download_models.sh hpsv2"),
        ("data/models/pickscore", "bash scripts/download_models.sh pickscore"),
        ("data/prompts_hpdv2.txt", "bash scripts/download_models.sh prompts"),
        ("my/own", "other"),
    ],
)
def test_the_command_that_fetches(path: str, command: str) -> None:
    assert fetching(path, "other") == command


def test_a_check_that_breaks_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixgrpo.doctor.run.check_wandb", lambda *_: 1 / 0)
    (line,) = guarded("wandb", doctor.OF_THE_RUN["wandb"], Config(), 0)
    assert (line.level, line.subject) == ("warning", "wandb")
    assert "ZeroDivisionError" in line.text


def test_a_missing_package_is_an_error_with_its_remedy() -> None:
    (line,) = guarded("model", "mixgrpo.no_such_module:check", Config(), 0)
    assert (line.level, line.remedy) == ("error", "bash env_setup.sh")


# ---- environment


def test_this_python_is_one_of_the_supported() -> None:
    assert only(environment.check_python(Config(), 0), "ok")


@pytest.mark.parametrize(
    ("version", "level"),
    [
        ("3.10.4", "error"),
        ("3.11.7", "ok"),
        ("3.12.1", "ok"),
        ("3.13.0", "ok"),
        ("3.14.0", "error"),
    ],
)
def test_python_3_11_to_3_13_are_supported(
    monkeypatch: pytest.MonkeyPatch, version: str, level: str
) -> None:
    monkeypatch.setattr(environment.sys, "version_info", tuple(map(int, version.split("."))))
    line = only(environment.check_python(Config(), 0), level)
    assert f"Python {version}" in line.text
    if level == "error":
        assert line.text == f"Python {version}; 3.11, 3.12 or 3.13 is needed"
        assert line.remedy == "bash env_setup.sh"


PINS = "# why\ntorch==2.11.0\njsonargparse[signatures]==4.53.0\nruff==0.17.5  # tool\n"


@pytest.mark.parametrize(
    ("changed", "level", "words"),
    [
        ({}, "ok", "all 3"),
        ({"torch": "2.11.0+cpu"}, "ok", "all 3"),
        ({"torch": "2.10.0"}, "warning", "torch 2.10.0 instead of 2.11.0"),
        ({"ruff": None}, "warning", "used by the tests: ruff"),
        ({"jsonargparse": None}, "error", "not installed: jsonargparse"),
    ],
)
def test_packages(
    changed: dict, level: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "requirements.txt").write_text(PINS)
    there = {"torch": "2.11.0", "jsonargparse": "4.53.0", "ruff": "0.17.5", **changed}
    monkeypatch.setattr(environment, "REQUIREMENTS", tmp_path / "requirements.txt")
    monkeypatch.setattr(environment, "_installed", there.get)
    (line,) = environment.check_packages(Config(), 0)
    assert line.level == level
    assert words in line.text


def test_packages_without_requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "REQUIREMENTS", tmp_path / "none.txt")
    assert "unknown" in only(environment.check_packages(Config(), 0), "warning").text


def test_the_pins_are_read_from_the_repository() -> None:
    pins = environment.read_pins(environment.REQUIREMENTS)
    assert pins["torch"] == torch.__version__.split("+")[0]
    assert len(pins) > 25


# ---- devices


def test_a_cpu_and_too_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "2 CPU cores" in only(check_devices(Config(), 2), "ok").text
    assert "3 processes share 2 cores" in only(check_devices(Config(), 3), "warning").text


def test_a_driver_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27\n")
    monkeypatch.setattr("mixgrpo.doctor.devices.DRIVER", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    line = only(check_devices(Config(), 0), "error")
    assert "470.82.01" in line.text
    assert "TORCH_INDEX_URL" in line.remedy


@pytest.mark.parametrize(
    ("processes", "level", "words"),
    [(2, None, ""), (4, "warning", "2 machines of 2 GPUs"), (3, "error", "2 machines")],
)
def test_gpus(
    processes: int, level: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = mock.Mock(total_memory=80 * 2**30)
    gpu.name = "NVIDIA H100"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: gpu)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (79 * 2**30, 80 * 2**30))
    lines = list(check_devices(Config(), processes))
    assert [line.level for line in lines[:2]] == ["ok", "ok"]
    assert "GPU 1: NVIDIA H100, 80.0 GiB, 79.0 GiB free" in lines[1].text
    assert len(lines) == 2 if level is None else words in only(lines, level).text


# ---- the model


def test_the_shapes_model_is_whole(tmp_path: Path) -> None:
    lines = list(check_model(shapes(tmp_path), 1))
    assert {line.level for line in lines} == {"ok"}
    assert "transformer: 2.4M weights" in lines[1].text


def test_no_model_folder(tmp_path: Path) -> None:
    config = shapes(tmp_path, model__path="data/models/FLUX.1-dev")
    with mock.patch.object(Path, "is_dir", return_value=False):
        line = only(check_model(config, 1), "error")
    assert line.remedy == "bash scripts/download_models.sh flux"


def remove(name: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def truncate(model: Path) -> None:
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def rename_a_weight(model: Path) -> None:
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({"other" if k == "decoder.conv_in.bias" else k: v for k, v in weights.items()}, path)


def resize_by_config(model: Path) -> None:
    path = model / "text_encoder_2" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "d_ff": 12}))


def name_a_missing_shard(model: Path) -> None:
    folder = model / "text_encoder"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove("vae"), ["vae is missing"]),
        (remove("model_index.json"), ["model_index.json is missing"]),
        (remove("tokenizer_2/tokenizer.json"), ["tokenizer_2/tokenizer.json", "spiece.model"]),
        (remove("text_encoder/model.safetensors"), ["text_encoder", "contains no weights"]),
        (truncate, ["transformer", "truncated"]),
        (rename_a_weight, ["vae", "missing: decoder.conv_in.bias", "unexpected: other"]),
        (resize_by_config, ["text_encoder_2", "of another size", "instead of"]),
        (name_a_missing_shard, ["model-2.safetensors", "does not exist"]),
        (lambda m: (m / "scheduler/scheduler_config.json").write_text("{"), ["not valid JSON"]),
        (lambda m: (m / "transformer/config.json").write_text("[]"), ["transformer"]),
    ],
)
def test_a_broken_model(change: Callable[[Path], None], words: list[str], tmp_path: Path) -> None:
    model = copy_of_model(tmp_path)
    change(model)
    line = only(check_model(shapes(tmp_path, model__path=str(model)), 1), "error")
    assert all(word in line.text for word in words), line.text
    assert "--model.path" in line.remedy


def test_guidance_of_a_family_that_has_none(tmp_path: Path) -> None:
    line = only(check_model(shapes(tmp_path, guidance__validation_scale=4.0), 1), "error")
    assert "guidance.validation_scale is 4, but FLUX has no" in line.text
    assert line.remedy.startswith("set --guidance.validation_scale 1")


def test_clip_names_of_older_versions_are_known(tmp_path: Path) -> None:
    path = copy_of_model(tmp_path) / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{name}": value for name, value in load_file(path).items()}, path)
    config = shapes(tmp_path, model__path=str(tmp_path / "flux"))
    assert {line.level for line in check_model(config, 1)} == {"ok"}


# ---- rewards


def rewards(folder: Path, **knobs: Any) -> list[Line]:
    return list(check_rewards(shapes(folder, rewards={"mine": RewardConfig(**knobs)}), 1))


@pytest.mark.parametrize(
    ("kind", "folder"),
    [
        ("hpsv2", "hpsv2"),
        ("clip_score", "clip"),
        ("pickscore", "pickscore"),
        ("imagereward", "imagereward"),
    ],
)
def test_reward_files(kind: str, folder: str, tmp_path: Path) -> None:
    """Whole; with a weight of another size; truncated; away."""
    model = Path(shutil.copytree(SHAPES / folder, tmp_path / folder))
    (line,) = rewards(tmp_path, kind=kind, model=str(model))
    assert line.level == "ok"
    assert "names and shapes fit" in line.text
    (weights,) = model.glob("*.safetensors")
    state = load_file(weights)
    name = next(name for name, value in state.items() if value.ndim == 2)
    save_file({**state, name: state[name][1:].clone()}, weights)
    (line,) = rewards(tmp_path, kind=kind, model=str(model))
    assert line.level == "error"
    assert name in line.text
    weights.write_bytes(weights.read_bytes()[:500])
    assert "truncated" in rewards(tmp_path, kind=kind, model=str(model))[0].text
    weights.unlink()
    assert "holds none of" in rewards(tmp_path, kind=kind, model=str(model))[0].text


def test_pytorch_checkpoints_are_seen_without_loading(tmp_path: Path) -> None:
    state = load_file(SHAPES / "hpsv2" / "open_clip_model.safetensors")
    knobs = {"kind": "hpsv2", "model": str(SHAPES / "hpsv2"), "checkpoint": str(tmp_path / "a.pt")}
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}},
               tmp_path / "a.pt")  # fmt: skip
    assert rewards(tmp_path, **knobs)[0].level == "ok"
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in only(rewards(tmp_path, **knobs), "error").text
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert "the format used before PyTorch 1.6" in only(rewards(tmp_path, **knobs), "warning").text
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    assert "no state dict" in only(rewards(tmp_path, **knobs), "error").text


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"kind": "hpsv3"}, "did you mean 'hpsv2'"),
        ({"kind": "nowhere.to:be_found"}, "cannot import"),
        ({"kind": "jpeg_size", "options": {"qualty": 3}}, "qualty"),
        ({"kind": "pickscore"}, "needs the option model"),
    ],
)
def test_rewards_that_cannot_be_made(knobs: dict, words: str, tmp_path: Path) -> None:
    line = only(rewards(tmp_path, **knobs), "error")
    assert words in line.text
    assert "rewards.mine" in line.remedy


def test_a_missing_published_checkpoint_names_its_download(tmp_path: Path) -> None:
    (line,) = rewards(tmp_path, kind="hpsv2", model="ViT-H-14",
                      checkpoint="data/models/hpsv2/HPS_v2.1_compressed.pt")  # fmt: skip
    assert (line.level, line.remedy) == ("error", "bash scripts/download_models.sh hpsv2")


class Models(BaseHTTPRequestHandler):
    """Serves models, to those who have the key."""

    models: ClassVar[list[str]] = ["judge"]

    def do_GET(self) -> None:
        allowed = self.headers.get("Authorization") == f"Bearer {SECRET}"
        body = json.dumps(self.listing() if allowed else {"got": SECRET}).encode()
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(body)

    def listing(self) -> dict[str, Any]:
        return {"data": [{"id": model} for model in self.models]}

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Models) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


@pytest.mark.parametrize(
    ("key", "model", "level", "words"),
    [
        (SECRET, "judge", "ok", "answers (HTTP 200)"),
        (SECRET, "other", "warning", "serves judge, not other"),
        (f"{SECRET}x", "judge", "error", "refuses the key"),
        ("", "judge", "error", "refuses a request without a key"),
    ],
)
def test_a_judge_that_answers(
    key: str, model: str, level: str, words: str, server: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setenv("NO_PROXY", "*")
    lines = rewards(tmp_path, kind="vlm", model=model, options={"urls": [server]})
    assert words in only(lines, level).text
    assert SECRET not in render(lines)


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (["".join(f"\\u{ord(char):04x}" for char in SECRET), "other"], "serves ***, other, not j"),
        (["m" * 10_000_000], "answers (HTTP 200)"),  # too large to be read
        (["m" * 1000], f"serves {'m' * 200}..., not judge"),
    ],
)
def test_a_judge_that_lists_anything(
    models: list[str], words: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(Models, "models", models)
    (line,) = rewards(tmp_path, kind="vlm", model="judge", options={"urls": [server]})
    assert words in line.text


def test_a_judge_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        line = only(rewards(tmp_path, kind="vlm", model="m", options={"urls": [url]}), "error")
    assert "does not answer" in line.text
    assert "--rewards.mine.options.urls" in line.remedy


# ---- prompts and text


def test_prompts_are_counted(tmp_path: Path) -> None:
    lines = list(check_prompts(shapes(tmp_path), 1))
    assert {line.level for line in lines} == {"ok"}
    assert "256 prompts (123 distinct), none longer than 16 tokens" in lines[0].text


def test_the_format_and_the_metadata_of_prompts_are_told(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a", "tag": 1}\n{"prompt": "b", "tag": 1, "m": 2}\n{"prompt": "a"}\n'
    )
    lines = list(check_prompts(shapes(tmp_path, batch__prompts_file=str(path)), 1))
    assert "JSONL with the metadata tag (2 prompts), m (1 prompts), 3 prompts" in lines[0].text
    assert "validation.prompts_file: plain text, 1 prompts" in lines[1].text
    path.write_text(json.dumps({"prompt": "a", **{f"k{i}": i for i in range(10)}}))
    lines = list(check_prompts(shapes(tmp_path, batch__prompts_file=str(path)), 1))
    assert "metadata k0, k1, k2, k3, k4, k5, k6, k7 and 2 more, 1 prompts" in lines[0].text
    path.write_text(json.dumps({"prompt": "a", "b\n\u001b[31m": 1, "k" * 200: 2}))
    text = next(check_prompts(shapes(tmp_path, batch__prompts_file=str(path)), 1)).text
    assert text.isprintable()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"# mine\na red circle\n# yours\n", "2 prompts begin with '# ', such as '# mine'; a file"),
        (b"- a red circle\n- a blue one\n", "every prompt begins with '- '"),
        (b'"a circle"\n"a square"\n', """every prompt begins with '"'"""),
    ],
)
def test_lines_that_may_not_be_meant_as_they_are(
    content: bytes, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    line = only(check_prompts(shapes(tmp_path, batch__prompts_file=str(path)), 1), "warning")
    assert words in line.text
    assert line.remedy


@pytest.mark.parametrize("content", [b"#red circle\n", b'"Open" sign\na - b\n', b'"Open"\n'])
def test_lines_that_are_meant_as_they_are(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    lines = check_prompts(shapes(tmp_path, batch__prompts_file=str(path)), 1)
    assert {line.level for line in lines} == {"ok"}


@pytest.mark.parametrize(
    ("content", "level", "words"),
    [
        (b"", "error", "contains no prompt"),
        (b'[{"prompt": "a"}]', "error", "is a JSON array, not JSONL; convert it with"),
        (b"\xff\xfe", "error", "not UTF-8"),
        (None, "error", "is not a file"),
        (b"a red circle\n" + b"a red circle and " * 9, "warning", "1 exceed"),
    ],
)
def test_prompts_that_are_wrong(
    content: bytes | None, level: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    line = only(check_prompts(shapes(tmp_path, batch__prompts_file=str(path)), 1), level)
    assert words in line.text
    assert line.remedy


def test_prompts_in_both_files(tmp_path: Path) -> None:
    config = shapes(tmp_path)
    config.batch.prompts_file = config.validation.prompts_file
    assert "1 of 1 validation prompts" in only(check_prompts(config, 1), "warning").text


def test_lengths_without_a_tokenizer(tmp_path: Path) -> None:
    lines = list(check_prompts(shapes(tmp_path, model__path=str(tmp_path)), 1))
    assert {line.level for line in lines} == {"warning"}


def test_embeddings(tmp_path: Path) -> None:
    from mixgrpo.models.text import TextEncoders

    assert only(check_text(shapes(tmp_path), 1), "ok")
    config = shapes(tmp_path, text__mode="embeddings", text__embeddings=str(tmp_path / "stored"))
    config.batch.prompts_file = config.validation.prompts_file
    line = only(check_text(config, 1), "error")
    assert "no index.json" in line.text
    assert line.remedy.startswith("python -m mixgrpo preprocess")
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "shard_00000.safetensors").write_bytes(b"1234")
    shard = Shard(["a small pond"], Record(4, "", [""], [8]))
    encoder = TextEncoders.identify(config.model)
    write_index(tmp_path / "stored", Index(encoder, [shard]))
    assert "holds all 1 prompts" in only(check_text(config, 1), "ok").text
    write_index(tmp_path / "stored", Index({**encoder, "text_length": 8}, [shard]))
    assert "another text_length" in only(check_text(config, 1), "error").text


# ---- memory and disk


def test_memory_of_full_training_by_hand(tmp_path: Path) -> None:
    """In float32: the weights, gradients, two moments, the average and a reference."""
    config = shapes(tmp_path, ema__decay=0.9, update__kl=0.1)
    weights = trained_weights(config)
    with mock.patch("mixgrpo.doctor.room.reward_bytes", return_value=77):
        found = memory_needed(config, 1, 1)
        config.scoring.placement, config.text.placement = "offload", "cpu"
        less = memory_needed(config, 1, 1)
    assert found.weights == found.gradients == found.average == found.reference == 4 * weights
    assert found.optimizer == 8 * weights
    assert (found.rewards, found.visiting, found.context) == (77, 0, 0)
    assert (less.rewards, less.visiting, less.text) == (0, 77, 0)
    assert found.held - less.held == 77 + found.text


def test_memory_is_that_of_the_runs_engine(tmp_path: Path) -> None:
    """What one process cannot hold, shards of it may: here 8 processes on each machine."""
    knobs = {"engine__kind": "fsdp", "engine__gather": "evaluation", "engine__offload": False}
    config = shapes(tmp_path, **knobs, engine__reduce="micro_batch")
    weights = trained_weights(config)
    assert training_memory(config, 32, 8).weights == 4 * weights // 32
    assert training_memory(config, 32, 8).optimizer == 8 * weights // 32
    config.engine.hybrid = True
    assert training_memory(config, 32, 8).weights == 4 * weights // 8
    config.engine = EngineConfig(kind="deepspeed", zero_stage=2)
    assert training_memory(config, 32, 8).weights == 4 * weights
    assert training_memory(config, 32, 8).optimizer < training_memory(config).optimizer / 16
    assert training_memory(config, 32, 8).gradients == 4 * weights, "summed up whole"


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_trained_weights_are_the_models(targets: str, tmp_path: Path) -> None:
    from mixgrpo.models.policy import DiffusersPolicy

    knobs = {"model__train": "lora", "model__lora_rank": 3, "model__lora_targets": targets}
    config = shapes(tmp_path, **knobs)
    policy = DiffusersPolicy.load(config.model, torch.device("cpu"), seed=1)
    trained = sum(p.numel() for p in policy.module.parameters() if p.requires_grad)
    assert trained_weights(config) == trained


@pytest.mark.parametrize(
    ("there", "level"), [(10 * 2**30, "ok"), (None, "warning"), (2**20, "error")]
)
def test_memory_against_what_is_there(there: int | None, level: str, tmp_path: Path) -> None:
    with mock.patch("mixgrpo.doctor.room.memory_of_a_process", return_value=there):
        (line,) = check_memory(shapes(tmp_path), 1)
    assert line.level == level
    assert "optimizer" in line.text


def test_memory_that_is_close(tmp_path: Path) -> None:
    config = shapes(tmp_path)
    there = memory_needed(config, 1, 1).peak
    with mock.patch("mixgrpo.doctor.room.memory_of_a_process", return_value=there):
        assert "close to" in only(check_memory(config, 1), "warning").text
    with mock.patch("mixgrpo.doctor.room.memory_of_a_process", return_value=there - 1):
        assert "more than the" in only(check_memory(config, 1), "error").text


def test_gradient_checkpointing_takes_less(tmp_path: Path) -> None:
    plain = training_memory(shapes(tmp_path))
    less = training_memory(shapes(tmp_path, model__gradient_checkpointing=True))
    assert less.kept < plain.kept


@pytest.mark.parametrize("check", [check_memory, check_disk])
def test_room_without_a_model(check: Callable, tmp_path: Path) -> None:
    (line,) = check(shapes(tmp_path, model__path=str(tmp_path / "none")), 1)
    assert line.level == "warning"


@pytest.mark.parametrize(
    ("iterations", "every", "keep", "expected"),
    [(100, 25, 2, 3), (100, 25, 0, 4), (30, 25, 2, 2), (100, 0, 2, 1), (110, 25, 0, 5)],
)
def test_checkpoints_at_once(
    iterations: int, every: int, keep: int, expected: int, tmp_path: Path
) -> None:
    knobs = {"run__iterations": iterations, "checkpoint__every": every, "checkpoint__keep": keep}
    assert kept_checkpoints(shapes(tmp_path, **knobs)) == expected


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = shapes(tmp_path, ema__decay=0.9)
    assert checkpoint_bytes(config) == 16 * trained_weights(config)
    assert only(check_disk(config, 1), "ok")
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(0, 0, 3 * checkpoint_bytes(config)))
    assert "--checkpoint.keep" in only(check_disk(config, 1), "error").remedy  # the export is more
    saved = Path(config.run.folder) / "checkpoints" / "iteration_00000025" / "model"
    saved.parent.mkdir(parents=True)
    saved.touch()
    os.truncate(saved, exported_bytes(config))  # it takes no room anew
    assert only(check_disk(config, 1), "ok")


def test_smaller_moments_and_weights_are_smaller_files(tmp_path: Path) -> None:
    knobs = {"update__optimizer": "adamw_8bit", "model__weights": "bfloat16_stochastic"}
    config = shapes(tmp_path, ema__decay=0.0, **knobs)
    assert checkpoint_bytes(config) == 4 * trained_weights(config)


def test_disk_of_embeddings(tmp_path: Path) -> None:
    """16 tokens of the T5's width and one pooled vector, float32, for 124 distinct prompts."""
    from mixgrpo.doctor.room import missing_embedding_bytes

    config = shapes(tmp_path, text__mode="embeddings", text__embeddings=str(tmp_path / "stored"))
    width, pooled = (
        json.loads((SHAPES / "flux" / part / "config.json").read_text())[key]
        for part, key in (("text_encoder_2", "d_model"), ("text_encoder", "hidden_size"))
    )
    prompts = list(dict.fromkeys((SHAPES / "prompts_test.txt").read_text().splitlines()))
    count = len({*prompts, "a small pond"})
    each = 4 * (16 * width + pooled)
    assert missing_embedding_bytes(config) == count * each
    # Stopped before the second shard, which holds another file's prompts too.
    shards = [Shard(prompts[:100], None), Shard([*prompts[100:], "elsewhere"], None)]
    folder = tmp_path / "stored"
    folder.mkdir()
    write_index(folder, Index({}, shards))
    shard_path(folder, 0).touch()
    rest = {*prompts, "elsewhere", "a small pond"} - set(prompts[:100])
    assert missing_embedding_bytes(config) == len(rest) * each


# ---- knobs, folder, wandb


def test_knobs(tmp_path: Path) -> None:
    """25 steps and a window that wanders to the end leave no step out in 525 iterations."""
    lines = list(check_knobs(shapes(tmp_path, run__iterations=525), 2))
    assert [line.level for line in lines] == ["ok"]
    assert "2 processes" in lines[0].text
    assert "never trained" in only(check_knobs(shapes(tmp_path), 1), "warning").text
    assert "batch.prompts (2)" in only(check_knobs(shapes(tmp_path), 3), "error").text
    assert (
        "window of size 30" in only(check_knobs(shapes(tmp_path, window__size=30), 1), "error").text
    )


def save_state(config: Config, iteration: int = 25, **changed: Any) -> None:
    folder = Path(config.run.folder) / "checkpoints" / f"iteration_{iteration:08}"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text(folder.name)
    write_manifest(folder, Position(iteration, 0, {**flatten(config), **changed}), {})


def test_a_free_folder(tmp_path: Path) -> None:
    assert "is unused" in only(check_folder(shapes(tmp_path), 1), "ok").text


def test_a_folder_with_a_run(tmp_path: Path) -> None:
    config = shapes(tmp_path)
    save_state(config)
    line = only(check_folder(config, 1), "error")
    assert "25 iterations that can continue to 300" in line.text
    assert "--run.resume true" in line.remedy
    config.run.resume = True
    assert only(check_folder(config, 1), "ok")
    config.run.iterations = 20
    assert "more than run.iterations (20)" in only(check_folder(config, 1), "error").text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"update.learning_rate": 0.5}, "update.learning_rate was 0.5"),
        ({"contents.batch.prompts_file": "0"}, "whose contents are not those of the saved run"),
    ],
)
def test_a_run_that_does_not_go_on(changed: dict, words: str, tmp_path: Path) -> None:
    config = shapes(tmp_path, run__resume=True)
    save_state(config, **changed)
    assert words in only(check_folder(config, 1), "error").text


def test_the_checkpoint_that_the_run_would_continue_from(tmp_path: Path) -> None:
    config = shapes(tmp_path, run__resume=True)
    save_state(config, 25)
    save_state(config, 50)
    for wanted, said in {
        "latest": "a run of 50 iterations",
        "undamaged": "a run of 50 iterations",
        "iteration_00000025": "a run of 25 iterations",
    }.items():
        config.run.resume_from = wanted
        assert said in only(check_folder(config, 1), "ok").text
    config.run.resume_from = "iteration_00000030"
    assert "is not a checkpoint in" in only(check_folder(config, 1), "error").text


def test_damaged_folders(tmp_path: Path) -> None:
    config = shapes(tmp_path)
    folder = Path(config.run.folder)
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("{}\n")
    assert "without a checkpoint" in only(check_folder(config, 1), "warning").text
    save_state(config)
    (folder / "checkpoints" / "iteration_00000025" / "state.json").write_text("{")
    assert "cannot continue" in only(check_folder(config, 1), "error").text
    (folder / "checkpoints" / "latest").write_text("iteration_00000050")
    assert "not a checkpoint beside it" in only(check_folder(config, 1), "error").text
    config.run.folder = str(tmp_path / "other.txt" / "run")
    assert "cannot be created" in only(check_folder(config, 1), "error").text


@pytest.mark.parametrize(
    ("mode", "key", "level", "words"),
    [
        ("auto", SECRET, "ok", "online; WANDB_API_KEY is set"),
        ("auto", "", "ok", "not used"),
        ("online", "", "warning", "not set"),
        ("disabled", SECRET, "ok", "disabled"),
    ],
)
def test_wandb(
    mode: str, key: str, level: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    (line,) = check_wandb(shapes(tmp_path, log__wandb=mode), 1)
    assert line.level == level
    assert words in line.text
    assert SECRET not in render([line])


# ---- the command


def test_the_shapes_recipe_is_healthy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.chdir(SHAPES.parent.parent)
    words = ["--recipe", "shapes_mixgrpo", "--run.folder", str(tmp_path / "run"), "--processes=1"]
    assert main(["doctor", *words]) == 0
    said = capsys.readouterr()
    assert "0 errors" in said.out
    assert "check itself failed" not in said.out
    assert SECRET not in said.out + said.err
    assert {row.split()[1] for row in said.out.splitlines() if row.startswith("ok")} == {
        *doctor.ENVIRONMENT, *doctor.OF_THE_RUN
    }  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_the_number_of_processes_reaches_the_devices(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(SHAPES.parent.parent)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    main(["doctor", "--recipe", "shapes_mixgrpo", "--processes", "8", "--batch.prompts", "8"])
    assert "8 processes share 2 cores" in capsys.readouterr().out


def test_missing_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder without data: every download is named, no traceback, exit code 1."""
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--recipe", "flux_mixgrpo"]) == 1
    said = capsys.readouterr()
    for name in ("flux", "hpsv2", "pickscore", "imagereward", "clip"):
        assert f"-> bash scripts/download_models.sh {name}\n" in said.out
    assert "batch.prompts_file is 'data/prompts.txt', which is not a file" in " ".join(
        said.out.split()
    )
    assert "Traceback" not in said.out + said.err
    assert "check itself failed" not in said.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "shape"], "there is no recipe 'shape'"),
        (["--recipe", "shapes_mixgrpo", "--processes", "0"], "--processes is '0'"),
        (["--run.iteration", "3"], "did you mean run.iterations?"),
    ],
)
def test_words_that_are_wrong(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *words]) == 1
    assert message in capsys.readouterr().err


def test_without_the_parser_the_environment_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    modules = {"mixgrpo.commands.command_line": None}
    with mock.patch.dict("sys.modules", modules):
        assert main(["doctor", "--recipe", "shapes_mixgrpo"]) == 1
    said = capsys.readouterr()
    assert "Python 3." in said.out
    assert "bash env_setup.sh" in said.err
