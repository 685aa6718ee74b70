"""Evaluation: statistics by hand and by closed form, every picture scored once, the gallery."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Command
from tiny_world import ROOT, environment
from torch import Tensor

from mixgrpo.commands import main
from mixgrpo.commands.evaluate import parse
from mixgrpo.config import Config, RewardConfig, ScoringConfig
from mixgrpo.engines.distributed import Process
from mixgrpo.evaluation import comparison
from mixgrpo.evaluation.comparison import (
    Bootstrap,
    compare,
    differences,
    estimate,
    pairwise_distance,
    win_rate,
)
from mixgrpo.evaluation.evaluate import Evaluation, Job, batches, evaluate, features_by
from mixgrpo.evaluation.gallery import (
    ALL,
    EDGE,
    Choice,
    Standing,
    chosen,
    mean_z,
    standings,
    thumbnail,
)
from mixgrpo.evaluation.manifests import read_manifests
from mixgrpo.evaluation.report import write_report
from mixgrpo.evaluation.score_store import Store
from mixgrpo.rewards import RewardError
from mixgrpo.run.pictures import to_bytes, to_pil
from mixgrpo.shapes.renderer import render
from mixgrpo.shapes.scenes import alter, split
from mixgrpo.shapes.scenes import parse as scene_of

ALONE = Process(0, 1, torch.device("cpu"))
PROMPTS = ("a circle", "a <b>square</b> & more, see https://example.org", "a cross")
Pictures = Mapping[tuple[int, int], tuple[int, int, int]]  # (index, sample) -> its colour

# ---- rewards: test_evaluation:NAME

CALLS: list[str] = []


def counting(images: Tensor, texts: Sequence[str]) -> Tensor:
    """The red channel's mean, in bytes; writes down what it was asked."""
    CALLS.extend(texts)
    return images[:, 0].mean((1, 2)) * 255


def only_squares(images: Tensor, texts: Sequence[str]) -> Tensor:
    """Fails on every batch in which something else is asked for."""
    if not all("square" in text for text in texts):
        raise ValueError("I know squares alone")
    return torch.ones(len(texts))


