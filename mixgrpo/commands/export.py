"""``python -m mixgrpo export RUN_OR_CHECKPOINT --output FOLDER [--ema] [--model PATH]``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixgrpo.commands.command_line import (
    carry_out,
    complain,
    new_parser,
    no_such_knob,
    read_words,
    unknown_knob,
)
from mixgrpo.files.disk import own_folder

_OPTIONS = ("output", "ema", "model")


def run(arguments: Sequence[str]) -> int:
    """Writes the model of a checkpoint; returns the exit code."""
    parser = new_parser(
        "export", "Writes a checkpoint's trained model as a diffusers folder or a LoRA file."
    )
    parser.add_argument(
        "source",
        type=str,
        help="a run's folder, for its newest checkpoint, or a checkpoint's folder",
    )
    parser.add_argument(
        "--output", type=str, required=True, help="folder to write the model to; new or empty"
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="write the exponential moving average instead of the weights",
    )
    parser.add_argument(
        "--model",
        type=str,
        default="",
        help="the folder of the base model, if it was moved",
    )
    try:
        given = read_words(parser, arguments, _in_one_line)
    except ValueError as error:
        return complain(error)
    # Imported here so that a mistyped option is reported without waiting for torch.
    from mixgrpo.checkpoint import CheckpointError

    return carry_out(
        lambda: _export(given.source, given.output, given.ema, given.model),
        (ValueError, OSError, CheckpointError),
        "empty the output folder and run the same command again",
    )


def _export(source: str, output: str, ema: bool, model: str) -> None:
    from mixgrpo.models.export import export, find_checkpoint

    checkpoint = find_checkpoint(Path(source))
    with own_folder(output, "output"):
        if any(Path(output).iterdir()):
            raise ValueError(f"output is {output!r}, which is not empty; name a new folder")
        export(checkpoint, Path(output), "ema" if ema else "model", model)
    print(f"{'average' if ema else 'model'} of {checkpoint}: {output}")


def _in_one_line(text: str) -> str:
    option = unknown_knob(text)
    return text if option is None else no_such_knob(option, _OPTIONS)
