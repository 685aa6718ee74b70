"""Tiny model folders and local servers for all the tests of the rewards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import tiny
from .judge_server import Asked, JudgeServer, Reply

# The independent implementations, which the benchmarks use too.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "benchmark"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reward name -> folder of a tiny random model; read only."""
    root = tmp_path_factory.mktemp("tiny")
    clip = tiny.open_clip_folder(root / "clip")
    return {
        "hpsv2": clip,
        "clip_score": clip,
        "pickscore": tiny.pickscore_folder(root / "pickscore"),
        "imagereward": tiny.imagereward_folder(root / "imagereward"),
    }


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy between here and the local server, no key and no rank but the tests' own."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Asked, int], Reply]], JudgeServer]]:
    servers: list[JudgeServer] = []

    def start(answer: Callable[[Asked, int], Reply]) -> JudgeServer:
        servers.append(JudgeServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
