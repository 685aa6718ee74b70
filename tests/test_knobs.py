"""How knobs are read: nothing but what a recipe or a word says, or one sentence with the remedy."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from mixgrpo.checks import BOUNDS, ENCODING_BOUNDS, SAMPLING_BOUNDS, check, check_values
from mixgrpo.commands import main
from mixgrpo.commands.preprocess import parse as parse_preprocess
from mixgrpo.commands.sample import parse as parse_sample
from mixgrpo.commands.train import parse
from mixgrpo.config import Config, FilePath, PreprocessConfig, RewardConfig, flatten
from mixgrpo.inference.config import InferenceConfig
from mixgrpo.rewards.registry import find_reward


@pytest.fixture
def read(tmp_path):
    """Parses a recipe's text and further words."""

    def parse_text(text: str | bytes, *words: str) -> Config:
        path = tmp_path / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return parse(["--recipe", str(path), *words])

    return parse_text


@pytest.fixture
def refused(read):
    """The message about a recipe, which is one line."""

    def message(text: str | bytes, *words: str) -> str:
        with pytest.raises((ValueError, OSError)) as caught:
            read(text, *words)
        said = str(caught.value)
        assert "\n" not in said
        return said

    return message


def refused_words(*words: str) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        parse(words)
    said = str(caught.value)
    assert "\n" not in said
    return said


# ---- a reward's options


def options(text: str) -> str:
    return f"rewards: {{a: {{kind: jpeg_size, options: {{x: {text}}}}}}}\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"1.10"', "1.10"),
        ("'no'", "no"),
        ('"0123"', "0123"),
        ('"Score: X"', "Score: X"),
        ("'{prompt}'", "{prompt}"),
        ("'null'", "null"),
        ('"a\\nb"', "a\nb"),
        ("''", ""),
        ("'[1]'", "[1]"),
        ("two words", "two words"),
        ("2024-01-01", "2024-01-01"),
        ("y", "y"),
        ("http://host:80/v1", "http://host:80/v1"),
        ("1.5", 1.5),
        ("1e-3", 1e-3),
        ("12", 12),
        ("-7", -7),
        ("true", True),
        ("~", None),
        ("[1, '1', {k: '2'}]", [1, "1", {"k": "2"}]),
    ],
)
def test_an_option_is_what_the_recipe_says(read, text, value):
    found = read(options(text)).rewards["a"].options["x"]
    assert found == value
    assert type(found) is type(value)


def test_a_template_may_be_a_block(read):
    text = (
        "rewards:\n  a:\n    kind: vlm\n    options:\n      t: |\n        Score: {s}\n        01\n"
    )
    assert read(text).rewards["a"].options == {"t": "Score: {s}\n01\n"}


@pytest.mark.parametrize(
    "text",
    [
        *("0123", "0o14", "0x1F", "0b1", "1_000", "1:30", "00.5", "no", "Yes", "on", "OFF"),
        *(".nan", ".inf", "-.INF", "nan", "Infinity", "None", "1e999", "1e-999", "9" * 5000),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(refused, text):
    said = refused(options(text))
    assert said.startswith("rewards.a.options.x is ")
    assert said.endswith("mine.yaml, line 1)")
    assert f"{text[:57]!r}"[:-1] in said
    assert len(said) < 400


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "x has no value"),
        ("{prompt}", "x.prompt has no value"),
        ("{1: a}", "the key '1' is not text"),
        ("{on: a}", "the key 'on' is not text"),
        ("{y: 1, y: 2}", "'y' is given twice"),
        ("1, <<: {a: 1}", "the key '<<' is not text"),
        ("!!str 5", "tags such as !!str are not supported"),
        ("!!python/object:os.system {}", "tags such as !!str are not supported"),
        ('"\\0"', "contains the character '\\x00'"),
        ('"\\ud800"', "contains the character '\\ud800'"),
    ],
)
def test_an_option_that_cannot_be(refused, text, words):
    assert words in refused(options(text))


