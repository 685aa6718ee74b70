"""``python -m mixgrpo sample --recipe NAME [--checkpoint PATH] [--knob VALUE ...]``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from mixgrpo.commands.command_line import carry_out, complain, show_help
from mixgrpo.commands.knobs import set_knobs
from mixgrpo.config import RECIPES
from mixgrpo.inference.config import InferenceConfig, check

SAMPLING_RECIPES = RECIPES.parent / "inference"


def run(arguments: Sequence[str]) -> int:
    """Generates the images; returns the exit code."""
    try:
        config = parse(arguments)
    except (ValueError, OSError) as error:
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
        OSError: the recipe does not exist or cannot be read.
        ValueError: a knob is unknown or has a wrong value, or the recipe is not valid.
    """
    show_help(
        "sample",
        "Generates images for test prompts with the base model or a tuned one.",
        InferenceConfig,
        arguments,
        recipes="scripts/inference",
    )
    config = InferenceConfig()
    set_knobs(config, arguments, SAMPLING_RECIPES)
    check(config)
    return config
