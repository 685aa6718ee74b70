"""``python -m mixgrpo sample --recipe NAME [--checkpoint PATH] [--knob VALUE ...]``."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from types import FrameType

import jsonargparse

from mixgrpo.commands.train import complain, in_one_line, with_recipe_paths
from mixgrpo.config import RECIPES, flatten
from mixgrpo.inference.config import InferenceConfig

SAMPLING_RECIPES = RECIPES.parent / "inference"


def run(arguments: Sequence[str]) -> int:
    """Draws the pictures; returns the exit code."""
    try:
        config = parse(arguments)
    except (ValueError, FileNotFoundError) as error:
        return complain(error)
    # Only now: a mistyped knob should not have to wait for torch.
    from mixgrpo.inference.sample import OutOfMemory, sample

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        folder = sample(config)
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        ended = KeyboardInterrupt(
            f"stopped by {signal.Signals(number).name}; the pictures in {config.folder} are "
            "whole, and the same command draws the others"
        )
        return complain(ended, 128 + number)
    except (ValueError, OSError, OutOfMemory) as error:
        if os.environ.get("MIXGRPO_TRACEBACK"):
            traceback.print_exc()
        return complain(error)
    except RuntimeError as error:
        # Communication fails where another process has left; that one has said why.
        if not re.search(r"gloo|NCCL", str(error)):
            raise
        return complain(ConnectionError(f"lost another process: {str(error).splitlines()[0]}"))
    if os.environ.get("RANK", "0") == "0":
        print(f"pictures: {folder}", file=sys.stdout)
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def parse(arguments: Sequence[str]) -> InferenceConfig:
    """The configuration that a command line gives: defaults < recipe < overrides.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: a knob is unknown or has a wrong value.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="python -m mixgrpo sample",
        allow_abbrev=False,  # a shortened name is a mistyped one
        description="Draws pictures of test prompts with the base model or a tuned one.",
        exit_on_error=False,
    )
    parser.add_argument(
        "--recipe",
        action="config",
        help="a recipe's name in scripts/inference, or the path of a YAML file",
    )
    parser.add_class_arguments(InferenceConfig)
    words = with_recipe_paths(arguments, SAMPLING_RECIPES)
    try:
        values = parser.parse_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(in_one_line(str(error), words, flatten(InferenceConfig()))) from error
    built = parser.instantiate(values)
    return InferenceConfig(**{field.name: built[field.name] for field in fields(InferenceConfig)})