OF_A = "--rewards.a.options"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["x", "50"], {"x": 50}),
        (["x", "Score: X"], {"x": "Score: X"}),
        (["x", '"0123"'], {"x": "0123"}),
        (["x", ""], {"x": ""}),
        (["x", "-1"], {"x": -1}),
        (["x", "[1, '1']"], {"x": [1, "1"]}),
        (["request.extra.seed", "4"], {"request": {"extra": {"seed": 4}}}),
        (["old.b", "2"], {"old": {"a": 1, "b": 2}}),
    ],
)
def test_one_option_is_set_on_the_command_line(read, words, expected):
    config = read("rewards: {a: {kind: jpeg_size, options: {old: {a: 1}}}}", f"{OF_A}.{words[0]}",
                  words[1])  # fmt: skip
    assert config.rewards["a"].options == {"old": {"a": 1}, **expected}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("x", "0123", "rewards.a.options.x is '0123', which can be read as text"),
        ("x", "{prompt}", "rewards.a.options.x.prompt has no value"),
        ("x", '"a" b', "--rewards.a.options.x is not valid YAML: .*put it in quotes"),
        ("old.b", "2", "rewards.a.options.old is no mapping, so b cannot be set in it"),
        ("", "2", "there is no knob rewards.a.options."),
    ],
)
def test_an_option_on_the_command_line_that_cannot_be(read, name, value, said):
    recipe = "rewards: {a: {kind: jpeg_size, options: {old: 5}}}"
    with pytest.raises(ValueError, match=said):
        read(recipe, f"{OF_A}.{name}", value)


# ---- what a recipe says twice, or not at all


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("update: {kl: 1}\nupdate: {clip: 1}\n", "line 2, column 1: 'update' is given twice"),
        ("update:\n  kl: 1\n  kl: 2\n", "line 3, column 3: 'kl' is given twice, first in line 2"),
        ("run.seed: 1\nrun: {seed: 2}\n", "run.seed is given twice, also in line 1"),
        ("rewards.b.kind: x\nrewards: {a: {kind: x}}\n", "rewards is given twice, also in line 1"),
        (
            "rewards.a.options.x: 1\nrewards.a.options: {y: 1}\n",
            "rewards.a.options is given twice, also in line 1",
        ),
        ("rewards: {a: {kind: x}, a: {kind: y}}\n", "'a' is given twice"),
        ("window: &w {size: 2}\ntail: *w\n", "there is no knob tail.size"),
        ("rewards: {a: {kind: x}, A: {kind: y}}\n", "a and A differ only in upper and lower case"),
    ],
)
def test_nothing_is_given_twice(refused, text, words):
    assert words in refused(text)


@pytest.mark.parametrize("text", ["ema:\n", "ema:\n  # decay: 0.9\n", "rewards:\n", "{}\n"])
def test_an_empty_section_changes_nothing(read, text):
    assert flatten(read(text)) == flatten(Config())


def test_dotted_keys_and_sections_are_merged(read):
    run = read("run.resume: yes\nrun: {seed: 3}\n").run
    assert (run.resume, run.seed) == (True, 3)


def test_of_several_recipes_the_last_counts(tmp_path):
    texts = ("rewards: {a: {kind: x, model: m, options: {o: 1}}, b: {kind: y}}\nrun: {seed: 1}",
             "rewards: {a: {weight: 2, options: {p: 1}}}")  # fmt: skip
    words = []
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.yaml").write_text(text)
        words += ["--recipe", str(tmp_path / f"{number}.yaml")]
    config = parse(words)
    assert config.rewards == {"a": RewardConfig("x", 2.0, "m", options={"p": 1})}
    assert config.run.seed == 1


