"""``python -m mixgrpo train --recipe NAME [--section.knob VALUE ...]``."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import jsonargparse

from mixgrpo.config import RECIPES, Config, RewardConfig, flatten


def run(arguments: Sequence[str]) -> int:
    """Trains; returns the exit code."""
    try:
        config = parse(arguments)
    except (ValueError, FileNotFoundError) as error:
        return complain(error)
    # Only now: a mistyped knob should not have to wait for torch.
    from transformers.utils.logging import disable_progress_bar

    from mixgrpo.checkpoint import CheckpointError
    from mixgrpo.rewards import RewardError
    from mixgrpo.trainer import TrainingStopped, train

    disable_progress_bar()  # of each model part's loading; training has its own
    try:
        train(config)
    except KeyboardInterrupt:
        return complain(KeyboardInterrupt("ended at once; --run.resume true continues"), 130)
    except TrainingStopped as stopped:
        return complain(stopped, stopped.exit_code)
    except (ValueError, OSError, CheckpointError, RewardError) as error:
        if os.environ.get("MIXGRPO_TRACEBACK"):
            traceback.print_exc()
        return complain(error)
    except RuntimeError as error:
        return complain(lost_process(error))
    return 0


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that a command line gives: defaults < recipe < overrides.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: a knob is unknown or has a wrong value.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="python -m mixgrpo train",
        allow_abbrev=False,  # a shortened name is a mistyped one
        description="Fine-tunes a flow-matching model with MixGRPO.",
        exit_on_error=False,
    )
    parser.add_argument(
        "--recipe",
        action="config",
        help="a recipe's name in scripts/recipes, or the path of a YAML file",
    )
    parser.add_class_arguments(Config)
    words = _with_recipe_paths(list(arguments))
    try:
        values = parser.parse_args(words)
    except argparse.ArgumentError as error:
        message = _in_one_line(str(error))
        if message.startswith("Problems parsing config"):
            recipes = [word for word in words if word.startswith("--recipe=")]
            message = f"{' '.join(recipes)} is no recipe: {message}"
        raise ValueError(message) from error
    built = parser.instantiate(values)
    return Config(**{field.name: built[field.name] for field in fields(Config)})


def _in_one_line(message: str) -> str:
    """A parser's message, with the nearest knob where one was mistyped."""
    text = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments: --([\w.]+)", text) or re.search(
        r"'([\w.]+)' does not accept option '([\w.]+)'", text
    )
    known = list(flatten(Config()))
    if unknown is not None:
        knob = ".".join(unknown.groups())
    elif (bad := re.search(r"[Oo]ption '(\w+)' is not accepted", text)) is not None:
        knob = bad[1]
        if "RewardConfig" in text:
            knob = f"rewards.NAME.{knob}"
            known = [f"rewards.NAME.{field.name}" for field in fields(RewardConfig)]
    else:
        return text
    nearest = difflib.get_close_matches(knob, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else "--help lists them"
    return f"there is no knob {knob}; {hint}"


def _with_recipe_paths(arguments: list[str]) -> list[str]:
    """``--recipe NAME`` (or ``--recipe=NAME``) -> ``--recipe=PATH``, before all overrides."""
    recipes, overrides = [], []
    words = iter(arguments)
    for word in words:
        if word == "--recipe":
            recipes.append(f"--recipe={recipe_path(next(words, ''))}")
        elif word.startswith("--recipe="):
            recipes.append(f"--recipe={recipe_path(word.removeprefix('--recipe='))}")
        else:
            overrides.append(word)
    return [*recipes, *overrides]


def recipe_path(name: str) -> Path:
    """The file of a recipe, by its name or path.

    Raises:
        FileNotFoundError: it is neither; the message lists the known ones and the nearest.
        ValueError: the file holds nothing, or no text.
    """
    path = Path(name)
    if path.is_file():
        _check_recipe(path)
        return path
    known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    if name in known:
        return RECIPES / f"{name}.yaml"
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    raise FileNotFoundError(
        f"there is no recipe {name!r}{hint} Known: {', '.join(known)}; or give a YAML file's path"
    )


def _check_recipe(path: Path) -> None:
    try:
        if path.read_text(encoding="utf-8").strip():
            return
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; a recipe is YAML") from error
    raise ValueError(f"{path} is empty; a recipe sets knobs, as those in scripts/recipes do")


def complain(error: BaseException, exit_code: int = 1) -> int:
    """Prints an error in one line; returns the exit code."""
    rank = os.environ.get("RANK", "0")
    prefix = f"error (rank {rank})" if rank != "0" else "error"
    print(f"{prefix}: {error}", file=sys.stderr)
    return exit_code


def lost_process(error: RuntimeError) -> ConnectionError:
    """What to say where communication fails because another process has left, having said why.

    Raises:
        RuntimeError: ``error`` itself, if it is another.
    """
    if not re.search(r"gloo|NCCL", str(error)):
        raise error
    return ConnectionError(f"lost another process of this run: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
