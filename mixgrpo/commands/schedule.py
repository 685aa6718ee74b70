"""``python -m mixgrpo schedule --recipe NAME [--section.knob VALUE ...] [--output FILE.png]``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mixgrpo.commands.command_line import carry_out, complain, take_option
from mixgrpo.commands.train import parse
from mixgrpo.config import Config
from mixgrpo.files.home import expand_home

_USAGE = """\
usage: python -m mixgrpo schedule --recipe NAME [--section.knob VALUE ...] [--output FILE.png]
Shows which denoising steps a recipe's windows train, how often, and how many model evaluations
the run makes. Loads nothing. The knobs are those of `python -m mixgrpo train --help`.
  --output FILE  also plot the schedule to a .png, .svg or .pdf file"""


def run(arguments: Sequence[str]) -> int:
    """Prints and plots the schedule; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(_USAGE)
        return 0
    try:
        output, words = take_option(arguments, "--output")
        output = None if output is None else expand_home(output)
        if output is not None and Path(output).suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--output is {output!r}; name a .png, .svg or .pdf file")
        config = parse(words)
    except (ValueError, OSError) as error:
        return complain(error)
    return carry_out(partial(_show, config, output), (ValueError, OSError), "nothing was changed")


def _show(config: Config, output: str | None) -> None:
    from mixgrpo.assembly import make_negative
    from mixgrpo.checks import check
    from mixgrpo.files.disk import check_replaceable
    from mixgrpo.planning.coverage_report import Coverage, report, save_picture

    check(config, None)
    make_negative(config)  # says what is wrong with the guidance
    if output is not None:
        check_replaceable(Path(output))
    coverage = Coverage(config)
    print(report(coverage))
    if output is not None:
        save_picture(coverage, Path(output))
        print(f"plot: {output}")