def test_print_config_prints_a_recipe(tmp_path, capsys):
    """Which gives the same configuration, also where text looks like something else."""
    texts = [
        "01",
        "1e5",
        "no",
        "None",
        "0o14",
        "a: b",
        "",
        "#",
        "1:30",
        "{s}",
        "a\nb",
        "\u00e9",
        "~",
    ]
    words = ["--recipe", "flux_mixgrpo", "--rewards.a.kind", "vlm", f"{OF_A}.t", json.dumps(texts),
             f"{OF_A}.n", "[1, 1.0, 1e-7, true, null]"]  # fmt: skip
    with pytest.raises(SystemExit):
        parse([*words, "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    printed = parse(["--recipe", str(tmp_path / "printed.yaml")])
    assert printed == parse(words)
    assert printed.rewards["a"].options == {"t": texts, "n": [1, 1.0, 1e-7, True, None]}


# ---- files that are no recipes


def bomb(levels: int) -> str:
    lines = ["x0: &x0 [" + ", ".join("a" * 10) + "]"]
    for i in range(1, levels):
        lines.append(f"x{i}: &x{i} [" + ", ".join([f"*x{i - 1}"] * 10) + "]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# only\n", "is empty"),
        ("- a\n", "it is a list of 1, not a mapping of sections"),
        ("hello\n", "it is a single value, not a mapping of sections"),
        ("[" * 5000, "more than 20 levels of nesting"),
        ("run: " + "{a: " * 60 + "1" + "}" * 60, "more than 20 levels of nesting"),
        (bomb(9), "more than 20000 values once its aliases are replaced"),
        ("a: &a [*a]\n", "an alias is part of what it stands for"),
        ("run:\n\tseed: 1\n", "line 2, column 1: a tab is used for indentation; use spaces"),
        ("run: {seed: 1}\n---\nrun: {}\n", "line 2, column 1: a second document begins here"),
        ("run: {seed: 1\n", "line 1, column 6: what begins here is never closed"),
        ("a: \x01\n", "contains a control character"),
        ("x" * 300_000, "is larger than 0.25 MiB"),
        ("run: {}\n".encode("utf-16"), "is not UTF-8 text but UTF-16"),
        (bytes(range(256)), "is not UTF-8 text"),
        ("1: 2\n", "the key '1' is not text"),
        ("null: 2\n", "the key 'null' is not text"),
        ("? [a]\n: 1\n", "a key is a list of 1; it must be text"),
        ("update: 5\n", "update is a single value, but it is a section of knobs"),
        ("ema: null\n", "ema is a single value, but it is a section of knobs"),
        ("rewards: [a, b]\n", "rewards is a list of 2; it must be a mapping of names"),
        ("rewards: {a: jpeg_size}\n", "rewards.a is a single value, but it is a section"),
        ("rewards: {a: }\n", "a reward has no kind (rewards a)"),
        *(
            (f"rewards: {{{json.dumps(name)}: {{kind: jpeg_size}}}}\n", "names metrics and files")
            for name in ("", "a.b", "a b", "a/b", "..", "a\\b", "é", "a" * 65, "a:b", "*")
        ),
        ("Window: {size: 2}\n", "no knob Window; did you mean window?"),
        ("window: {SIZE: 2}\n", "no knob window.SIZE; did you mean window.size?"),
        ("updat: {kl: 1}\n", "no knob updat; did you mean update?"),
        ("learning_rate: 1\n", "no knob learning_rate; did you mean update.learning_rate?"),
        ("update: {eta: 1}\n", "no knob update.eta; did you mean sampling.eta?"),
        ("'': 1\n", "no knob ''"),
        ('"a\\nb": 1\n', "a key has more than 100 characters, or one that is not printable"),
        ("a" * 101 + ": 1\n", "a key has more than 100 characters"),
        ("run..seed: 1\n", "no knob run..seed; did you mean run.seed?"),
    ],
)
def test_a_file_that_is_no_recipe(refused, text, words):
    assert words in refused(text)


@pytest.mark.parametrize(
    "text",
    [
        b'{"run": {"seed": 5}}',
        b"\xef\xbb\xbfrun: {seed: 5}\n",
        b"run: {seed: 5}\r\n",
        b"---\nrun:\n  seed: &s 5\n...\n",
        b"run.seed: 5.0\n",
    ],
)
def test_files_that_are_recipes(read, text):
    assert read(text).run.seed == 5


def test_what_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    Path("shapes_mixgrpo").mkdir()
    Path("dangling").symlink_to("nowhere")
    assert parse(["--recipe", "shapes_mixgrpo"]).sampling.steps == 10
    for name, words in (
        (".", "is a folder, not a regular file; give the name of a recipe or the path"),
        ("fifo", "is a FIFO, not a regular file"),
        ("/dev/zero", "is a device, not a regular file"),
        ("dangling", "there is no recipe 'dangling'"),
        ("x" * 300, "there is no recipe"),
        ("a\0b", "a null character"),
        ("", "--recipe needs a value"),
    ):
        assert words in refused_words("--recipe", name)


