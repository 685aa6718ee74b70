"""``python -m mixgrpo launch [torchrun's options] COMMAND [options]``: several processes at once.

It is torchrun, but an error that a process has explained is not buried under the launcher's own.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import signal
import sys
from collections.abc import Callable, Sequence

from mixgrpo.commands import COMMANDS
from mixgrpo.commands.command_line import complain

PATIENCE = 900  # seconds


def run(arguments: Sequence[str]) -> int:
    """Starts the processes, waits, and returns the exit code of the first that failed."""
    from torch.distributed.run import get_args_parser

    if not any(word in COMMANDS for word in arguments):
        return _refuse("no command to run")
    # torchrun takes the command for the script's name; it is this package's first argument.
    given: argparse.Namespace = get_args_parser().parse_args(["--module", *arguments])
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


def _refuse(reason: str) -> int:
    print(
        f"error: {reason}; usage: python -m mixgrpo launch [--nproc_per_node N] "
        "[torchrun's other options] COMMAND [options]",
        file=sys.stderr,
    )
    return 2
