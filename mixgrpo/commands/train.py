"""``python -m mixgrpo train --recipe NAME [--section.knob VALUE ...]``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

from mixgrpo.commands.command_line import (
    carry_out,
    complain,
    new_parser,
    no_such_knob,
    read_words,
    unknown_knob,
)
from mixgrpo.config import RECIPES, Config, RewardConfig, flatten


def run(arguments: Sequence[str]) -> int:
    """Trains; returns the exit code."""
    try:
        config = parse(arguments)
    except (ValueError, FileNotFoundError) as error:
        return complain(error)
    # Imported here so that a mistyped knob is reported without waiting for torch.
    from transformers.utils.logging import disable_progress_bar

    from mixgrpo.checkpoint import CheckpointError
    from mixgrpo.planning.memory import OutOfMemory
    from mixgrpo.rewards import RewardError
    from mixgrpo.run.stopping import TrainingStopped
    from mixgrpo.trainer import train

    disable_progress_bar()  # for loading each part of the model; training has its own bar
    expected = (ValueError, OSError, CheckpointError, RewardError, TrainingStopped, OutOfMemory)
    return carry_out(partial(train, config), expected, "continue with --run.resume true")


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that a command line gives: defaults < recipe < overrides.

    Raises:
        FileNotFoundError: the recipe does not exist.
        ValueError: a knob is unknown or has a wrong value.
    """
    parser = new_parser("train", "Fine-tunes a flow-matching model with MixGRPO.")
    parser.add_argument(
        "--recipe",
        action="config",
        help="name of a recipe in scripts/recipes, or path of a YAML file",
    )
    parser.add_class_arguments(Config)
    words = with_recipe_paths(arguments, RECIPES)
    built = read_words(parser, words, partial(_in_one_line, words))
    return Config(**{field.name: built[field.name] for field in fields(Config)})


def _in_one_line(words: list[str], text: str) -> str:
    """The parser's message, with the closest knob name where one was mistyped."""
    known = list(flatten(Config()))
    knob = unknown_knob(text)
    if knob is None and (bad := re.search(r"[Oo]ption '(\w+)' is not accepted", text)) is not None:
        knob = bad[1]
        if "RewardConfig" in text:
            knob = f"rewards.NAME.{knob}"
            known = [f"rewards.NAME.{field.name}" for field in fields(RewardConfig)]
    if knob is not None:
        return no_such_knob(knob, known)
    if "RewardConfig" in text and "required: kind" in text:
        return _reward_without_kind(words)
    return or_no_recipe(words, text)


def _reward_without_kind(words: Sequence[str]) -> str:
    given = {match[1] for word in words if (match := re.match(r"--rewards\.(\w+)\.", word))}
    with_kind = {word.split(".")[1] for word in words if re.match(r"--rewards\.\w+\.kind\b", word)}
    named = ", ".join(sorted(given - with_kind)) or "in the recipe"
    return (
        f"a reward has no kind (rewards {named}): if it should be one of the recipe's, correct its "
        "name; if it is new, also set --rewards.NAME.kind"
    )


def or_no_recipe(words: Sequence[str], text: str) -> str:
    """The parser's message, with the recipe's name if the recipe could not be parsed."""
    if text.startswith("Problems parsing config"):
        recipes = [word for word in words if word.startswith("--recipe=")]
        return f"{' '.join(recipes)} is not a valid recipe: {text}"
    return text


def with_recipe_paths(arguments: Sequence[str], folder: Path) -> list[str]:
    """``--recipe NAME`` (or ``--recipe=NAME``) -> ``--recipe=PATH``, before all overrides."""
    recipes, overrides = [], []
    words = iter(arguments)
    for word in words:
        if word == "--recipe":
            recipes.append(f"--recipe={recipe_path(next(words, ''), folder)}")
        elif word.startswith("--recipe="):
            recipes.append(f"--recipe={recipe_path(word.removeprefix('--recipe='), folder)}")
        else:
            overrides.append(word)
    return [*recipes, *overrides]


def recipe_path(name: str, folder: Path = RECIPES) -> Path:
    """The file of a recipe, given its path or its name in ``folder``.

    Raises:
        FileNotFoundError: it is neither; the message lists the known names and the closest one.
        ValueError: the file is empty or not UTF-8 text.
    """
    path = Path(name)
    if path.is_file():
        _check_recipe(path)
        return path
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if name in known:
        return folder / f"{name}.yaml"
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    raise FileNotFoundError(
        f"there is no recipe {name!r}{hint} Known: {', '.join(known)}; or give the path of a YAML "
        "file"
    )


def _check_recipe(path: Path) -> None:
    try:
        if path.read_text(encoding="utf-8").strip():
            return
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; a recipe is a YAML file") from error
    raise ValueError(f"{path} is empty; a recipe sets knobs, as those in scripts/recipes do")