SECRET = "sk-1234567890abcdef"


@pytest.mark.parametrize(
    "text",
    [
        f"OPENAI_API_KEY={SECRET}\nB={SECRET}\n",
        f"OPENAI_API_KEY: {SECRET}\n",
        f"export KEY='{SECRET}\n",
        f"run: *{SECRET}\n",
        f"run: !{SECRET} x\n",
        f"run: {SECRET}\n",
        f"run: &{SECRET} a\nb: &{SECRET} a: c\n",
        f"KEY: {SECRET}: x\n",
        f"- {SECRET}\n",
        f"KEY: '{SECRET}\n",
        f"rewards: [{SECRET}]\n",
        f"rewards: {{a: {SECRET}}}\n",
        f"KEY: @{SECRET}\n",
        f"%{SECRET}\n",
    ],
)
def test_a_file_of_secrets_is_not_printed(refused, text):
    assert SECRET not in refused(text)


@pytest.mark.parametrize("word", ["--log.key", "--api_key", "--rewards.a.b"])
@pytest.mark.parametrize("equals", [False, True])
def test_the_value_of_an_unknown_knob_is_not_printed(word, equals):
    words = [f"{word}={SECRET}"] if equals else [word, SECRET]
    assert SECRET not in refused_words(*words)
    for command in ("export", "report", "evaluate"):
        assert main([command, "x", "--output", "y", *words]) == 1


# ---- values of the wrong type


@pytest.mark.parametrize(
    ("knob", "value", "words"),
    [
        ("run.seed", "0714", "in plain decimal digits, without leading zeros"),
        ("run.seed", "0o14", "in plain decimal digits"),
        ("run.seed", "0x10", "in plain decimal digits"),
        ("run.seed", "1_000", "in plain decimal digits"),
        ("run.seed", "1:30", "in plain decimal digits"),
        ("run.seed", "'5'", "it must be a whole number, without quotes"),
        ("run.seed", "5.5", "it must be a whole number"),
        ("run.seed", "yes", "it must be a whole number"),
        ("run.seed", "٣", "it must be a whole number"),
        ("run.seed", "[1]", "run.seed is [1]; it must be a whole number"),
        ("run.seed", "9" * 5000, "it must be a whole number of at most 40 digits"),
        ("run.seed", "1e99999999", "it must be a whole number"),
        ("update.kl", "'0.1'", "it must be a number, without quotes"),
        ("update.kl", "1_0.5", "in plain decimal digits"),
        ("update.kl", ".nan", "it must be a number that is finite"),
        ("update.kl", "Infinity", "it must be a number that is finite"),
        ("update.kl", "1e400", "it must be a number that is not too large"),
        ("update.kl", "1e-400", "it must be a number that is not too small"),
        ("update.kl", "0x1p3", "it must be a number"),
        ("run.resume", "1", "it must be true or false"),
        ("run.resume", "'true'", "it must be true or false, without quotes"),
        ("engine.zero_stage", "'3'", "it must be 2 or 3, without quotes"),
        ("engine.zero_stage", "4", "it must be 2 or 3"),
        ("model.train", "Full", "it must be full or lora, in lower case"),
        ("log.wandb", "no", "it must be auto, online, offline or disabled"),
        ("update.betas", "[0.9]", "it must be a list of 2, such as [0.5, 0.5]"),
        ("update.betas", "0.9", "it must be a list of 2, such as [0.5, 0.5]"),
        ("update.betas", "[0.9, .inf]", "update.betas[1] is '.inf'; it must be a number"),
        ("update.step_weight", "[]", "it must be a list such as [0.5]"),
        ("update.step_weight", "[a]", "update.step_weight[0] is 'a'; it must be a number"),
        ("update.step_weight", "all", "equal, inverse_dt or noise or a list such as [0.5]"),
        ("window.envelope", "[1, 2, 3]", "it must be a list of 2, such as [1, 1]"),
        ("window.envelope", "5", "it must be a list of 2, such as [1, 1] or null"),
        ("window.envelope", "None", "it must be a list of 2, such as [1, 1] or null"),
        ("window.seed", "abc", "it must be a whole number or null"),
    ],
)
def test_a_value_of_the_wrong_type(refused, knob, value, words):
    """In a recipe and on the command line."""
    said = refused(f"{knob}: {value}\n")
    assert said.startswith(knob)
    assert words in said
    assert said.endswith("mine.yaml, line 1)")
    said = refused_words(f"--{knob}", value)
    assert said.startswith(knob)
    assert words in said


