"""``python -m mixgrpo doctor --recipe NAME [--section.knob VALUE ...] [--processes N]``."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Sequence

from mixgrpo.config import Config
from mixgrpo.doctor import ENVIRONMENT, OF_THE_RUN, examine
from mixgrpo.doctor.lines import Line, exit_code, render

_USAGE = """\
usage: python -m mixgrpo doctor --recipe NAME [--section.knob VALUE ...] [--processes N]
Looks for problems that would stop a run, before it starts. Loads no weights and writes nothing.
The exit code is 1 if there is an error. The knobs are those of `python -m mixgrpo train --help`.
  --processes N  processes of the run, on all machines together (default: one per GPU)"""


def run(arguments: Sequence[str]) -> int:
    """Prints one line per finding; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(_USAGE)
        return 0
    logging.disable(logging.WARNING)  # libraries warn of random weights, which are intended here
    try:
        found = _told(examine(Config(), 0, ENVIRONMENT))
        config, processes = _parsed(arguments)
        found += _told(examine(config, processes, OF_THE_RUN))
    except ImportError as caught:
        print(f"error: the recipe cannot be read: {caught}; run bash env_setup.sh", file=sys.stderr)
        return 1
    except (ValueError, OSError) as caught:
        print(f"error: {caught}", file=sys.stderr)
        return 1
    finally:
        logging.disable(logging.NOTSET)
    counts = {level: sum(line.level == level for line in found) for level in ("error", "warning")}
    print(f"{counts['error']} errors, {counts['warning']} warnings")
    return exit_code(found)


def _told(lines: Iterable[Line]) -> list[Line]:
    """Prints the lines as they come, since some checks take seconds."""
    found = []
    for line in lines:
        print(render([line]), flush=True)
        found.append(line)
    return found


def _parsed(arguments: Sequence[str]) -> tuple[Config, int]:
    # Imported here because the packages that these modules import may be missing.
    from mixgrpo.commands.command_line import take_option
    from mixgrpo.commands.train import parse
    from mixgrpo.files.messages import shortened

    processes, words = take_option(arguments, "--processes")
    if processes is not None and not re.fullmatch("[1-9][0-9]{0,5}", processes):
        raise ValueError(
            f"--processes is {shortened(processes)!r}; it must be a positive whole number below "
            "1000000"
        )
    return parse(words), int(processes or 0)
