"""``python -m mixgrpo export RUN_OR_CHECKPOINT --output FOLDER [--ema] [--model PATH]``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixgrpo.commands.command_line import OptionParser, carry_out, complain, home_path
from mixgrpo.files.disk import own_folder


def run(arguments: Sequence[str]) -> int:
    """Writes the model of a checkpoint; returns the exit code."""
    parser = OptionParser(
        "export", "Writes a checkpoint's trained model as a diffusers folder or a LoRA file."
    )
    parser.add_argument(
        "source",
        type=home_path,
        metavar="RUN_OR_CHECKPOINT",
        help="a run's folder, for its newest checkpoint, or a checkpoint's folder",
    )
    parser.add_argument(
        "--output",
        type=home_path,
        required=True,
        metavar="FOLDER",
        help="folder to write the model to; new or empty",
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="write the exponential moving average instead of the weights",
    )
    parser.add_argument(
        "--model",
        type=home_path,
        metavar="FOLDER",
        help="the folder of the base model, if it was moved",
    )
    try:
        given = parser.parse_args(arguments)
    except ValueError as error:
        return complain(error)
    # Imported here so that a mistyped option is reported without waiting for torch.
    from mixgrpo.checkpoint import CheckpointError

    return carry_out(
        lambda: _export(given.source, given.output, given.ema, given.model),
        (ValueError, OSError, CheckpointError),
        "empty the output folder and run the same command again",
    )


def _export(source: Path, output: Path, ema: bool, model: Path | None) -> None:
    from mixgrpo.models.export import export, find_checkpoint

    checkpoint = find_checkpoint(source)
    with own_folder(str(output), "output"):
        if any(output.iterdir()):
            raise ValueError(f"output is {str(output)!r}, which is not empty; name a new folder")
        export(checkpoint, output, "ema" if ema else "model", str(model or ""))
    print(f"{'average' if ema else 'model'} of {checkpoint}: {output}")
