"""Every knob: documented, typed, checked, read, saved; the recipes and their published values."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from conftest import SECRET

import mixgrpo.config
from mixgrpo.assembly import make_windows
from mixgrpo.checks import check, check_resumable
from mixgrpo.commands import main
from mixgrpo.commands.train import parse
from mixgrpo.config import RECIPES, Config, RewardConfig, flatten
from mixgrpo.types import Window

RECIPE_NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def knobs() -> Iterator[tuple[str, str, str]]:
    """Section, name and documentation of every knob, read off the source."""
    classes = {
        node.name: node
        for node in ast.parse(inspect.getsource(mixgrpo.config)).body
        if isinstance(node, ast.ClassDef)
    }
    for section, kind in get_type_hints(Config).items():
        if not is_dataclass(kind):
            continue
        body = classes[kind.__name__].body
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(text, ast.Expr), f"{section}.{field.target.id} has no text"
                yield section, field.target.id, ast.literal_eval(text.value)


KNOBS = list(knobs())


def recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    """A mistake that goes unnoticed must not become a whole training."""

    def refuse(config: Config) -> None:
        raise AssertionError(f"training began with {config}")

    monkeypatch.setattr("mixgrpo.trainer.train", refuse)


# ---- where values come from


def test_every_knob_is_documented():
    assert {f"{section}.{name}" for section, name, _ in KNOBS} == {
        key for key in flatten(Config()) if key != "rewards"
    }


def test_the_command_line_beats_the_recipe_which_beats_the_defaults(tmp_path):
    mine = recipe(tmp_path, "window: {size: 3, stride: 2}\n")
    config = parse(["--recipe", mine, "--window.size", "1"])
    assert config.window.size == 1
    assert config.window.stride == 2
    assert config.window.iters_per_window == Config().window.iters_per_window


@pytest.mark.parametrize("form", ["{0} {1}", "{1} {0}"])
@pytest.mark.parametrize("equals", [False, True])
def test_the_order_on_the_command_line_does_not_matter(tmp_path, form, equals):
    mine = recipe(tmp_path, "window: {size: 3}\n")
    words = [f"--recipe={mine}" if equals else f"--recipe {mine}", "--window.size 1"]
    assert parse(form.format(*words).split()).window.size == 1


def test_later_recipes_beat_earlier_ones(tmp_path):
    mine = recipe(tmp_path, "sampling: {steps: 9}\n")
    config = parse(["--recipe", "shapes_mixgrpo", "--recipe", mine])
    assert config.sampling.steps == 9
    assert config.model.path == "data/shapes/flux"


def test_without_arguments_the_defaults_hold():
    assert flatten(parse([])) == flatten(Config())


def test_1e_5_is_a_number(tmp_path):
    mine = recipe(tmp_path, "update: {learning_rate: 1e-5, clip: 1e-4}\n")
    config = parse(["--recipe", mine, "--update.weight_decay", "1e-3"])
    assert (config.update.learning_rate, config.update.clip) == (1e-5, 1e-4)
    assert config.update.weight_decay == 1e-3
    assert all(isinstance(v, float) for v in (config.update.learning_rate, config.update.clip))


def test_lists_null_and_rewards_on_the_command_line():
    mine = '{"mine": {"kind": "jpeg_size", "options": {"quality": 50}}}'
    others = ["--window.envelope", "null", "--update.betas", "[0.8, 0.9]"]
    config = parse(["--recipe", "shapes_mixgrpo", "--rewards", mine, *others])
    assert config.window.envelope is None
    assert config.update.betas == (0.8, 0.9)
    assert config.rewards == {"mine": RewardConfig("jpeg_size", options={"quality": 50})}
    assert parse(["--window.envelope", "[1, 7]"]).window.envelope == (1, 7)


def test_one_reward_of_a_recipe_is_changed_alone():
    config = parse(["--recipe", "shapes_mixgrpo", "--rewards.hpsv2.weight", "3"])
    before = parse(["--recipe", "shapes_mixgrpo"])
    assert config.rewards["hpsv2"].weight == 3
    assert config.rewards["hpsv2"].model == before.rewards["hpsv2"].model
    assert config.rewards["pickscore"] == before.rewards["pickscore"]


# ---- help


def squeezed(text: str) -> str:
    """Without white space: help is wrapped, also inside hyphenated words."""
    return "".join(text.split())


def test_help_lists_every_knob_with_its_text(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code in (0, None)
    shown = squeezed(capsys.readouterr().out)
    missing = [
        f"{section}.{name}"
        for section, name, text in KNOBS
        if f"--{section}.{name}" not in shown or squeezed(text) not in shown
    ]
    assert missing == []
    assert "--rewards" in shown


def test_help_explains_the_knobs_of_a_reward(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--rewards.help"])
    shown = squeezed(capsys.readouterr().out)
    for name in (field.name for field in fields(RewardConfig)):
        assert name in shown
    assert squeezed("the weights are normalised to sum to 1") in shown


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help_lists_the_commands(capsys, arguments):
    assert main(arguments) == 0
    assert "train" in capsys.readouterr().out


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (["--window.siz", "2"], "window.siz"),
        (["--windo.size", "2"], "windo.size"),
        (["--update.learningrate", "1"], "update.learningrate"),
    ],
)
def test_an_unknown_knob_on_the_command_line_is_named(capsys, arguments, path):
    assert main(["train", "--recipe", "shapes_mixgrpo", *arguments]) != 0
    assert path in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("window: {siz: 2}", "window.siz"),
        ("windo: {size: 2}", "windo"),
        ("rewards: {mine: {kind: jpeg_size, wieght: 2}}", "wieght"),
    ],
)
def test_an_unknown_knob_in_a_recipe_is_named(capsys, tmp_path, text, path):
    assert main(["train", "--recipe", recipe(tmp_path, text)]) != 0
    assert path in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "path", "value"),
    [
        (["--window.size", "two"], "window.size", "two"),
        (["--window.size", "2.5"], "window.size", "2.5"),
        (["--window.strategy", "sideways"], "window.strategy", "sideways"),
        (["--update.learning_rate", "fast"], "update.learning_rate", "fast"),
        (["--window.envelope", "[1]"], "window.envelope", "1"),
        (["--run.resume", "perhaps"], "run.resume", "perhaps"),
    ],
)
def test_a_mistyped_value_is_named(capsys, arguments, path, value):
    assert main(["train", *arguments]) != 0
    said = capsys.readouterr().err
    assert path in said
    assert value in said


COMPLAINTS = {
    "batch.samples": ({"batch.samples": 1}, 1, "batch.samples is 1.*at least 2"),
    "prompts": ({"batch.prompts": 30}, 4, r"batch.prompts \(30\).*\(4\).*--batch.prompts to 32"),
    "samples": (
        {"batch.samples": 10, "update.optimizer_steps": 4},
        1,
        r"batch.samples \(10\).*update.optimizer_steps \(4\).*--batch.samples to 12",
    ),
    "height": ({"model.height": 72}, 1, "model.height is 72.*multiple of 16"),
    "width": ({"model.width": 100}, 1, "model.width is 100.*multiple of 16"),
    "no height": ({"model.height": 0}, 1, "model.height is 0"),
    "ratio": ({"tail.ratio": 0.0}, 1, "tail.ratio is 0.0; it must be greater than 0"),
    "ratio above": ({"tail.ratio": 1.5}, 1, "tail.ratio is 1.5"),
    "order": ({"tail.order": 4}, 1, "tail.order is 4"),
    "prefix ratio": ({"prefix.ratio": 0.0}, 1, "prefix.ratio is 0.0; it must be greater than 0"),
    "prefix order": ({"prefix.order": 0}, 1, "prefix.order is 0"),
    "trim": ({"advantage.trim": 0.5}, 1, "advantage.trim is 0.5; it must be less than 0.5"),
    "best_of above": ({"advantage.best_of": 16}, 1, r"best_of is 16.*at most batch.samples \(12\)"),
    "best_of odd": (
        {"advantage.best_of": 3, "update.optimizer_steps": 3},
        1,
        "best_of is 3; it must be even",
    ),
    "best_of in parts": ({"advantage.best_of": 6}, 1, r"best_of is 6.*optimizer_steps \(4\)"),
    "best_of of whole groups": (
        {"advantage.best_of": 7, "update.split": "groups"},
        1,
        r"best_of is 7; it must be even and at most batch.samples \(12\)",
    ),
    "groups": (
        {"update.split": "groups"},
        16,
        r"batch.prompts \(32\).*\(4 x 16\).*'groups'.*--batch.prompts to 64 or --update.split",
    ),
    "no steps": (
        {"update.step_fraction": 0.0},
        1,
        "step_fraction is 0.0; it must be greater than 0",
    ),
    "too many steps": ({"update.step_fraction": 1.2}, 1, "step_fraction is 1.2"),
    "step weights": ({"update.step_weight": [1.0, 2.0]}, 1, "has 2 weights; 25 .* need 24"),
    "step weight": (
        {"update.step_weight": [0.0] * 23 + [-1.0]},
        1,
        r"update.step_weight holds -1.0; it must be at least 0",
    ),
    "target": ({"update.kl_target": 0.01}, 1, "kl_target is 0.01, but update.kl is 0"),
    "target below": ({"update.kl_target": -0.01}, 1, "kl_target is -0.01.*at least 0"),
    "decay": ({"ema.decay": 1.0}, 1, "ema.decay is 1.0; it must be less than 1"),
    "bfloat16 weights, float32 products": (
        {"model.weights": "bfloat16_stochastic", "model.compute_dtype": "float32"},
        1,
        r"model.compute_dtype is float32; set --model.compute_dtype bfloat16",
    ),
    "bfloat16 weights, an average": (
        {
            "model.weights": "bfloat16_stochastic",
            "model.compute_dtype": "bfloat16",
            "ema.decay": 0.9,
        },
        1,
        r"ema.decay is 0.9 with model.weights bfloat16_stochastic",
    ),
    "shift": ({"sampling.shift": -1.0}, 1, "sampling.shift is -1.0"),
    "iterations": ({"run.iterations": 0}, 1, "run.iterations is 0.*at least 1"),
    "steps": ({"sampling.steps": 1}, 1, "sampling.steps is 1.*at least 2"),
    "no number": ({"update.learning_rate": float("nan")}, 1, "update.learning_rate is nan"),
    "norm": ({"update.max_grad_norm": 0.0}, 1, "update.max_grad_norm is 0.0"),
    "kl": ({"update.kl": -0.1}, 1, "update.kl is -0.1.*at least 0"),
    "keep": ({"checkpoint.keep": -1}, 1, "checkpoint.keep is -1.*at least 0"),
    "not resumed": ({"run.resume_from": "a"}, 1, "run.resume_from is 'a'.*--run.resume true"),
    "eta": ({"sampling.eta": 0.0}, 1, "eta.* 0.0"),
    "no embeddings": ({"text.mode": "embeddings"}, 1, "no folder is given; set --text.embeddings"),
    "unread embeddings": (
        {"text.embeddings": "somewhere"},
        1,
        "text.embeddings is 'somewhere', but text.mode is 'online'.*--text.mode embeddings",
    ),
    "cps": ({"sampling.transition": "cps", "sampling.eta": 1.2}, 1, "(cps.*1.2|1.2.*cps)"),
}


@pytest.mark.parametrize("case", COMPLAINTS)
def test_what_cannot_work_is_refused_before_anything_loads(case):
    changes, world_size, message = COMPLAINTS[case]
    config = parse(["--recipe", "flux_mixgrpo"])
    check(config, 1)
    for path, value in changes.items():
        section, name = path.split(".")
        setattr(getattr(config, section), name, value)
    with pytest.raises(ValueError, match=message):
        check(config, world_size)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "no reward is configured"),
        ([0.0, 0.0], "one must be positive"),
        ([1.0, -1.0], "rewards.r1.weight is -1.0; it must be at least 0"),
    ],
)
def test_rewards_that_cannot_work(weights, message):
    config = parse(["--recipe", "flux_mixgrpo"])
    config.rewards = {f"r{i}": RewardConfig("jpeg_size", weight=w) for i, w in enumerate(weights)}
    with pytest.raises(ValueError, match=message):
        check(config, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 16}, "size 16 .*10 steps.*1..5"),
        ({"start": 7}, r"size 4 at start 7 .*10 steps: valid starts are 0..1"),
        ({"envelope": (3, 17)}, r"\[3, 17\).*\[0, 9\)"),
        ({"stride": -1}, "-1"),
    ],
)
def test_a_window_that_does_not_fit_is_refused(changes, message):
    config = parse(["--recipe", "shapes_mixgrpo"])
    for name, value in changes.items():
        setattr(config.window, name, value)
    with pytest.raises(ValueError, match=message):
        make_windows(config)


def test_a_resumed_run_may_change_only_what_does_not_alter_its_weights():
    saved = flatten(parse(["--recipe", "shapes_mixgrpo"]))
    saved = json.loads(json.dumps(saved))
    for allowed in (["--run.iterations", "999"], ["--log.progress", "false"],
                    ["--checkpoint.every", "1"], ["--validation.every", "7"],
                    ["--checkpoint.asynchronous", "false"], ["--run.resume_from", "undamaged"],
                    ["--run.folder", "elsewhere"], ["--run.resume", "true"],
                    ["--update.micro_batch", "7"], ["--sampling.micro_batch", "7"],
                    ["--sampling.decode_batch", "7"], ["--text.placement", "offload"],
                    ["--scoring.placement", "cpu"]):  # fmt: skip
        check_resumable(saved, parse(["--recipe", "shapes_mixgrpo", *allowed]))
    for refused, words in (
        (["--update.learning_rate", "0.5"], "update.learning_rate was 7e-05, is 0.5"),
        (["--rewards.hpsv2.weight", "2"], "rewards.hpsv2.weight was 1.0, is 2.0"),
        (["--run.seed", "1"], "run.seed was 714, is 1"),
        (["--validation.prompts", "8"], "validation.prompts was 256, is 8"),
        (["--window.envelope", "null"], r"window.envelope was \[0, 5\], is None"),
    ):
        with pytest.raises(ValueError, match=words):
            check_resumable(saved, parse(["--recipe", "shapes_mixgrpo", *refused]))


# ---- recipes


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_every_recipe_is_whole(name):
    config = parse(["--recipe", name])
    check(config, 1)
    windows = make_windows(config)
    assert windows.at(0).stop < config.sampling.steps
    assert any(reward.weight > 0 for reward in config.rewards.values())


def test_both_recipes_are_there():
    assert {"shapes_mixgrpo", "flux_mixgrpo"} <= set(RECIPE_NAMES)


PUBLISHED = {
    "run.iterations": 300,
    "run.seed": 714,
    "model.family": "auto",
    "model.train": "full",
    "model.compute_dtype": "bfloat16",
    "model.guidance": 3.5,
    "model.height": 720,
    "model.width": 720,
    "sampling.steps": 25,
    "sampling.shift": 3.0,
    "sampling.transition": "flow_sde",
    "sampling.eta": 0.7,
    "sampling.log_ratio": "normal",
    "sampling.shared_noise": True,
    "window.strategy": "progressive",
    "window.size": 4,
    "window.start": 0,
    "window.stride": 1,
    "window.iters_per_window": 25,
    "window.at_end": "clamp",
    "window.envelope": None,
    "tail.solver": "euler",
    "tail.ratio": 1.0,
    "batch.prompts": 32,
    "batch.samples": 12,
    "advantage.kind": "advantage_sum",
    "advantage.clip": 5.0,
    "update.optimizer_steps": 4,
    "update.clip": 1e-4,
    "update.kl": 0.0,
    "update.learning_rate": 1e-5,
    "update.betas": [0.9, 0.999],
    "update.weight_decay": 1e-4,
    "update.warmup": 0,
    "update.max_grad_norm": 1.0,
    "validation.steps": 50,
    "validation.seed": 617,
    "rewards.hpsv2.kind": "hpsv2",
    "rewards.hpsv2.weight": 1.0,
    "rewards.pickscore.kind": "pickscore",
    "rewards.pickscore.weight": 1.0,
    "rewards.pickscore.options.shift": 18,
    "rewards.pickscore.options.scale": 8,
    "rewards.imagereward.kind": "imagereward",
    "rewards.imagereward.weight": 1.0,
    "rewards.clip_score.weight": 0.0,
}


def test_flux_mixgrpo_has_the_published_values():
    config = parse(["--recipe", "flux_mixgrpo"])
    check(config, 32)
    found = flatten(config)
    assert {key: found[key] for key in PUBLISHED} == PUBLISHED
    assert sum(reward.weight > 0 for reward in config.rewards.values()) == 3
    # 12 pictures in 4 optimizer steps are the published 3 samples of gradient accumulation.
    assert config.batch.samples // config.update.optimizer_steps == 3
    windows = make_windows(config)
    assert (windows.at(0), windows.at(299)) == (Window(0, 4), Window(11, 15))


# ---- what is done with knobs


def test_the_saved_configuration_holds_no_secret(straight):
    """The run had a WANDB_API_KEY in its environment."""
    text_files = [p for p in straight.rglob("*") if p.suffix in (".json", ".jsonl", ".txt", "")]
    read = [p for p in text_files if p.is_file()]
    assert straight / "config.json" in read
    assert not any(SECRET.encode() in path.read_bytes() for path in read)


def test_flatten_is_what_json_gives_back():
    config: Any = parse(["--recipe", "shapes_mixgrpo"])
    flat = flatten(config)
    assert flat["update.betas"] == [0.9, 0.999]
    assert flat["rewards.hpsv2.options"] == {}
    assert json.loads(json.dumps(flat)) == flat


# ---- recipes that are none


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; a recipe sets knobs"),
        (b"\xff\xfe\x80", "is not UTF-8 text"),
        (b"foo: 1\n", "there is no knob foo"),
        (b"window: {sise: 2}\n", "there is no knob window.sise; did you mean window.size"),
        (
            b"rewards: {a: {kind: jpeg_size, wieght: 1}}\n",
            "no knob rewards.a.wieght; did you mean rewards.a.weight",
        ),
        (
            b"run: {iterations: abc}\n",
            r"^run.iterations is 'abc'; it must be a whole number \(\S+recipe.yaml, line 1\)$",
        ),
        (
            b"rewards: {a: {kind: jpeg_size, weight: abc}}\n",
            r"^rewards.a.weight is 'abc'; it must be a number \(\S+, line 1\)$",
        ),
        (b"rewards: {a: {weight: 1}}\n", "a reward has no kind .*also set --rewards.NAME.kind"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_clear_error(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        parse(["--recipe", str(path)])