@pytest.mark.parametrize(
    ("knob", "text", "value"),
    [
        ("model.compile", "off", "off"),
        ("log.project", "0123", "0123"),
        ("log.project", "1e3", "1e3"),
        ("log.project", "yes", "yes"),
        ("run.folder", "2024", "2024"),
        ("run.resume", "On", True),
        ("run.resume", "no", False),
        ("run.iterations", "1e3", 1000),
        ("run.seed", "9223372036854775807", 9223372036854775807),
        ("run.seed", "-1", -1),
        ("update.kl", "1", 1.0),
        ("update.kl", ".5", 0.5),
        ("update.betas", "[0, 0.5]", (0.0, 0.5)),
        ("update.step_weight", "[1, 0.5]", [1.0, 0.5]),
        ("window.envelope", "null", None),
        ("engine.zero_stage", "2", 2),
    ],
)
def test_a_plain_value_is_read_by_the_type_of_its_knob(read, knob, text, value):
    for config in (
        read(f"{knob}: {text}\n"),
        parse([f"--{knob}", text]),
        parse([f"--{knob}={text}"]),
    ):
        found = flatten(config)[knob]
        assert found == (list(value) if isinstance(value, tuple) else value)
        assert type(found) is (list if isinstance(value, tuple) else type(value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {folder: ''}", "run.folder is empty"),
        ("run: {folder: ' '}", "run.folder is empty"),
        ('run: {folder: "a\\0b"}', "contains the character '\\x00'"),
        ('run: {folder: "a\\nb"}', "contains the character '\\n'"),
        ("run: {folder: ~}", "run.folder is null; it must be text"),
        ("run: {folder: }", "run.folder has no value; write text, or remove the line"),
        ("run: {seed: }", "run.seed has no value; write a whole number"),
        ("rewards: {a: {kind: ''}}", "rewards.a.kind is empty"),
        ("rewards: {a: {kind: x, options: [1]}}", "options is a list of 1; it must be a mapping"),
        ("rewards: {a: {kind: x, model: None}}", "it must be a path or null"),
        ('guidance: {negative_prompt: "a\\tb"}', "negative_prompt contains the character '\\t'"),
    ],
)
def test_a_value_that_is_not_there(refused, text, words):
    assert words in refused(text)


@pytest.mark.parametrize("prompt", ["", " "])
def test_a_negative_prompt_may_be_blank(prompt, tmp_path):
    recipe = tmp_path / "a.yaml"
    recipe.write_text(f"guidance: {{negative_prompt: '{prompt}'}}")
    for words in (["--recipe", str(recipe)], ["--guidance.negative_prompt", prompt]):
        assert parse(words).guidance.negative_prompt == prompt


# ---- words of a command line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["\u2013recipe", "x"],
            "'\u2013recipe' begins with a dash that is not '-'; write --recipe",
        ),
        (["\u2014run.seed=3"], "write --run.seed=3"),
        (["\u2212\u2212run.seed", "3"], "write --run.seed"),
        (["-recipe", "x"], "'-recipe' is neither an option nor the value of one"),
        (["shapes_mixgrpo"], "'shapes_mixgrpo' is neither an option nor the value of one"),
        (["--"], "'--' is neither an option"),
        (["--=x"], "'--=x' is neither an option"),
        (["---run.seed", "1"], "'---run.seed' is neither an option"),
        ([""], "'' is neither an option"),
        (["--run.seed", "5", "6"], "'6' is neither an option"),
        (["--run.seed"], "--run.seed needs a value"),
        (["--run.folder", "--run.resume", "true"], "--run.folder needs a value; one that begins"),
        (["--run.resume"], "--run.resume needs a value"),
        (["--recipe"], "--recipe needs a value"),
        (["--recipe="], "--recipe needs a value"),
        (["--recipe", "--run.seed", "1"], "--recipe needs a value"),
        (["--dry-run"], "there is no knob dry-run"),
        (["--a\nb", "1"], "there is no knob 'a\\nb'"),
        (["--run.Seed", "1"], "there is no knob run.Seed; did you mean run.seed?"),
        (["--seed", "1"], "there is no knob seed; did you mean run.seed?"),
        (["--window.size.x", "1"], "there is no knob window.size.x; did you mean window.size?"),
        (["--run", "5"], "run is a single value, but it is a section of knobs"),
        (["--rewards", "null"], "rewards is a single value; it must be a mapping"),
        (["--rewards", "{"], "--rewards is not valid YAML: line 1"),
        (["--rewards..kind", "x"], "'' in rewards names metrics and files"),
        (["--rewards.a.weight", "2"], "a reward has no kind (rewards a)"),
        (["--update.betas", "0.9,0.99"], "it must be a list of 2"),
        (["--run.folder", "a\udcffb"], "contains the character '\\udcff'"),
        (["--print_config=x"], "there is no knob print_config"),
    ],
)
def test_a_wrong_word(words, said):
    assert said in refused_words(*words)


