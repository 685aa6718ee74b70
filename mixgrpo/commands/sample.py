"""``python -m mixgrpo sample --recipe NAME [--checkpoint PATH] [--knob VALUE ...]``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from functools import partial

from mixgrpo.commands.command_line import (
    carry_out,
    complain,
    new_parser,
    no_such_knob,
    read_words,
    unknown_knob,
)
from mixgrpo.commands.train import or_no_recipe, with_recipe_paths
from mixgrpo.config import RECIPES, flatten
from mixgrpo.inference.config import InferenceConfig

SAMPLING_RECIPES = RECIPES.parent / "inference"


def run(arguments: Sequence[str]) -> int:
    """Generates the images; returns the exit code."""
    try:
        config = parse(arguments)
    except (ValueError, FileNotFoundError) as error:
        return complain(error)
    # Imported here so that a mistyped knob is reported without waiting for torch.
    from mixgrpo.checkpoint import CheckpointError
    from mixgrpo.planning.memory import OutOfMemory

    left = f"the images in {config.folder} are complete; run the same command to add the others"
    return carry_out(
        partial(_sample, config), (ValueError, OSError, CheckpointError, OutOfMemory), left
    )


def _sample(config: InferenceConfig) -> None:
    from mixgrpo.inference.sample import sample

    folder = sample(config)
    if os.environ.get("RANK", "0") == "0":
        print(f"pictures: {folder}")


def parse(arguments: Sequence[str]) -> InferenceConfig:
    """The configuration that a command line gives: defaults < recipe < overrides.

    Raises:
        FileNotFoundError: the recipe does not exist.
        ValueError: a knob is unknown or has a wrong value.
    """
    parser = new_parser(
        "sample", "Generates images for test prompts with the base model or a tuned one."
    )
    parser.add_argument(
        "--recipe",
        action="config",
        help="name of a recipe in scripts/inference, or path of a YAML file",
    )
    parser.add_class_arguments(InferenceConfig)
    words = with_recipe_paths(arguments, SAMPLING_RECIPES)
    built = read_words(parser, words, partial(_in_one_line, words))
    return InferenceConfig(**{field.name: built[field.name] for field in fields(InferenceConfig)})


def _in_one_line(words: Sequence[str], text: str) -> str:
    knob = unknown_knob(text)
    if knob is None:
        return or_no_recipe(words, text)
    return no_such_knob(knob, flatten(InferenceConfig()))
