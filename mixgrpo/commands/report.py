"""``python -m mixgrpo report RUN [RUN ...] [--output FILE]``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mixgrpo.commands.command_line import OptionParser, carry_out, complain, home_path


def run(arguments: Sequence[str]) -> int:
    """Writes the report; returns the exit code."""
    try:
        folders, output = parse(arguments)
    except ValueError as error:
        return complain(error)
    return carry_out(partial(_write, folders, output), (ValueError, OSError), "nothing was written")


def parse(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The runs' folders, and the file to write if one is named.

    Raises:
        ValueError: an option is unknown, or no run is named.
    """
    parser = OptionParser("report", "Writes the curves, images and knobs of runs to one HTML file.")
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="the --run.folder of a training run, finished or not; NAME=FOLDER gives it a name",
    )
    parser.add_argument(
        "--output",
        type=home_path,
        metavar="FILE",
        help="file to write (default: report.html in the run's folder, or in the current folder "
        "for several runs)",
    )
    given = parser.parse_args(arguments)
    return given.runs, given.output


def _write(folders: Sequence[str], output: Path | None) -> None:
    # Imported here so that a mistyped option is reported without waiting for torch.
    from mixgrpo.files.disk import check_replaceable
    from mixgrpo.report.page import write_report
    from mixgrpo.report.runs import read_runs

    runs = read_runs(folders)
    place = runs[0].folder if len(runs) == 1 else Path()
    file = output or place / "report.html"
    check_replaceable(file)
    print(f"report: {write_report(runs, file)}")