def told(images: Tensor, texts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
    """The number that the manifest gives to each prompt, 0 if it gives none."""
    CALLS.extend(f"{text} {each}" for text, each in zip(texts, metadata, strict=True))
    return torch.tensor([float(each.get("n", 0)) for each in metadata])


def interrupted(images: Tensor, texts: Sequence[str]) -> Tensor:
    if len(CALLS) == 10:
        raise KeyboardInterrupt
    return counting(images, texts)


def wrong_shape(images: Tensor, texts: Sequence[str]) -> Tensor:
    return torch.ones(3)


class Colours:
    """Its image features are the mean colour, from 0 to 255."""

    def __init__(self, *, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        return self.factor * images.mean((1, 2, 3))

    def image_features(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * 255


COUNTING = {"counting": RewardConfig("test_evaluation:counting")}


def write(folder: Path, pictures: Pictures, size: Callable[[int], int] = lambda _: 8) -> Path:
    """A manifest of pictures of one colour each."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for (index, sample), colour in pictures.items():
        file = f"{index:05d}_{sample:02d}.png"
        Image.new("RGB", (size(index), 8), colour).save(folder / file)
        entries.append({"index": index, "sample": sample, "prompt": PROMPTS[index], "file": file})
    content = {"version": 1, "settings": {"steps": 3}, "images": entries}
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


def with_metadata(folder: Path, metadata: Mapping[int, Any]) -> Path:
    """Adds metadata to the images of these prompts."""
    images = json.loads((folder / "manifest.json").read_text())["images"]
    for entry in images:
        if entry["index"] in metadata:
            entry["metadata"] = metadata[entry["index"]]
    return edit(folder, images=images)


def edit(folder: Path, **changes: Any) -> Path:
    """Changes the manifest's content."""
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def run(
    folders: Sequence[Path | str],
    output: Path,
    rewards: Mapping[str, RewardConfig] = COUNTING,
    micro_batch: int = 4,
) -> Evaluation:
    config = Config(rewards=dict(rewards), scoring=ScoringConfig(micro_batch))
    config.log.progress = False
    CALLS.clear()
    manifests = read_manifests([str(folder) for folder in folders])
    return evaluate(config, manifests, Store.load(output / "scores.json"), ALONE)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", {(i, s): (10 * i + s, 0, 0) for i in range(3) for s in (0, 1)})


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    pictures = {(i, s): (10 * i + 2 * s, 5, 0) for i in range(3) for s in (0, 1)}
    return write(tmp_path / "tuned", pictures)


# ---- statistics


def normal_values(prompts: int, samples: int, seed: int = 1) -> dict[tuple[int, int], float]:
    """Every prompt's samples are equal."""
    drawn = np.random.default_rng(seed).normal(3.0, 2.0, prompts)
    return {(i, s): float(drawn[i]) for i in range(prompts) for s in range(samples)}


def test_the_interval_is_the_normal_one_for_many_prompts():
    values = normal_values(1000, 1)
    scores = np.array(list(values.values()))
    found = estimate(values, Bootstrap(4000))
    half = 1.96 * scores.std() / math.sqrt(1000)
    assert found.value == pytest.approx(scores.mean(), abs=1e-12)
    assert found.high - found.value == pytest.approx(half, rel=0.06)
    assert found.value - found.low == pytest.approx(half, rel=0.06)


def test_equal_scores_have_no_width():
    found = estimate({(i, 0): 0.1 for i in range(7)}, Bootstrap(50))
    assert found.low == found.value == found.high == 0.1


def test_prompts_are_drawn_and_not_pictures():
    """Eight copies of every picture say no more than one; as prompts of their own they would."""
    copies = normal_values(60, 8)
    found = estimate(copies, Bootstrap(1000))
    single = estimate(normal_values(60, 1), Bootstrap(1000))
    assert found.low == pytest.approx(single.low, abs=1e-12)
    assert found.high == pytest.approx(single.high, abs=1e-12)
    apart = {(place, 0): value for place, value in enumerate(copies.values())}
    narrow = estimate(apart, Bootstrap(1000))
    ratio = (found.high - found.low) / (narrow.high - narrow.low)
    assert ratio == pytest.approx(math.sqrt(8), rel=0.15)


def test_a_prompt_that_stands_several_times_in_the_file_is_drawn_as_one():
    values = normal_values(60, 1)
    twice = {(2 * i + k, 0): value for (i, _), value in values.items() for k in (0, 1)}
    prompts = {index: f"prompt {index // 2}" for index, _ in twice}
    found, single = (estimate(v, Bootstrap(1000), p) for v, p in ((twice, prompts), (values, None)))
    width = single.high - single.low
    assert found.high - found.low == pytest.approx(width, rel=0.1)
    naive = estimate(twice, Bootstrap(1000))
    assert naive.high - naive.low == pytest.approx(width / 2**0.5, rel=0.1)


def test_two_prompts_by_hand():
    """Four equally likely draws: both, twice the one, twice the other; the mean is over pictures"""
    found = estimate({(0, 0): 0.0, (0, 1): 0.0, (0, 2): 0.0, (5, 0): 1.0}, Bootstrap(1000))
    assert (found.value, found.low, found.high) == (0.25, 0.0, 1.0)


def test_one_prompt_has_a_mean_and_no_interval():
    found = estimate({(0, 0): 1.0, (0, 1): 2.0, (0, 2): math.nan}, Bootstrap())
    assert found.value == 1.5
    assert math.isnan(found.low)
    assert math.isnan(estimate({(0, 0): math.nan}, Bootstrap()).value)


def test_the_seed_decides_and_the_size_of_chunks_does_not():
    values = normal_values(30, 1)
    found = estimate(values, Bootstrap(200, seed=3))
    assert estimate(values, Bootstrap(200, seed=3)) == found
    assert estimate(values, Bootstrap(200, seed=4)) != found
    with mock.patch.object(comparison, "_CHUNK", 100):
        assert estimate(values, Bootstrap(200, seed=3)) == found


def test_wins_and_differences_by_hand():
    nan = math.nan
    baseline = {(0, 0): 1.0, (0, 1): 1.0, (1, 0): 1.0, (1, 1): nan, (2, 0): 1.0}
    own = {(0, 0): 2.0, (0, 1): 1.0, (1, 0): 0.5, (1, 1): 9.0, (2, 0): nan, (3, 0): 7.0}
    pairs = differences(own, baseline)
    assert pairs == {(0, 0): 1.0, (0, 1): 0.0, (1, 0): -0.5}
    assert win_rate(pairs) == 0.5
    assert math.isnan(win_rate({}))
    first, second = compare("r", {"base": baseline, "own": own}, "base", Bootstrap(100))
    assert (first.pairs, first.scored, first.pictures) == (0, 4, 5)
    assert math.isnan(first.wins)
    assert (second.pairs, second.scored, second.pictures) == (3, 5, 6)
    assert second.mean.value == pytest.approx(19.5 / 5)
    assert second.difference.value == pytest.approx(0.5 / 3)
    # Prompt 0 differs by 0.5 on average, prompt 1 by -0.5: the two extreme draws.
    assert (second.difference.low, second.difference.high) == (-0.5, 0.5)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ([[1, 0], [0, 3]], 1.0),
        ([[1, 2], [2, 4]], 0.0),
        ([[1, 0], [-5, 0]], 2.0),
        ([[1, 0], [7, 0], [0, 2]], 2 / 3),
        ([[3, 4], [4, 3], [5, 0]], 1 - (0.96 + 0.6 + 0.8) / 3),
    ],
)
def test_pairwise_distance_by_hand(features, expected):
    found = pairwise_distance(torch.tensor(features, dtype=torch.float32))
    assert found == pytest.approx(expected, abs=1e-7)


# ---- metadata of the prompts

TOLD = {"told": RewardConfig("test_evaluation:told")}


def test_metadata_of_a_manifest_reaches_the_reward_that_takes_it(base, tmp_path):
    with_metadata(base, {0: {"n": 5, "list": [0.5]}, 2: {"n": -1}})
    found = run([base], tmp_path / "out", {**TOLD, **COUNTING})
    each = {index: [found.scores["told"]["base"][index, s] for s in (0, 1)] for index in range(3)}
    assert each == {0: [5, 5], 1: [0, 0], 2: [-1, -1]}
    assert CALLS.count("a circle {'n': 5, 'list': [0.5]}") == 2
    assert CALLS.count(f"{PROMPTS[1]} {{}}") == 2


def test_scores_with_other_metadata_are_scores_of_their_own(base, tmp_path):
    with_metadata(base, {0: {"n": 5}})
    run([base], tmp_path / "out", TOLD)
    run([base], tmp_path / "out", TOLD)
    assert CALLS == []
    with_metadata(base, {0: {"n": 6}})
    found = run([base], tmp_path / "out", TOLD)
    assert CALLS == ["a circle {'n': 6}"] * 2
    assert found.scores["told"]["base"][0, 0] == 6


def test_models_that_were_told_otherwise_are_not_compared(base, tuned, tmp_path):
    """Unless no reward asks for it."""
    with_metadata(base, {1: {"n": 5}})
    words = r"prompt 1 has the metadata \{'n': 5\} in base and \{\} in tuned, so .* by told cannot"
    with pytest.raises(ValueError, match=words):
        run([base, tuned], tmp_path / "out", {**COUNTING, **TOLD})
    run([base, tuned], tmp_path / "out", COUNTING)
    run([base, with_metadata(tuned, {1: {"n": 5}})], tmp_path / "out", {**COUNTING, **TOLD})


@pytest.mark.parametrize("metadata", [[1], "n", None, 3])
def test_metadata_that_is_no_object(base, metadata):
    with pytest.raises(ValueError, match=r"`metadata` of images\[0\] must be an object, got "):
        read_manifests([str(with_metadata(base, {0: metadata}))])


# ---- scores


def test_scores_by_manifest_index_and_sample(base, tuned, tmp_path):
    found = run([base, f"mine={tuned}"], tmp_path / "out")
    assert found.scores["counting"] == {
        "base": {(i, s): 10 * i + s for i in range(3) for s in (0, 1)},
        "mine": {(i, s): 10 * i + 2 * s for i in range(3) for s in (0, 1)},
    }
    assert found.faults == {"base": {}, "mine": {}}
    rows = json.loads((tmp_path / "out" / "scores.json").read_text())["images"]
    assert len(rows) == 12
    assert rows[-1]["manifest"] == "mine"
    assert rows[-1]["scores"] == {"counting": 22}
    assert rows[-1]["file"] == str(tuned / "00002_01.png")


def test_every_picture_is_scored_once(base, tuned, tmp_path):
    first = run([base], tmp_path)
    assert len(CALLS) == 6
    assert run([base], tmp_path).scores == first.scores
    assert not CALLS
    run([base, tuned], tmp_path)
    assert len(CALLS) == 6
    shutil.copytree(base, tmp_path / "copy")  # other files of the same contents
    again = run([tmp_path / "copy", tuned], tmp_path)
    assert not CALLS
    assert again.scores["counting"]["copy"] == first.scores["counting"]["base"]


def test_two_pictures_of_one_content_are_one(tmp_path):
    run(
        [write(tmp_path / "a", {(0, 0): (1, 1, 1), (0, 1): (1, 1, 1), (1, 0): (1, 1, 1)})], tmp_path
    )
    assert [PROMPTS[0], PROMPTS[1]] == CALLS


def test_what_has_changed_is_scored_again(base, tmp_path):
    run([base], tmp_path)
    Image.new("RGB", (8, 8), (77, 0, 0)).save(base / "00001_00.png")
    found = run([base], tmp_path)
    assert [PROMPTS[1]] == CALLS
    assert found.scores["counting"]["base"][1, 0] == 77
    manifest = json.loads((base / "manifest.json").read_text())
    for entry in manifest["images"][:2]:
        entry["prompt"] = "another"
    edit(base, images=manifest["images"])
    run([base], tmp_path)
    assert CALLS == ["another", "another"]
    write(base, {(0, 0): (0, 0, 0)}, size=lambda _: 9)
    run([base], tmp_path)
    assert [PROMPTS[0]] == CALLS


def test_a_long_template_does_not_stop_an_evaluation(base, tmp_path):
    from mixgrpo.rewards.vlm_tasks import TEMPLATE

    options = {"template": TEMPLATE, "urls": "http://localhost:1", "retries": 0}
    rewards = {**COUNTING, "judge": RewardConfig("vlm", model="m", options=options)}
    found = run([base], tmp_path, rewards)
    assert found.silent == ["judge"]


def test_the_options_of_a_reward_decide_what_is_reused(base, tmp_path):
    def scored(factor: float) -> Mapping[tuple[int, int], float]:
        knobs = RewardConfig("test_evaluation:Colours", options={"factor": factor})
        return run([base], tmp_path, {"c": knobs}).scores["c"]["base"]

    first, second = scored(1.0), scored(2.0)
    assert {key: 2 * value for key, value in first.items()} == pytest.approx(second)
    with mock.patch.object(Colours, "__init__", side_effect=AssertionError):
        assert scored(1.0) == first  # the reward is not even made


def test_a_reward_that_fails_is_nan_where_it_fails_and_tried_again(base, tmp_path):
    rewards = {**COUNTING, "squares": RewardConfig("test_evaluation:only_squares")}
    found = run([base], tmp_path, rewards, micro_batch=6)
    assert len(CALLS) == 6
    squares = found.scores["squares"]["base"]
    assert {key for key, value in squares.items() if value == 1} == {(1, 0), (1, 1)}
    assert sum(math.isnan(value) for value in squares.values()) == 4
    (row,) = compare("squares", found.scores["squares"], "base", Bootstrap(10))
    assert (row.scored, row.pictures) == (2, 6)
    with mock.patch("test_evaluation.only_squares", counting):
        again = run([base], tmp_path, rewards)
    assert sorted(CALLS) == [PROMPTS[0]] * 2 + [PROMPTS[2]] * 2
    assert list(again.scores["squares"]["base"].values()) == [0, 1, 1, 1, 20, 21]


def test_no_reward_that_works_is_an_error(base, tmp_path):
    with pytest.raises(RewardError, match="no reward could score any image"):
        run([base], tmp_path, {"dead": RewardConfig("tiny_world:broken")})


def test_a_reward_of_the_wrong_shape_is_an_error(base, tmp_path):
    with pytest.raises(ValueError, match=r"'bad' must return a tensor of shape \[4\]"):
        run([base], tmp_path, {"bad": RewardConfig("test_evaluation:wrong_shape")})


def test_what_was_scored_before_a_stop_is_kept(tmp_path):
    folder = write(tmp_path / "a", {(i, s): (i, s, 0) for i in range(3) for s in range(4)})
    rewards = {"r": RewardConfig("test_evaluation:interrupted")}
    with pytest.raises(KeyboardInterrupt):
        run([folder], tmp_path, rewards, micro_batch=1)
    assert len(CALLS) == 10
    found = run([folder], tmp_path, rewards, micro_batch=1)
    assert len(CALLS) == 4  # the first round of eight is in the file
    assert set(found.scores["r"]["a"].values()) == {0, 1, 2}


def test_pictures_of_several_sizes(tmp_path):
    folder = write(
        tmp_path / "a", {(i, s): (9 * i + s, 0, 0) for i in range(3) for s in (0, 1)},
        size=lambda index: 8 + 8 * (index % 2),
    )  # fmt: skip
    found = run([folder], tmp_path, micro_batch=3)
    assert found.scores["counting"]["a"] == {(i, s): 9 * i + s for i in range(3) for s in (0, 1)}


def damage(folder: Path) -> None:
    """Three of six pictures, in three ways."""
    (folder / "00000_00.png").unlink()
    (folder / "00001_00.png").write_text("no picture")
    Image.effect_noise((64, 64), 90).save(folder / "00002_00.png")
    whole = (folder / "00002_00.png").read_bytes()
    (folder / "00002_00.png").write_bytes(whole[: len(whole) // 2])


def test_unreadable_pictures_are_named_counted_and_left_out(base, tuned, tmp_path):
    damage(tuned)
    found = run([base, tuned], tmp_path / "out")
    faults = {file.name: fault for file, fault in found.faults["tuned"].items()}
    assert faults.pop("00002_00.png").startswith("it cannot be read (")
    assert faults.pop("00001_00.png").startswith("it is not an image of the formats PNG")
    assert faults == {"00000_00.png": "there is no such file"}
    text = write_report(found, "base", tmp_path / "out", Bootstrap(10), Choice())
    assert "tuned: 3 images could not be read and left out" in text
    assert f"{tuned / '00001_00.png'}: it is not an image" in text
    assert re.search(r"counting +\| tuned .* 3/6 +\|", text)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["manifests"]["tuned"]["unreadable"]) == 3
    (row,) = [r for r in summary["rows"] if r["manifest"] == "tuned"]
    assert (row["scored"], row["pictures"], row["pairs"]) == (3, 6, 3)
    assert row["mean"]["value"] == pytest.approx((2 + 12 + 22) / 3)
    assert "it is not an image" in (tmp_path / "out" / "gallery.html").read_text()


def test_no_readable_picture_is_an_error(base, tmp_path):
    for file in base.glob("*.png"):
        file.unlink()
    with pytest.raises(
        ValueError, match=r"none of the 6 images in the manifests .*00000_00.png: there is no"
    ):
        run([base], tmp_path)


# ---- diversity


def test_diversity_is_the_distance_inside_a_prompt(tmp_path):
    pictures = {
        (0, 0): (100, 0, 0), (0, 1): (0, 200, 0),
        (1, 0): (9, 9, 9), (1, 1): (50, 50, 50), (1, 2): (60, 60, 60),
        (2, 0): (3, 0, 0),
    }  # fmt: skip
    folder = write(tmp_path / "a", pictures)
    rewards = {**COUNTING, "c": RewardConfig("test_evaluation:Colours")}
    found = run([folder], tmp_path, rewards)
    assert found.features == "c"
    assert found.diversity == {"a": {(0, 0): pytest.approx(1), (1, 0): pytest.approx(0, abs=1e-6)}}
    text = write_report(found, "a", tmp_path, Bootstrap(10), Choice())
    assert re.search(r"diversity \(c\) \| a +\| 0.5000 .* 2/2 ", text)
    with mock.patch.object(Colours, "image_features", side_effect=AssertionError):
        assert run([folder], tmp_path, rewards).diversity == found.diversity


def test_features_that_fail_are_nan(base, tmp_path):
    with mock.patch.object(Colours, "image_features", side_effect=RuntimeError("no memory")):
        found = run([base], tmp_path, {"c": RewardConfig("test_evaluation:Colours")})
    assert all(math.isnan(value) for value in found.diversity["base"].values())


def test_which_reward_tells_pictures_apart():
    hps, clip = RewardConfig("hpsv2"), RewardConfig("clip_score")
    jpeg, mine = RewardConfig("jpeg_size"), RewardConfig("test_evaluation:Colours")
    assert features_by(Config(rewards={"a": jpeg, "b": hps, "c": clip})) == "c"
    assert features_by(Config(rewards={"a": jpeg, "b": mine, "c": hps})) == "b"
    assert features_by(Config(rewards={"a": jpeg})) is None
    with pytest.raises(ValueError, match=r"rewards\.x: .*did you mean 'hpsv2'"):
        features_by(Config(rewards={"x": RewardConfig("hpsv3")}))


def test_image_features_of_the_clip_are_those_of_its_score():
    """Their cosine with the text's is the score; so rewards of one file agree."""
    from mixgrpo.rewards import build_reward

    reward: Any = build_reward("clip_score", {"model": str(ROOT / "data/shapes/clip")})
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    texts = ["a red circle on a gray background"] * 3
    text = reward.clip.model.encode_text(reward.clip.tokenize(texts)).detach()
    expected = torch.nn.functional.cosine_similarity(reward.image_features(images), text)
    torch.testing.assert_close(reward(images, texts), expected)


# ---- gallery


def test_what_is_best_worst_and_most_changed():
    places = {0: (5.0, 0.0), 1: (4.0, -9.0), 2: (3.0, 1.0), 3: (2.0, 2.0), 4: (1.0, math.nan)}
    standing = {index: Standing(*place) for index, place in places.items()}
    standing[5] = Standing(math.nan, math.nan)
    assert chosen(standing, 3) == {0: "best", 4: "worst", 1: "most changed"}
    everything = chosen(standing, 60)
    assert list(everything.items()) == [
        (0, "best"), (2, "best"), (4, "worst"), (3, "worst"), (1, "most changed"), (5, "not scored")
    ]  # fmt: skip
    assert len(chosen(standing, 4)) == 4
    assert chosen(standing, 0) == {}


def test_standings_by_hand():
    scores = {"r": {"base": {(0, 0): 1.0, (0, 1): 3.0, (1, 0): 0.0},
                    "x": {(0, 0): 4.0, (0, 1): math.nan, (1, 0): -3.0},
                    "y": {(0, 0): 0.0, (1, 0): 2.0}}}  # fmt: skip
    picture = mock.Mock(index=0), mock.Mock(index=1)
    found = standings(Evaluation([mock.Mock(pictures=picture)], {}, scores, None, {}), "base")
    assert found["r"] == {0: Standing(2.0, 2.0), 1: Standing(-0.5, -3.0)}


def test_mean_z_score_by_hand():
    scores = {"r": {"a": {(0, 0): 0.0}, "b": {(0, 0): 2.0}},
              "s": {"a": {(0, 0): 10.0}, "b": {(0, 0): -30.0}},
              "t": {"a": {(0, 0): 5.0}, "b": {(0, 0): math.nan}}}  # fmt: skip
    found = mean_z(scores)
    assert found["a"][0, 0] == pytest.approx((-1 + 1 + 0) / 3)
    assert found["b"][0, 0] == pytest.approx((1 - 1) / 2)


def page(folders: Sequence[Path], output: Path, **choice: Any) -> str:
    write_report(run(folders, output), "base", output, Bootstrap(10), Choice(**choice))
    return (output / "gallery.html").read_text()


def pictures_in(text: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_the_gallery_holds_every_picture_and_fetches_nothing(base, tuned, tmp_path):
    text = page([base, tuned], tmp_path)
    reds = sorted(picture.convert("RGB").getpixel((4, 4))[0] for picture in pictures_in(text))
    expected = [10 * i + k * s for i in range(3) for s in (0, 1) for k in (1, 2)]
    assert reds == pytest.approx(sorted(expected), abs=2)
    sources = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')>]*)", text)
    assert len(sources) == 12
    assert all(source.startswith("data:") for source in sources)
    # The one address is a part of a prompt's text.
    assert len(re.findall(r"https?://", text)) == 1
    assert "<b>square" not in text
    assert "a &lt;b&gt;square&lt;/b&gt; &amp; more" in text
    assert not re.search(r"<!--|import|fetch|@font-face", text.replace("<!doctype", ""))


def test_the_gallery_without_script_is_in_the_chosen_order(base, tuned, tmp_path):
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tuned / "00001_00.png")  # best and most changed
    text = page([base, tuned], tmp_path, prompts=2, by="counting")
    cards = re.findall(r"data-index=(\d).*?<p class=label>prompt \d &middot; ([a-z ]+)<", text)
    assert cards == [("1", "best"), ("0", "worst")]
    assert "2 of 3 prompts" in text
    assert '<option value="counting" selected>' in text
    assert len(pictures_in(page([base, tuned], tmp_path, samples=1))) == 6
    placed = re.search(r'data-index=1 data-places="([^"]+)"', text)[1].replace("&quot;", '"')
    assert json.loads(placed)["counting"] == [pytest.approx(106), pytest.approx(95.5)]
    assert set(json.loads(placed)) == {ALL, "counting"}


def test_pictures_of_the_gallery_are_small(tmp_path):
    Image.effect_noise((1024, 512), 90).convert("RGB").save(tmp_path / "large.png")
    assert thumbnail(tmp_path / "large.png")[1:] == (EDGE, EDGE // 2)
    Image.new("RGBA", (20, 30)).save(tmp_path / "small.png")
    assert thumbnail(tmp_path / "small.png")[1:] == (20, 30)


def test_names_do_not_end_the_cells_of_the_table(base, tuned, tmp_path):
    found = run([f"a|b\nc={base}", tuned], tmp_path)
    text = write_report(found, "a|b\nc", tmp_path, Bootstrap(10), Choice())
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert re.search(r"\| counting \| a\\\|b c +\|", text)


def test_no_gallery_if_none_is_wanted(base, tmp_path):
    found = run([base], tmp_path)
    text = write_report(found, "base", tmp_path, Bootstrap(10), Choice(prompts=0))
    assert not (tmp_path / "gallery.html").exists()
    assert "gallery.html" not in text


def test_manifests_with_nothing_in_common(base, tmp_path):
    other = write(tmp_path / "other", {(0, 7): (1, 1, 1)})
    found = run([base, other], tmp_path)
    text = write_report(found, "base", tmp_path, Bootstrap(10), Choice())
    assert "other has no prompt and sample in common with base." in text
    assert re.search(r"counting \| other +\| 1.0000 +\| - +\| - +\| - +\| - +\| 1/1 ", text)


# ---- the command line


@pytest.fixture
def complain(capfd, monkeypatch, tmp_path) -> Callable[..., str]:
    """Runs a command line that must fail; returns its one line of error."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run_it(*arguments: Any, output: bool = True) -> str:
        out = ["--output", str(tmp_path / "out")] if output else []
        rewards = ["--rewards.r.kind", "jpeg_size", "--log.progress", "false"]
        assert main(["evaluate", *map(str, arguments), *rewards, *out]) == 1
        said = capfd.readouterr().err
        assert said.startswith("error: ")
        assert len(said.splitlines()) == 1, said
        return said

    return run_it


def test_a_reward_that_scores_nothing_is_told_after_the_others_report(base, tmp_path, complain):
    said = complain(base, "--rewards.dead.kind", "tiny_world:broken")
    assert said == (
        "error: dead could not score any image (see the warnings above); fix the cause and run the "
        "same command again to compute the missing scores\n"
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {row["reward"] for row in summary["rows"]} >= {"r", "dead"}


def picture(**changes: Any) -> dict[str, Any]:
    return {"index": 0, "sample": 0, "prompt": "a circle", "file": "00000_00.png", **changes}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["is not valid JSON", "sample the images again"]),
        (b"\xff\xfe\x00", ["is not valid JSON"]),
        ("[]", ["is not a manifest"]),
        ({}, ["is not a manifest"]),
        ({"version": 2, "images": [picture()]}, ["version 2", "only version 1 is supported"]),
        ({"images": [picture()]}, ["version None"]),
        ({"version": 1, "images": []}, ["lists no images"]),
        ({"version": 1, "images": ["a.png"]}, ["`index` of images[0]", "got None"]),
        (
            {"version": 1, "images": [picture(), picture(index="1")]},
            ["`index` of images[1]", "'1'"],
        ),
        ({"version": 1, "images": [picture(sample=-1)]}, ["`sample`", "-1"]),
        ({"version": 1, "images": [picture(sample=True)]}, ["`sample`", "True"]),
        ({"version": 1, "images": [picture(prompt=3)]}, ["`prompt`", "a string", "3"]),
        ({"version": 1, "images": [picture(index=2**31)]}, ["from 0 to 2147483647", "2147483648"]),
        ({"version": 1, "images": [picture(sample=1.0)]}, ["`sample`", "got 1.0"]),
        ({"version": 1, "images": [picture(index=[0] * 9999)]}, ["`index`", "[0, 0, 0,", "...]"]),
        (
            {"version": 1, "images": [picture(prompt="a \ud800")]},
            ["half of a surrogate pair, '\\ud800'"],
        ),
        (
            {"version": 1, "images": [picture(prompt="\udcff")]},
            ["half of a surrogate", "position 0"],
        ),
        ({"version": 1, "images": {"a": 1}}, ["lists no images"]),
        ({"version": 1, "images": [[picture()]]}, ["`index` of images[0]", "got None"]),
        ({"version": "1" * 9999, "images": [picture()]}, ["version '1111", "only version 1"]),
        ({"version": 1, "settings": [], "images": [picture()]}, ["`settings` must be an object"]),
        *(
            ({"version": 1, "images": [picture(file=file)]}, ["file inside the manifest's folder"])
            for file in (
                "/etc/passwd",
                "../x.png",
                "a/../../x.png",
                "",
                ".",
                "./",
                "/dev/zero",
                "..",
            )
        ),
        ('{"version": 1, "images": ' + "[" * 99999, ["nests more than 100 levels", "again"]),
        (
            '{"version": 1, "images": [' + '{"a":' * 200 + "1" + "}" * 200 + "]}",
            ["nests more than"],
        ),
        ('{"version": 1, "images": [{"index": 1' + "0" * 5000 + "}]}", ["is too large", "again"]),
        ('{"version": 1, "settings": {"a": NaN}, "images": []}', ["NaN is not a number in JSON"]),
        ('{"version": 1, "version": 1, "images": []}', ["the name 'version' occurs twice"]),
        ('{"version": 1, "images": [{"index": 0, "index": 0}]}', ["the name 'index' occurs twice"]),
        ({"version": 1, "images": [picture(), picture(file="b.png")]}, ["index 0, sample 0 twice"]),
        ({"version": 1, "images": [picture(), picture(sample=1)]}, ["'00000_00.png' twice"]),
        (
            {"version": 1, "images": [picture(), picture(sample=1, prompt="x", file="b.png")]},
            ["index 0 two prompts", "'a circle'", "'x'"],
        ),
    ],
)
def test_what_is_no_manifest(content, words, base, complain):
    path = base / "manifest.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    line = complain(base)
    for word in [str(path), *words]:
        assert word in line


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "is a FIFO, not a regular file; sample the images again"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, not a regular file"),
        (lambda path: path.mkdir(), "is a folder, not a regular file"),
        (lambda path: path.symlink_to(path.name), "there is no manifest"),
        (lambda path: path.symlink_to("nowhere"), "there is no manifest"),
        (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 2**40), "256 MiB"),
    ],
)
def test_a_manifest_that_is_no_file(base, complain, make, words):
    path = base / "manifest.json"
    path.unlink()
    make(path)
    assert words in complain(base)


@pytest.mark.parametrize("name", ["x" * 300, "a=" + "x" * 5000, "x=y=z", "\udcff"])
def test_a_name_of_a_manifest_that_cannot_be(complain, name):
    assert "there is no manifest" in complain(name)


def test_unknown_fields_of_a_manifest_do_not_matter(base, tmp_path):
    entries = json.loads((base / "manifest.json").read_text())["images"]
    entries = [{**entry, "metadata": {"tag": [1, {"a": None}]}, "new": 1} for entry in entries]
    edit(base, images=entries, made_by="another program")
    assert len(run([base], tmp_path).scores["counting"]["base"]) == 6


@pytest.mark.parametrize("name", ["table.md", "summary.json", "scores.json", "gallery.html"])
def test_outputs_are_checked_before_anything_is_scored(base, tmp_path, complain, name):
    output = tmp_path / "out"
    output.mkdir()
    for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/null")):
        make(output / name)
        said = complain(base)
        assert f"{output / name} is a " in said
        assert "name another path" in said
        assert [file.name for file in output.iterdir()] == [name]
        (output / name).rmdir() if (output / name).is_dir() else (output / name).unlink()


@pytest.mark.parametrize(
    "scores", ["NaN", '"1"', "true", "null", "[]", "1e999", "1" * 5000, "[" * 9999]
)
def test_stored_scores_that_are_none(base, tmp_path, complain, scores):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scores.json").write_text(
        f'{{"version": 1, "columns": {{"a": {{"b": {scores}}}}}}}'
    )
    assert "move it away, or choose another --output" in complain(base)


def test_pictures_that_are_no_files_are_left_out(base, tuned, tmp_path):
    """None of them is waited for, read without end, or decoded in all of the memory."""
    for sample, make in enumerate((os.mkfifo, lambda path: path.symlink_to("/dev/zero"))):
        (tuned / f"00000_{sample:02d}.png").unlink()
        make(tuned / f"00000_{sample:02d}.png")
    (tuned / "00001_00.png").unlink()
    (tuned / "00001_00.png").symlink_to(base / "00001_00.png")
    found = run([base, tuned], tmp_path)
    faults = list(found.faults["tuned"].values())
    assert faults == [f"it is a {kind}, not a regular file" for kind in ("FIFO", "device")]
    assert found.scores["counting"]["tuned"][1, 0] == found.scores["counting"]["base"][1, 0]


def test_large_pictures_are_scored_in_small_batches():
    jobs = [Job("", Path(), "", "", (4096, 4096))] * 7 + [Job("", Path(), "", "", (8, 8))] * 100
    assert [len(part) for part in batches(jobs, 48)] == [3, 3, 1, 48, 48, 4]
    assert [len(part) for part in batches(jobs, 2)] == [2, 2, 2, 1, *[2] * 50]
    assert len(batches([Job("", Path(), "", "", (8192, 8192))], 48)) == 1


def test_the_gallery_shows_what_was_scored(tmp_path):
    """A transparent picture whose hidden colour is another."""
    folder = write(tmp_path / "base", {(0, 0): (0, 0, 0)})
    Image.new("RGBA", (8, 8), (7, 0, 0, 0)).save(folder / "00000_00.png")
    text = page([folder], tmp_path)
    (shown,) = pictures_in(text)
    assert shown.convert("RGB").getpixel((4, 4)) == (255, 255, 255)
    scores = json.loads((tmp_path / "scores.json").read_text())["images"][0]["scores"]
    assert scores == {"counting": 255}


def test_a_picture_that_is_gone_when_the_gallery_is_made(base, tmp_path):
    found = run([base], tmp_path)
    (base / "00000_00.png").unlink()
    write_report(found, "base", tmp_path, Bootstrap(10), Choice())
    assert "there is no such file" in (tmp_path / "gallery.html").read_text()


def test_a_terminal_without_utf_8_and_pictures_that_warn(base, tuned, tmp_path):
    """Nothing is said on stderr but the table's own; the files are UTF-8."""
    prompts = ["\u6f22\u5b57 \U0001f984", "b", "c"]
    for folder in (base, tuned):
        entries = json.loads((folder / "manifest.json").read_text())["images"]
        edit(folder, images=[{**entry, "prompt": prompts[entry["index"]]} for entry in entries])
    noise, exif = Image.effect_noise((32, 32), 90), b"Exif\0\0II*\0\xff\xff\xff\xff"
    noise.save(base / "00001_00.png", "JPEG", exif=exif)
    Image.new("1", (13000, 13000)).save(base / "00001_01.png")
    names = [f"\u4e00={base}", f"\udcff={tuned}"]
    words = [*names, "--rewards.j.kind", "jpeg_size", "--output", str(tmp_path / "\u4e8c")]
    done = subprocess.run(
        [sys.executable, "-m", "mixgrpo", "evaluate", *map(os.fsencode, words),
         "--log.progress", "false", "--resamples", "10"],
        cwd=ROOT, capture_output=True, timeout=600, check=False,
        env={**environment(), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C",
             "PYTHONCOERCECLOCALE": "0"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"13000" not in done.stdout
    assert b"it has more than 33.6 million pixels" in done.stdout
    page = (tmp_path / "\u4e8c" / "gallery.html").read_text(encoding="utf-8")
    assert prompts[0] in page


def test_manifests_that_cannot_be_compared(base, tuned, tmp_path, complain):
    line = complain(base, tmp_path / "nowhere")
    assert f"there is no manifest '{tmp_path / 'nowhere'}'" in line
    assert "give the folder" in line
    entries = json.loads((tuned / "manifest.json").read_text())["images"]
    entries = [{**e, "prompt": "another"} if e["index"] == 1 else e for e in entries]
    edit(tuned, images=entries)
    line = complain(base, tuned)
    assert f"prompt 1 is {PROMPTS[1]!r} in base and 'another' in tuned" in line
    assert "same prompts file" in line
    assert "both named 'base'" in complain(base, base / "manifest.json")
    assert "both named 'a'" in complain(f"a={base}", f"a={base}")
    assert "has no name before '='; write NAME=PATH" in complain(f"={base}")


def test_names(base, tuned, monkeypatch):
    names = [m.name for m in read_manifests([str(base), f"b={tuned}", f"c={base}/manifest.json"])]
    assert names == ["base", "b", "c"]
    monkeypatch.chdir(base)
    assert read_manifests(["."])[0].name == "base"
    odd = base.rename(base.parent / "x=y")
    assert read_manifests([str(odd)])[0].name == "x=y"


def test_options_that_cannot_be(base, tuned, tmp_path, complain):
    line = complain(base, tuned, "--baseline", "tune")
    assert "--baseline is 'tune'; it must be one of base, tuned; did you mean tuned?" in line
    assert "one of all, r" in complain(base, "--gallery_by", "q")
    assert "--basline; did you mean --baseline?" in complain(base, "--basline", "base")
    assert "there is no option --update.kl" in complain(base, "--update.kl", "1")
    assert "no knob rewards.r.knd; did you mean rewards.r.kind?" in complain(
        base, "--rewards.r.knd", "x"
    )
    assert "the following arguments are required: --output" in complain(base, output=False)
    assert "required: MANIFEST" in complain()
    assert "--resamples is 0; it must be at least 1" in complain(base, "--resamples", "0")
    empty = complain(base, "--output=", output=False)
    assert "--output is empty; name a file or folder" in empty
    assert "--seed is 'x'; it must be a whole number" in complain(base, "--seed", "x")
    assert "micro_batch is 0" in complain(base, "--scoring.micro_batch", "0")
    assert "no recipe 'shapes'" in complain(base, "--recipe", "shapes")
    assert "rewards.m: unknown reward 'jpg'" in complain(base, "--rewards.m.kind", "jpg")
    (tmp_path / "out").mkdir()
    for content in ("{", "[]", '{"version": 7}', '{"version": 1}', '{"version": 1, "columns": []}'):
        (tmp_path / "out" / "scores.json").write_text(content)
        line = complain(base)
        assert str(tmp_path / "out" / "scores.json") in line
        assert "choose another --output" in line


def test_without_a_reward(base, tmp_path):
    with pytest.raises(
        ValueError, match="no reward is configured; use those of a recipe with --recipe NAME"
    ):
        parse([str(base), "--output", str(tmp_path)])


def test_what_a_command_line_means(base, tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    request = parse(
        [str(base), "--recipe=flux_mixgrpo", "--rewards.mine.kind", "jpeg_size", str(tuned),
         "--output", str(tmp_path), "--seed", "4", "--scoring.micro_batch=3"]
    )  # fmt: skip
    assert [manifest.name for manifest in request.manifests] == ["base", "tuned"]
    assert request.baseline == "base"
    assert list(request.config.rewards) == [
        "hpsv2",
        "pickscore",
        "imagereward",
        "clip_score",
        "mine",
    ]
    assert request.config.scoring.micro_batch == 3
    assert request.bootstrap == Bootstrap(2000, 4)
    assert request.gallery == Choice()
    # In its own scale, and not as recipes mix it.
    options = request.config.rewards["pickscore"].options
    assert options == {"processor": "data/models/pickscore_processor"}


def shown_command(script: str) -> list[str]:
    """The command of scripts/README.md that holds these words."""
    text = (ROOT / "scripts" / "README.md").read_text()
    (line,) = re.findall(rf"^(?:python|bash) .*{re.escape(script)}.*$", text, re.MULTILINE)
    return line.split(" #")[0].split()


def test_the_readmes_command_on_the_shapes_world(tmp_path, monkeypatch, capfd):
    """Pictures of captions with one fact altered, against right ones: the judge is exact."""
    rng = random.Random(3)
    (tmp_path / "data").symlink_to(ROOT / "data")
    captions = [scene.caption for scene in rng.sample(split(test=True), 4)]
    for name in ("base_pictures", "tuned_pictures"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        entries = []
        for index, caption in enumerate(captions):
            for sample in range(2):
                scene = scene_of(caption)
                drawn = scene if name == "tuned_pictures" else alter(scene, rng)
                entries.append(picture(index=index, sample=sample, prompt=caption,
                                       file=f"{index:05d}_{sample:02d}.png"))  # fmt: skip
                to_pil(to_bytes(render(drawn, rng))).save(folder / entries[-1]["file"])
        (folder / "manifest.json").write_text(json.dumps({"version": 1, "images": entries}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = shown_command("mixgrpo evaluate")
    assert command[:3] == ["python", "-m", "mixgrpo"]
    assert main(command[3:]) == 0
    said = capfd.readouterr().out
    output = tmp_path / command[command.index("--output") + 1]
    rows = {(row["reward"], row["manifest"]): row
            for row in json.loads((output / "summary.json").read_text())["rows"]}  # fmt: skip
    judge = rows["all_right", "tuned_pictures"]
    assert (judge["mean"]["value"], judge["wins"], judge["pairs"]) == (1, 1, 8)
    assert judge["difference"] == {"value": 1, "low": 1, "high": 1}
    assert rows["hpsv2", "tuned_pictures"]["difference"]["value"] > 0
    assert rows["diversity (clip_score)", "base_pictures"]["scored"] == 4
    assert (output / "table.md").read_text() in said
    assert len(pictures_in((output / "gallery.html").read_text())) == 16


def test_two_processes_find_what_one_does(base, tuned, tmp_path):
    damage(tuned)
    extra = write(tmp_path / "extra", {(0, s): (s, 9, 0) for s in range(11)}, size=lambda _: 16)
    words = [
        *(str(base), str(tuned), str(extra), "--resamples", "50", "--scoring.micro_batch", "2"),
        *("--rewards.c.kind", "test_evaluation:Colours", "--rewards.j.kind", "jpeg_size"),
        *("--rewards.s.kind", "test_evaluation:only_squares", "--log.progress", "false"),
    ]
    words_of_two = ["evaluate", *words, "--output", str(tmp_path / "two")]
    done = Command(words_of_two, tmp_path / "said", count=2)
    assert done.wait() == [0, 0], done.stderr
    with mock.patch("torch.cuda.is_available", return_value=False):
        assert main(["evaluate", *words, "--output", str(tmp_path / "one")]) == 0
    for name in ("table.md", "summary.json", "gallery.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    one, two = (json.loads((tmp_path / n / "scores.json").read_text()) for n in ("one", "two"))
    assert one == two
    assert len(one["images"]) == 23
    assert done.stdout.count("| reward") == 1


def test_the_launcher_tells_of_a_bad_manifest_once(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mixgrpo", "launch", "--nproc_per_node", "2", "evaluate", "nowhere",
         "--rewards.r.kind", "jpeg_size", "--output", str(tmp_path)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "there is no manifest 'nowhere'" in line
