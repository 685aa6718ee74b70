"""One tiny world for all tests, and one training run that many of them look at."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from tiny_world import World, train_here

SECRET = "0123456789abcdef0123456789abcdef01234567"

# What a test starts imports some ten thousand files: it compiles them once, not every time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# How sums are rounded depends on the number of threads. Fixtures count on this one, tests that
# change it are followed by ``_same_numbers``.
torch.set_num_threads(1)

# A shell's background jobs ignore Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# With nohup, they would ignore SIGHUP. A handler, unlike SIG_IGN, is not passed on to them.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shuffle",
        metavar="SEED",
        help="run the tests in an order drawn with this seed: none may depend on another's",
    )
    parser.addoption(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="where the tests marked gpu run; on cuda they are skipped if there is none",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On two cores all tests take ten minutes, and six without those that are marked slow."""
    if config.getoption("shuffle") is not None:
        random.Random(config.getoption("shuffle")).shuffle(items)
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU; --device cpu runs it on the CPU"))
    if os.environ.get("MIXGRPO_SLOW"):
        # First, so that at the end no core waits for another's.
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="takes long; MIXGRPO_SLOW=1 runs it"))


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """What a test computes does not depend on the tests before it: neither what it draws without a
    seed of its own, nor how sums are rounded, which the number of threads decides."""
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the tests marked gpu run: the first GPU, or the CPU with ``--device cpu``."""
    if request.config.getoption("device") == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.build(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def qwen_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The same with a Qwen-Image."""
    from small_qwen import QwenWorld  # which imports diffusers

    return QwenWorld.build(tmp_path_factory.mktemp("qwen_world"))


@pytest.fixture(scope="session")
def straight(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run of four iterations, uninterrupted, all checkpoints kept. Read only."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    config = world.config(folder, checkpoint__every=1, checkpoint__keep=0)
    with mock.patch.dict(os.environ, {"WANDB_API_KEY": SECRET}):
        train_here(config, summary=True)
    yield folder
    shutil.rmtree(folder / "checkpoints")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a test's run goes; checkpoints are large, so nothing of it stays."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
