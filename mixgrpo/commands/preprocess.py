"""``python -m mixgrpo preprocess --prompts_files A B --output FOLDER [--model.path PATH ...]``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mixgrpo.checks import ENCODING_BOUNDS, check_bounds
from mixgrpo.commands.command_line import carry_out, complain, show_help
from mixgrpo.commands.knobs import set_knobs
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
    show_help(
        "preprocess",
        "Encodes prompts in advance, so that training needs no text encoder.",
        PreprocessConfig,
        arguments,
    )
    config = PreprocessConfig([], "", model=EncoderConfig())
    set_knobs(config, arguments)
    check_bounds(flatten(config), ENCODING_BOUNDS)
    return config
