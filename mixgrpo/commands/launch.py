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
from collections.abc import Sequence

from mixgrpo.commands.train import complain

COMMANDS = ("train", "evaluate")  # those that know how to share their work
PATIENCE = 900  # seconds


def run(arguments: Sequence[str]) -> int:
    """Starts the processes, waits, and returns the exit code of the first that failed."""
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import run as torchrun

    command = next((word for word in arguments if word in COMMANDS), None)
    if command is None:
        print(
            "error: no command to run; usage: python -m mixgrpo launch [--nproc_per_node N] "
            f"[torchrun's other options] {'|'.join(COMMANDS)} [options]",
            file=sys.stderr,
        )
        return 2
    parse = importlib.import_module(f"mixgrpo.commands.{command}").parse
    try:
        parse(arguments[arguments.index(command) + 1 :])  # a mistyped knob is told of once
    except (ValueError, OSError) as error:
        return complain(error)
    # torchrun takes the command for the script's name; it is the first argument of this package.
    given: argparse.Namespace = get_args_parser().parse_args(["--module", *arguments])
    given.training_script_args = [given.training_script, *given.training_script_args]
    given.training_script = "mixgrpo"
    if given.nnodes == "1:1":
        given.standalone = True  # a free port, so that two runs on one machine do not collide
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
            "so, the machine ran out of memory: lower sampling.micro_batch, update.micro_batch "
            "and sampling.decode_batch"
        )
        return complain(killed, 128 - first.exitcode)
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0