def test_values_that_begin_with_a_dash():
    assert parse(["--run.seed", "-5"]).run.seed == -5
    assert parse(["--run.folder", "-x"]).run.folder == "-x"
    assert parse(["--run.folder=--x"]).run.folder == "--x"
    assert parse(["--run.folder=a=b"]).run.folder == "a=b"


# ---- limits of numbers


def numbers(section: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the knobs that are numbers, or lists of them."""
    for name, kind in get_type_hints(section).items():
        if is_dataclass(kind):
            yield from numbers(kind, f"{prefix}{name}.")
        elif get_origin(kind) is dict and is_dataclass(get_args(kind)[1]):
            yield from numbers(get_args(kind)[1], f"{prefix}{name}.*.")
        elif _is_number(kind):
            yield prefix + name


def _is_number(kind: Any) -> bool:
    if get_origin(kind) in (Union, types.UnionType, list, tuple):
        return any(_is_number(each) for each in get_args(kind))
    return kind in (int, float) and get_origin(kind) is not Literal


@pytest.mark.parametrize(
    ("section", "bounds"),
    [
        (Config, BOUNDS),
        (InferenceConfig, SAMPLING_BOUNDS),
        (PreprocessConfig, ENCODING_BOUNDS),
    ],
)
def test_every_number_has_limits(section, bounds):
    assert set(numbers(section)) == set(bounds)


def changed(path: str, value: Any) -> Config:
    config = Config(rewards={"a": RewardConfig("jpeg_size")})
    *sections, name = path.replace("*", "a").split(".")
    holder: Any = config
    for section in sections:
        holder = holder[section] if isinstance(holder, dict) else getattr(holder, section)
    before = getattr(holder, name)
    is_list = path in ("update.betas", "update.step_weight", "window.envelope")
    is_whole = isinstance(before, int) and math.isfinite(value)
    setattr(holder, name, [value, value] if is_list else int(value) if is_whole else value)
    return config


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e19, -1e19])
@pytest.mark.parametrize("knob", BOUNDS)
def test_no_number_is_without_limits(knob, value):
    name = knob.replace("*", "a")
    with pytest.raises(ValueError, match=rf"^{name} (is|holds) \S+; it must be "):
        check_values(changed(knob, value))


@pytest.mark.parametrize("knob", BOUNDS)
def test_a_limit_itself_is_allowed_if_its_bracket_is_square(knob):
    interval = BOUNDS[knob]
    for end, bracket in zip(interval[1:-1].split(", "), (interval[0], interval[-1]), strict=True):
        config = changed(knob, int(end) if end.lstrip("-").isdecimal() else float(end))
        if bracket in "[]":
            check_values(config)
        else:
            with pytest.raises(ValueError, match=r"greater than|less than"):
                check_values(config)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--run.threads", "-1"], "run.threads is -1; it must be at least 0"),
        (["--sampling.steps", "1e9"], "sampling.steps is 1000000000; it must be at most 10000"),
        (["--run.iterations", "1e18"], "run.iterations is 1000000000000000000; it must be at most"),
        (["--update.betas", "[0.9, 1]"], "update.betas holds 1.0; it must be less than 1"),
        (["--run.seed", str(2**63)], "it must be at most 9223372036854775807"),
        (["--rewards.a.kind", "x", "--rewards.a.weight", "-1"], "rewards.a.weight is -1.0"),
        (["--model.lora_alpha", "-3"], "model.lora_alpha is -3; it must be at least 1"),
        (["--window.envelope", "[-1, 5]"], "window.envelope holds -1; it must be at least 0"),
    ],
)
def test_numbers_out_of_bounds_are_refused_while_words_are_read(words, said):
    assert said in refused_words(*words)


def test_the_other_commands_have_limits_too(capsys):
    for words, said in (
        (["sample", "--steps", "1e9"], "steps is 1000000000; it must be at most 10000"),
        (["sample", "--hybrid", "nan"], "hybrid is 'nan'; it must be a number that is finite"),
        (["sample", "--lora_scale", "1e9"], "lora_scale is 1000000000.0; it must be at most 1000"),
        (["sample", "--threads", "-1"], "threads is -1; it must be at least 0"),
        (["sample", "--folder", ""], "folder is empty"),
        (["preprocess"], "--prompts_files is missing"),
        (["preprocess", "--prompts_files"], "--prompts_files needs a value"),
        (["preprocess", "--prompts_files", "a"], "--output is missing"),
        (["preprocess", "--prompts_files", "a", "--output", "b", "--shard_size", "1e18"],
         "shard_size is 1000000000000000000; it must be at most 1e6"),
        (["evaluate", "x", "--output", "o", "--resamples", "9" * 30], "it must be at most 1000000"),
        (["evaluate", "x", "--output", "o", "--gallery_prompts", "-1"], "must be at least 0"),
        (["evaluate", "x", "--output", "o", "--seed", "1e3"], "--seed is '1e3'; it must be"),
        (["evaluate", "x", "--output"], "--output: it needs a value"),
        (["evaluate", "x", "--output", ""], "--output is empty"),
        (["export", "x", "y", "--output", "z"], "'y' is not expected here"),
        (["export", "x", "--output", "z", "--ema=1"], "it takes no value, but was given '1'"),
        (["plan", "--gpus", "9" * 9], "--gpus is 999999999; it must be at most 1000000"),
        (["plan", "--gpu-memory", "inf"], "--gpu-memory is inf; it must be at most 1000000"),
        (["plan", "--share", "nan"], "--share is 'nan'; it must be a positive number"),
        (["doctor", "--processes", "9" * 9], "a positive whole number below 1000000"),
        (["launch", "--nproc_per_node", "99999", "train"], "start at most"),
        (["hosts", "--wait", "x", "train"], "--wait is 'x'; it must be a whole number"),
        (["hosts", "--max-restarts", "9" * 12, "train"], "it must be at most 1000000"),
        (["hosts", "--hostfile", "", "train"], "--hostfile is empty"),
    ):  # fmt: skip
        assert main(words) != 0
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(errors) == 1
        assert said in errors[0], errors[0]


def test_a_weight_that_is_no_number_does_not_leave_the_reward_out(refused):
    for value in (".nan", "nan", ".inf", "-.inf"):
        assert "rewards.a.weight is" in refused(f"rewards: {{a: {{kind: x, weight: {value}}}}}")
    config = Config(rewards={"a": RewardConfig("x", weight=float("nan"))})
    with pytest.raises(ValueError, match=r"rewards.a.weight is nan; it must be a finite number"):
        check(config, None)


# ---- paths


def paths(section: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the knobs that are paths."""
    for name, kind in get_type_hints(section, include_extras=True).items():
        if is_dataclass(kind):
            yield from paths(kind, f"{prefix}{name}.")
        elif get_origin(kind) is dict and is_dataclass(get_args(kind)[1]):
            yield from paths(get_args(kind)[1], f"{prefix}{name}.a.")
        elif FilePath in (kind, *get_args(kind)):
            yield prefix + name


OF_PATHS = {"folder", "path", "embeddings", "prompts_file", "prompts_files", "output", "checkpoint",
            "model"}  # fmt: skip


def test_the_paths_are_known():
    assert set(paths(Config)) == {
        *("run.folder", "model.path", "text.embeddings", "batch.prompts_file"),
        *("validation.prompts_file", "rewards.a.model", "rewards.a.checkpoint"),
    }
    for section in (Config, InferenceConfig, PreprocessConfig):
        for knob in flatten_names(section):
            is_path = knob.rpartition(".")[2] in OF_PATHS
            assert is_path == (knob in set(paths(section))), knob


def flatten_names(section: Any, prefix: str = "") -> Iterator[str]:
    for each in fields(section):
        kind = get_type_hints(section)[each.name]
        if is_dataclass(kind):
            yield from flatten_names(kind, f"{prefix}{each.name}.")
        elif get_origin(kind) is dict and is_dataclass(get_args(kind)[1]):
            yield from flatten_names(get_args(kind)[1], f"{prefix}{each.name}.a.")
        else:
            yield prefix + each.name


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_a_tilde_is_the_home_folder_in_every_path(home, read):
    kind = ["--rewards.a.kind", "jpeg_size"]
    for knob in paths(Config):
        config = parse([*kind, f"--{knob}", "~/x"])
        assert flatten(config)[knob] == f"{home}/x"
        assert flatten(read(f"{knob}: ~/x\n", *kind))[knob] == f"{home}/x"
    for knob in paths(InferenceConfig):
        assert flatten(parse_sample([f"--{knob}", "~/x"]))[knob] == f"{home}/x"
    found = parse_preprocess(["--prompts_files", "~/a", "b", "--output=~", "--model.path", "~/m"])
    assert (found.prompts_files, found.output) == ([f"{home}/a", "b"], str(home))
    assert found.model.path == f"{home}/m"
    (home / "mine.yaml").write_text("run: {seed: 3}")
    assert parse(["--recipe=~/mine.yaml"]).run.seed == 3


def test_a_user_that_does_not_exist(home):
    said = refused_words("--run.folder", "~nobody77/x")
    assert "'~nobody77/x' names no home folder, since there is no such user" in said
    assert "there is no such user" in refused_words("--recipe", "~nobody77/x")


def test_the_other_commands_know_the_home_folder_too(home, straight, capsys):
    """A folder named ~ is made by none of them."""
    (home / "run").symlink_to(straight)
    (home / "file.html").write_text("")
    for words in (
        ["export", "~/run", "--output", "~/model"],
        ["report", "mine=~/run", "--output", "~/report.html"],
        ["schedule", "--recipe", "shapes_mixgrpo", "--output", "~/windows.svg"],
    ):
        assert main(words) == 0, capsys.readouterr().err
    assert {"model", "report.html", "windows.svg"} <= {path.name for path in home.iterdir()}
    for words in (
        ["evaluate", "m=~/none", "--output", "~/o", "--rewards.a.kind", "jpeg_size"],
        ["hosts", "--hostfile", "~/none", "train"],
    ):
        assert main(words) == 1
        assert f"{home}/none" in capsys.readouterr().err
    assert not Path("~").exists()


# ---- kinds of rewards


@pytest.mark.parametrize(
    "kind",
    ["../x:f", "/abs/x:f", "x.py:f()", "a b:f", ":f", "x:", "a..b:f", ".x:f", "a:b:c", "~/x:f"],
)
def test_a_kind_that_is_no_module_and_name(kind):
    with pytest.raises(ValueError, match=r"is not of the form package.module:callable"):
        find_reward(kind)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def f(:\n", "SyntaxError"),
        ("1 / 0\n", "ZeroDivisionError: division by zero, in .*broken_reward.py:1"),
        ("import broken_reward_too\n", "cannot import 'broken_reward'"),
        ("f = 3\n", "holds no callable named 'f'"),
    ],
)
def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch, code, words):
    (tmp_path / "broken_reward.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken_reward", raising=False)
    with pytest.raises(ValueError, match=words) as caught:
        find_reward("broken_reward:f")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["a\nb", "\x07", "a\u2028b", "k" * 101, ".".join("a" * 30)])
def test_a_key_of_an_option_that_no_recipe_could_hold(key):
    words = ["--rewards.a.kind", "jpeg_size", f"{OF_A}.{key}", "1"]
    assert re.search(r"a key of more than 20 levels|not printable", refused_words(*words))
