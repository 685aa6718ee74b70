"""A world for the tests: an untrained FLUX folder, a few captions, rewards that need no model."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from mixgrpo.config import Config, RewardConfig

if TYPE_CHECKING:
    from mixgrpo.models.policy import DiffusersPolicy

ROOT = Path(__file__).resolve().parent.parent
STEPS = 5
WINDOW = 2
PROMPTS = (
    "a red circle on a gray background",
    "a blue square left of a red cross on a white background",
    "a green triangle on a black background",
    "a cyan cross above a purple circle on a gray background",
    "a yellow square on a gray background",
)
VALIDATION_PROMPTS = (
    "a purple circle on a white background",
    "a red square below a green square on a black background",
    "a yellow triangle on a gray background",
)
CPU = torch.device("cpu")


# ---- rewards, as a user would write them: tiny_world:NAME


def redness(images: Tensor, texts: Sequence[str]) -> Tensor:
    """Smooth in the pixels. Where the environment asks for it, one of its calls waits; see Gate."""
    _wait_at_gate()
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def paleness(images: Tensor, texts: Sequence[str]) -> Tensor:
    return -redness(images, texts)


def contrast(images: Tensor, texts: Sequence[str]) -> Tensor:
    return images.std((1, 2, 3))


def told(images: Tensor, texts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
    """The number that the prompt file gives to each prompt, whose text it repeats."""
    assert [each["text"] for each in metadata] == list(texts)
    return torch.tensor([float(each["n"]) for each in metadata])


def sometimes_nan(images: Tensor, texts: Sequence[str]) -> Tensor:
    """NaN for every third picture."""
    scores = redness(images, texts)
    scores[::3] = float("nan")
    return scores


def broken(images: Tensor, texts: Sequence[str]) -> Tensor:
    raise ConnectionError("the scoring service does not answer")


def stuck(images: Tensor, texts: Sequence[str]) -> Tensor:
    time.sleep(600)
    return images.mean((1, 2, 3))


# ---- a gate in a reward, so that a signal finds another process at a known place


@dataclass(frozen=True)
class Gate:
    """A place in a run: the reward's ``call``-th call makes the file ``reached``, awaits ``go``."""

    folder: Path
    call: int

    @property
    def environment(self) -> dict[str, str]:
        return {"TINY_GATE": f"{self.call}:{self.folder}"}

    def wait_until_reached(self, alive: Any) -> None:
        while not (self.folder / "reached").exists():
            assert alive.poll() is None, "the run ended before its gate"
            time.sleep(0.02)

    def open(self) -> None:
        (self.folder / "go").touch()


_calls = 0


def _wait_at_gate() -> None:
    global _calls  # noqa: PLW0603
    if "TINY_GATE" not in os.environ:
        return
    call, folder = os.environ["TINY_GATE"].split(":", 1)
    _calls += 1
    if _calls != int(call):
        return
    (Path(folder) / "reached").touch()
    deadline = time.monotonic() + 600
    while not (Path(folder) / "go").exists():
        assert time.monotonic() < deadline, "nobody opened the gate"
        time.sleep(0.02)


# ---- the world


