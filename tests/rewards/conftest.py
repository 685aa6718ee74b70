"""One set of tiny model folders for all the tests of the rewards."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from . import tiny

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
