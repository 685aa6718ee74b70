"""``python -m mixgrpo preprocess --prompts_files A B --output FOLDER [--model.path PATH ...]``."""

from __future__ import annotations

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
from mixgrpo.config import EncoderConfig, PreprocessConfig, flatten


def run(arguments: Sequence[str]) -> int:
    """Encodes prompts into a folder; returns the exit code."""
    try:
        config = parse(arguments)
    except ValueError as error:
        return complain(error)
    # Imported here so that a mistyped knob is reported without waiting for torch.
    from mixgrpo.text.preprocess import preprocess

    return carry_out(
        partial(preprocess, config), (ValueError, OSError), "run the same command to continue"
    )


def parse(arguments: Sequence[str]) -> PreprocessConfig:
    """The configuration that a command line gives.

    Raises:
        ValueError: a knob is unknown or missing, or has a wrong value.
    """
    parser = new_parser(
        "preprocess", "Encodes prompts in advance, so that training needs no text encoder."
    )
    parser.add_argument(
        "--prompts_files",
        nargs="+",
        type=str,
        required=True,
        metavar="FILE",
        help="files of prompts, one per line, UTF-8; each distinct prompt is encoded once",
    )
    parser.add_class_arguments(PreprocessConfig, skip={"prompts_files"})
    built = read_words(parser, arguments, _in_one_line)
    return PreprocessConfig(**{field.name: built[field.name] for field in fields(PreprocessConfig)})


def _in_one_line(text: str) -> str:
    knob = unknown_knob(text)
    if knob is None:
        return text
    return no_such_knob(knob, flatten(PreprocessConfig([], "", model=EncoderConfig())))
