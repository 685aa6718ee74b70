"""``python -m mixgrpo train --recipe NAME [--section.knob VALUE ...]``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mixgrpo.checks import check_values
from mixgrpo.commands.command_line import carry_out, complain, show_help
from mixgrpo.commands.knobs import set_knobs
from mixgrpo.config import RECIPES, Config
from mixgrpo.files.pointer import named_by


def run(arguments: Sequence[str]) -> int:
    """Trains; returns the exit code."""
    try:
        config = parse(arguments)
    except (ValueError, OSError) as error:
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
    return carry_out(
        partial(train, config), expected, partial(how_to_continue, config), config.run.grace
    )


def how_to_continue(config: Config) -> str:
    """Says what has been saved of a run, and how to continue it."""
    newest = named_by(Path(config.run.folder) / "checkpoints" / "latest")
    if newest is None:
        return "nothing has been saved; run the same command to begin again"
    return f"the newest checkpoint is {newest}; continue with --run.resume true"


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that a command line gives: defaults < recipe < overrides.

    Raises:
        OSError: the recipe does not exist or cannot be read.
        ValueError: a knob is unknown or has a wrong value, or the recipe is not valid.
    """
    show_help(
        "train",
        "Fine-tunes a flow-matching model with MixGRPO.",
        Config,
        arguments,
        recipes="scripts/recipes",
    )
    config = Config()
    set_knobs(config, arguments, RECIPES)
    check_values(config)
    return config