@dataclass(frozen=True)
class World:
    """Files that runs read."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "flux"

    @property
    def prompts(self) -> Path:
        return self.root / "prompts.txt"

    @property
    def validation_prompts(self) -> Path:
        return self.root / "prompts_test.txt"

    @classmethod
    def build(cls, root: Path) -> World:
        from mixgrpo.shapes.architecture import flux_pipeline

        world = cls(root)
        pipeline = flux_pipeline()
        pipeline.vae.register_to_config(shift_factor=0.1, scaling_factor=0.4)
        # Fresh weights draw gray pictures and, with an output layer of zeros, no gradients.
        torch.manual_seed(1)
        torch.nn.init.normal_(pipeline.transformer.proj_out.weight, std=0.1)
        for parameter in pipeline.vae.decoder.parameters():
            parameter.data.mul_(1.3)
        pipeline.save_pretrained(world.model)
        world.prompts.write_text("\n".join(PROMPTS) + "\n")
        world.validation_prompts.write_text("\n".join(VALIDATION_PROMPTS) + "\n")
        return world

    def config(self, folder: Path, **knobs: Any) -> Config:
        """Two prompts, four samples, T = 5, a window of 2 that moves in every iteration.

        ``knobs`` by their path with ``__`` for the dot: ``update__kl=0.1``.
        """
        config = Config(rewards=deepcopy(REWARDS))
        for path, value in {**self.base(folder), **knobs}.items():
            section, _, name = path.partition("__")
            if not name:
                setattr(config, section, value)
                continue
            assert hasattr(getattr(config, section), name), path
            setattr(getattr(config, section), name, value)
        return config

    def base(self, folder: Path) -> dict[str, Any]:
        return {
            "run__folder": str(folder),
            "run__iterations": 4,
            "run__seed": 7,
            "run__threads": 1,
            "model__path": str(self.model),
            "model__compute_dtype": "float32",
            "model__height": 64,
            "model__width": 64,
            "model__text_length": 16,
            "model__gradient_checkpointing": False,
            "sampling__steps": STEPS,
            "sampling__micro_batch": 8,
            "sampling__decode_batch": 8,
            "window__size": WINDOW,
            "window__iters_per_window": 1,
            "batch__prompts_file": str(self.prompts),
            "batch__prompts": 2,
            "batch__samples": 4,
            "update__optimizer_steps": 2,
            "update__micro_batch": 8,
            "update__learning_rate": 1e-4,
            "ema__decay": 0.9,
            "validation__every": 2,
            "validation__prompts_file": str(self.validation_prompts),
            "validation__prompts": 3,
            "validation__steps": 4,
            "validation__pictures": 3,
            "checkpoint__every": 0,
            "log__wandb": "disabled",
            "log__progress": False,
        }

    def arguments(self, folder: Path, **knobs: Any) -> list[str]:
        """The same run as a command line: ``train --run.folder ... --rewards {...}``."""
        rewards = knobs.pop("rewards", REWARDS)
        given = {**self.base(folder), **knobs}
        words = ["train"]
        for path, value in given.items():
            words += [f"--{path.replace('__', '.')}", json.dumps(value).strip('"')]
        chosen = {n: {"kind": r.kind, "weight": r.weight} for n, r in rewards.items()}
        return [*words, "--rewards", json.dumps(chosen)]

    def policy(self, **knobs: Any) -> DiffusersPolicy:
        """The base model, as a run loads it."""
        from mixgrpo.models.policy import DiffusersPolicy

        return DiffusersPolicy.load(self.config(self.root, **knobs).model, CPU, seed=7)


# Trained rewards are smooth, so that rounding cannot turn one into another; a JPEG's bytes jump.
REWARDS = {
    "redness": RewardConfig(kind="tiny_world:redness", weight=2.0),
    "contrast": RewardConfig(kind="tiny_world:contrast"),
    "jpeg": RewardConfig(kind="jpeg_size", weight=0.0),
    "facts": RewardConfig(kind="mixgrpo.shapes.judge:facts_right", weight=0.0),
}
QUICK = {
    "run__iterations": 1,
    "validation__every": 0,
    "validation__steps": 2,
    "validation__prompts": 1,
    "validation__pictures": 0,
    "ema__decay": 0.0,
    "model__train": "lora",
    "model__lora_rank": 2,
    "model__lora_alpha": 4,
}


def train_here(config: Config, summary: bool = False, device: torch.device = CPU) -> Path:
    """A training in this process, on the CPU; without the closing pictures unless asked for."""
    from mixgrpo import trainer

    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(mock.patch("torch.cuda.is_available", return_value=False))
        if not summary:
            stack.enter_context(mock.patch("mixgrpo.report.summary.summarize", return_value=""))
        return trainer.train(config)


def environment(**more: str) -> dict[str, str]:
    """Of another Python process: this package, these rewards, no GPU, no wandb account."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def refused_folder(family: Any, model: Path, config: Any) -> str:
    """The message, one line, with which a model folder is refused; the doctor finds a fault too."""
    import pytest

    from mixgrpo.doctor.model import check_model
    from mixgrpo.models.folder import check_folder

    with pytest.raises((ValueError, OSError)) as caught:
        check_folder(family, model)
    message = str(caught.value)
    assert "\n" not in message
    assert any(line.level == "error" for line in check_model(config, 1))
    return message


# ---- reading what a run left


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def training_records(folder: Path) -> list[dict[str, Any]]:
    return [record for record in records(folder) if "update/loss" in record]


def without_times(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if not key.startswith("seconds/")}
        for record in found
    ]


def checkpoint_folder(folder: Path, iteration: int) -> Path:
    return folder / "checkpoints" / f"iteration_{iteration:08d}"


def copy_run(source: Path, target: Path, iteration: int) -> Path:
    """The run as it was right after this iteration's checkpoint, had it been killed later."""
    shutil.copytree(checkpoint_folder(source, iteration), checkpoint_folder(target, iteration))
    shutil.copy2(source / "metrics.jsonl", target / "metrics.jsonl")
    (target / "checkpoints" / "latest").write_text(f"iteration_{iteration:08d}\n")
    return target


def saved_tensors(path: Path, part: str = "model") -> dict[str, Tensor]:
    """A part of a checkpoint (model, ema, optimizer), whole."""
    from mixgrpo.checkpoint import Shards

    return Shards(path).whole(part)


def same(first: Any, second: Any) -> bool:
    """Equal to the last bit, through nested dicts and lists."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(v, second[k]) for k, v in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(
            same(a, b) for a, b in zip(first, second, strict=True)
        )
    return bool(first == second)


def files_of(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Path -> inode, time and contents: unequal after any change."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_ino,
            path.stat().st_mtime_ns,
            path.read_bytes(),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
