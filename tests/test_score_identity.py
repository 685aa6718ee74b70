"""Which scores are those of the same reward: options, weights and code by their contents."""

from __future__ import annotations

import datetime
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from mixgrpo.config import RewardConfig
from mixgrpo.evaluation.score_store import column, identity
from mixgrpo.files.fingerprint import files_in, fingerprint, fingerprint_files


def test_what_a_rewards_identity_holds(tmp_path, monkeypatch):
    """Options, weights and code; not its weight in training."""
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "sub" / "weights").write_text("one")
    module = tmp_path / "a_module.py"
    module.write_text("def f(images, texts): ...")
    monkeypatch.syspath_prepend(tmp_path)

    def now(kind: str = "a_module:f", **knobs: Any) -> str:
        return column(identity(RewardConfig(kind, **{"model": str(model), **knobs})))

    first = now()
    assert now() == now(weight=0.0) == first
    seen = {first, now(options={"quality": 3}), now("a_module:g"), now(model="ViT-H-14"),
            now(checkpoint=str(module)), now(options={"tokenizer": str(module)})}  # fmt: skip
    (model / "sub" / "weights").write_text("three")
    seen.add(now())
    module.write_text("def f(images, texts): return 1")
    seen.add(now())
    assert len(seen) == 8


def test_weights_count_by_their_contents_whatever_their_dates(tmp_path):
    """One byte of a file so large that a fast fingerprint reads only samples of it."""
    weights = tmp_path / "weights.pt"
    weights.write_bytes(bytes(3 * 2**20))

    def now(**knobs: Any) -> str:
        os.utime(weights, ns=(1, 1))
        given = {"checkpoint": str(weights), **knobs}
        return column(identity(RewardConfig("clip_score", **given)))

    first = now()
    assert now() == first
    with weights.open("r+b") as file:
        file.seek(5000)
        file.write(b"\1")
    fresh = fingerprint_files([weights])
    second = now()
    assert second != first
    weights.write_bytes(bytes(3 * 2**20))
    assert fingerprint_files([weights]) == fresh, "the samples miss it"
    assert now() == first
    assert now(options={"deep": [{"er": str(tmp_path)}]}) != first
    nested = now(options={"deep": [{"er": str(tmp_path)}]})
    (tmp_path / "beside").write_text("new")
    assert now(options={"deep": [{"er": str(tmp_path)}]}) != nested


@pytest.mark.parametrize(
    "text",
    ["x" * 300, "a\0b", "/" * 5000, "~nobody_at_all/x", "", ".", "..", "/", "\ud800", "a\nb", "~"],
)
def test_an_option_that_is_no_path_is_text(text):
    """Also a folder around the current one, which must not be read as weights."""
    found = identity(RewardConfig("vlm", model="m", options={"template": text}))
    assert found["files"] == {}


def test_a_folder_that_is_too_large_to_be_read_completely_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr("mixgrpo.evaluation.score_store.MOST_READ", 10)
    (tmp_path / "weights").write_bytes(bytes(11))
    knobs = RewardConfig("clip_score", model=str(tmp_path))
    assert identity(knobs)["files"] == {str(tmp_path): f"sampled {fingerprint(tmp_path)}"}


def test_files_behind_links_count_and_a_link_that_leads_back_does_not_matter(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").write_text("one")
    model = tmp_path / "model"
    model.mkdir()
    (model / "part").symlink_to(tmp_path / "elsewhere")
    (model / "loop").symlink_to(model)
    (model / ".hidden").mkdir()
    (model / ".hidden" / "lock").write_text("")
    os.mkfifo(model / "fifo")
    (model / "device").symlink_to("/dev/zero")
    assert files_in(model) == [model / "part" / "weights"]
    before = column(identity(RewardConfig("clip_score", model=str(model))))
    (tmp_path / "elsewhere" / "weights").write_text("two")
    assert column(identity(RewardConfig("clip_score", model=str(model)))) != before


def test_options_that_json_lacks_have_an_identity():
    values = [
        math.inf,
        -math.inf,
        math.nan,
        {1: 2},
        datetime.date(2026, 1, 1),
        {"a": [math.inf]},
        1,
    ]
    found = {column(identity(RewardConfig("jpeg_size", options={"x": x}))) for x in values}
    assert len(found) == len(values)
    json.dumps([identity(RewardConfig("m:f", options={"x": x})) for x in values], allow_nan=False)


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A reward of a user's own package, with a module beside the package."""
    folder = tmp_path / "own_rewards"
    (folder / "deep").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "deep" / "__init__.py").write_text("from . import maths\n")
    (folder / "deep" / "maths.py").write_text("from ..base import SCALE\n")
    (folder / "base.py").write_text("SCALE = 1.0\n")
    (folder / "unused.py").write_text("")
    (tmp_path / "beside_rewards.py").write_text("import own_rewards.deep\n")
    (folder / "mine.py").write_text(
        "import torch\n"
        "def f(images, texts):\n"
        "    import beside_rewards\n"
        "    from mixgrpo.rewards.images import resize\n"
        "    return torch.zeros(len(texts))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_code_counts_with_all_that_it_imports(package):
    def now() -> dict[str, str]:
        return identity(RewardConfig("own_rewards.mine:f"))["code"]

    first = now()
    own = ("own_rewards", "own_rewards.mine", "own_rewards.deep", "own_rewards.deep.maths")
    assert {*own, "own_rewards.base", "beside_rewards", "mixgrpo.rewards.images"} <= set(first)
    assert {"mixgrpo.evaluation.pictures", "torch", "pillow", "transformers"} <= set(first)
    assert "own_rewards.unused" not in first
    for file, name in (("base.py", "own_rewards.base"), ("../beside_rewards.py", "beside_rewards")):
        (package / file).write_text((package / file).read_text() + "# edited\n")
        after = now()
        assert {key for key in after if after[key] != first[key]} == {name}
        first = after


@pytest.mark.parametrize("kind", ["hpsv2", "clip_score", "pickscore", "imagereward", "vlm", "ocr"])
def test_scores_of_the_package_count_with_the_code_that_they_share(kind, monkeypatch):
    """Also code that only shared modules import."""
    changed = ["mixgrpo.rewards.images", "mixgrpo.rewards.scoring", "mixgrpo.evaluation.pictures"]
    before = identity(RewardConfig(kind))
    assert set(changed) <= set(before["code"])
    real = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: real(self) + b"#" * (self.name == "images.py")
    )
    after = identity(RewardConfig(kind))
    assert [n for n in after["code"] if after["code"][n] != before["code"][n]] == changed[:1]


@pytest.mark.parametrize(
    "source",
    ["import nowhere.at.all", "def f(:", "\0", "from . import x", "from .... import y", ""],
)
def test_code_that_cannot_be_followed_has_an_identity(tmp_path, monkeypatch, source):
    (tmp_path / "odd_reward.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert "odd_reward" in identity(RewardConfig("odd_reward:f"))["code"]
    assert identity(RewardConfig("no_such_module_here:f"))["code"]
