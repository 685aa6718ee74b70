"""The Shapes world: captions, pictures, the exact judge, tokenizers, and the shipped files."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch
from tiny_world import CPU, ROOT

from mixgrpo.shapes.architecture import TEXT_LENGTH, clip_words, t5_words
from mixgrpo.shapes.build import write_prompts
from mixgrpo.shapes.judge import all_right, facts_right, read
from mixgrpo.shapes.renderer import PALETTE, SIZE, render
from mixgrpo.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    VOCABULARY,
    Scene,
    Thing,
    all_scenes,
    alter,
    draw,
    parse,
    split,
)

DATA = ROOT / "data" / "shapes"


def drawn(count: int, seed: int) -> tuple[list[Scene], torch.Tensor, random.Random]:
    """Scenes, half of them of two things, with their pictures [N, 3, 64, 64]."""
    rng = random.Random(seed)
    scenes = draw(all_scenes(), count, rng)
    return scenes, torch.stack([render(scene, rng) for scene in scenes]), rng


# ---- captions


def test_every_caption_parses_back():
    scenes = all_scenes()
    assert len(scenes) == 72 + 6624
    assert len({scene.caption for scene in scenes}) == len(scenes)
    assert all(parse(scene.caption) == scene for scene in scenes)


def test_captions_read_as_documented():
    scene = parse("  A red circle LEFT of a blue square on a gray background ")
    assert scene.things == (Thing("red", "circle"), Thing("blue", "square"))
    assert (scene.relation, scene.background) == ("left of", "gray")
    with pytest.raises(ValueError, match=r"'a red dog'.*captions read like"):
        parse("a red dog")


def test_training_and_test_captions_are_disjoint_and_complete():
    training = {scene.caption for scene in split(test=False)}
    test = {scene.caption for scene in split(test=True)}
    assert not training & test
    assert training | test == {scene.caption for scene in all_scenes()}
    assert 0.10 < len(test) / len(training | test) < 0.15
    for scenes in (split(test=False), split(test=True)):
        assert {len(scene.things) for scene in scenes} == {1, 2}


def test_half_of_what_is_drawn_has_one_thing():
    scenes = draw(split(test=False), 1000, random.Random(0))
    assert 430 < sum(len(scene.things) == 1 for scene in scenes) < 570
    assert draw(split(test=False), 1000, random.Random(0)) == scenes


def facts(scene: Scene) -> list[str | None]:
    return [
        *itertools.chain(*((thing.colour, thing.shape) for thing in scene.things)),
        scene.relation,
        scene.background,
    ]


def test_alter_changes_exactly_one_fact():
    rng = random.Random(1)
    kinds: Counter[str] = Counter()
    known = set(all_scenes())
    for scene in draw(all_scenes(), 400, rng):
        other = alter(scene, rng)
        assert other in known
        changed = [(a, b) for a, b in zip(facts(scene), facts(other), strict=True) if a != b]
        if len(changed) == 2:  # the two things' colours, exchanged
            assert changed[0] == changed[1][::-1]
            assert {changed[0][0], changed[0][1]} <= set(COLOURS)
            kinds["exchange"] += 1
            continue
        ((before, _),) = changed
        names = (("colour", COLOURS), ("shape", SHAPES), ("background", BACKGROUNDS))
        kinds[next((kind for kind, among in names if before in among), "relation")] += 1
    assert set(kinds) == {"colour", "shape", "background", "relation", "exchange"}
    assert min(kinds.values()) >= 10


# ---- pictures and the judge


def test_pictures_are_in_range_and_follow_the_seed():
    _, images, _ = drawn(20, seed=5)
    assert images.shape == (20, 3, SIZE, SIZE)
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images, drawn(20, seed=5)[1])
    assert not torch.equal(images, drawn(20, seed=6)[1])


def test_the_judge_agrees_with_the_renderer():
    scenes, images, _ = drawn(200, seed=2)
    captions = [scene.caption for scene in scenes]
    wrong = [c for c, right in zip(captions, all_right(images, captions), strict=True) if not right]
    assert wrong == []
    assert facts_right(images, captions).tolist() == [1.0] * 200


def test_the_judge_reads_what_is_there():
    rng = random.Random(0)
    reading = read(render(parse("a red circle above a cyan cross on a black background"), rng))
    assert reading.background == "black"
    by_height = sorted(reading.found, key=lambda found: found.y)
    assert [(f.colour, f.shape) for f in by_height] == [("red", "circle"), ("cyan", "cross")]


def test_an_altered_caption_is_never_all_right():
    scenes, images, rng = drawn(100, seed=3)
    captions = [alter(scene, rng).caption for scene in scenes]
    assert all_right(images, captions).sum() == 0
    shares = facts_right(images, captions)
    assert shares.max() < 1
    assert shares.min() >= 0.5, "one changed fact leaves the others right"


def test_facts_are_counted():
    picture = render(parse("a red circle on a gray background"), random.Random(0))[None]
    for caption, share in (
        ("a red circle on a gray background", 4 / 4),
        ("a red circle on a white background", 3 / 4),
        ("a red square on a gray background", 3 / 4),
        ("a blue square on a gray background", 2 / 4),
        ("a blue square on a white background", 1 / 4),
        # Two things, two colours, two shapes, relation, background: one thing of them is there.
        ("a red circle above a blue square on a gray background", 3 / 7),
    ):
        assert facts_right(picture, [caption]).item() == pytest.approx(share)


def test_the_judge_stands_small_noise():
    scenes, images, _ = drawn(60, seed=4)
    noise = 0.03 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    captions = [scene.caption for scene in scenes]
    assert all_right((images + noise).clamp(0, 1), captions).mean() >= 0.98


def test_the_judge_is_not_fooled_by_a_blank_or_noisy_picture():
    caption = "a red circle on a gray background"
    gray = torch.tensor(PALETTE["gray"])[:, None, None].expand(3, SIZE, SIZE)
    assert facts_right(gray[None], [caption]).item() == pytest.approx(1 / 4)
    noise = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    assert all_right(noise, [caption]).item() == 0


# ---- tokenizers


@pytest.mark.parametrize("make", [t5_words, clip_words])
def test_tokenizers_know_each_word_and_are_deterministic(make):
    tokenizer = make()
    unknown = tokenizer("elephant").input_ids
    for word in VOCABULARY:
        ids = tokenizer(word, add_special_tokens=False).input_ids
        assert len(ids) == 1, word
        assert tokenizer.unk_token_id not in ids or make is clip_words
    singles = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in VOCABULARY]
    assert len(set(singles)) == len(VOCABULARY)
    captions = [scene.caption for scene in draw(all_scenes(), 50, random.Random(0))]
    assert make()(captions).input_ids == tokenizer(captions).input_ids
    assert unknown != tokenizer("circle").input_ids


@pytest.mark.parametrize("make", [t5_words, clip_words])
def test_no_caption_is_truncated(make):
    lengths = [len(ids) for ids in make()([scene.caption for scene in all_scenes()]).input_ids]
    assert max(lengths) <= TEXT_LENGTH


# ---- what is shipped


def test_the_prompt_files_are_the_rebuild_commands(tmp_path):
    write_prompts(tmp_path)
    for name in ("prompts.txt", "prompts_test.txt"):
        assert (DATA / name).read_text() == (tmp_path / name).read_text()


def test_the_shipped_prompts_keep_to_their_side():
    test = {scene.caption for scene in split(test=True)}
    shipped_test = (DATA / "prompts_test.txt").read_text().splitlines()
    shipped_training = (DATA / "prompts.txt").read_text().splitlines()
    assert shipped_test
    assert set(shipped_test) <= test
    assert shipped_training
    assert not set(shipped_training) & test
    assert {scene.caption for scene in map(parse, shipped_training)} == set(shipped_training)


def test_the_shipped_files_are_small():
    sizes = {path: path.stat().st_size for path in DATA.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 25 * 2**20
    weights = [path for path in sizes if sizes[path] > 2**20]
    assert {path.suffix for path in weights} <= {".safetensors"}


@pytest.fixture(scope="module")
def shipped_rewards():
    from mixgrpo.assembly import make_rewards
    from mixgrpo.commands.train import parse as parse_arguments

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the recipe's paths start there
        return make_rewards(parse_arguments(["--recipe", "shapes_mixgrpo"]), CPU)


@pytest.mark.parametrize(
    "name", ["hpsv2", "pickscore", "imagereward", "clip_score", "facts_right", "all_right"]
)
def test_every_shipped_reward_prefers_the_true_caption(shipped_rewards, name):
    rng = random.Random(9)
    scenes = draw(split(test=True), 64, rng)
    images = torch.stack([render(scene, rng) for scene in scenes])
    true = shipped_rewards[name](images, [scene.caption for scene in scenes])
    other = shipped_rewards[name](images, [alter(scene, rng).caption for scene in scenes])
    # The small ImageReward is the weakest reader of the four.
    assert (true > other).float().mean() >= (0.6 if name == "imagereward" else 0.85)


def test_no_reward_of_the_recipe_goes_untested(shipped_rewards):
    assert set(shipped_rewards) == {
        "hpsv2", "pickscore", "imagereward", "clip_score", "facts_right", "all_right"
    }  # fmt: skip
