"""``python -m mixgrpo launch [torchrun's options] COMMAND [options]``: several processes at once.

It is torchrun, but an error that a process has explained is not buried under the launcher's own.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from mixgrpo.commands import COMMANDS
from mixgrpo.commands.command_line import complain

PATIENCE = 900  # seconds
USAGE = (
    "usage: python -m mixgrpo launch [--nproc_per_node N] [torchrun's other options] "
    "COMMAND [options]"
)


def run(arguments: Sequence[str]) -> int:
    """Starts the processes, waits, and returns the exit code of the first that failed."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"{USAGE}\ntorchrun --help lists torchrun's options; COMMAND --help a command's")
        return 0
    from torch.distributed.run import get_args_parser

    if not any(word in COMMANDS for word in arguments):
        words = [word for word in arguments if not word.startswith("-")]
        nearest = [n for word in words for n in difflib.get_close_matches(word, COMMANDS, n=1)]
        return _refuse("no command to run" + (f"; did you mean {nearest[0]!r}?" if nearest else ""))
    parser = get_args_parser()
    parser.error = _raise  # type: ignore[method-assign]
    try:
        # torchrun takes the command for the script's name; it is this package's first argument.
        given: argparse.Namespace = parser.parse_args(["--module", *arguments])
        _check_number(given.nproc_per_node)
    except ValueError as error:
        return _refuse(str(error))
    command = given.training_script
    parse = _parser_of(command)
    if parse is None:
        return _refuse(f"{command!r} is no command for several processes")
    try:
        parse(given.training_script_args)  # a mistyped knob is told of once
    except (ValueError, OSError) as error:
        return complain(error)
    given.training_script_args = [command, *given.training_script_args]
    given.training_script = "mixgrpo"
    if given.nnodes == "1:1":
        given.standalone = True  # a free port, so that two runs on one machine do not collide
    return _start(given)


def _start(given: argparse.Namespace) -> int:
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import run as torchrun

    # A process that was told to stop first ends what it is doing and saves; torchrun, which offers
    # no knob for it, would kill it after 30 s.
    PContext.close = functools.partialmethod(PContext.close, timeout=PATIENCE)  # type: ignore[method-assign, assignment]
    logging.disable(logging.ERROR)  # in this process alone, which only waits
    try:
        torchrun(given)
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        if first.exitcode > 0:
            return first.exitcode
        killed = RuntimeError(
            f"process {rank} was killed by {signal.Signals(-first.exitcode).name}; if nobody did "
            "so, the machine ran out of memory: start fewer processes, or lower the knobs "
            "micro_batch and decode_batch"
        )
        return complain(killed, 128 - first.exitcode)
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _parser_of(command: str) -> Callable[[Sequence[str]], object] | None:
    """What reads a command's options; only commands that have one work in several processes."""
    if command not in COMMANDS:
        return None
    return getattr(importlib.import_module(f"mixgrpo.commands.{command}"), "parse", None)


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _check_number(processes: str) -> None:
    if processes not in ("auto", "gpu", "cpu") and not (processes.isdecimal() and int(processes)):
        raise ValueError(f"--nproc_per_node is {processes!r}; it must be a number from 1 on")


def _refuse(reason: str) -> int:
    print(f"error: {reason}; {USAGE}", file=sys.stderr)
    return 2
