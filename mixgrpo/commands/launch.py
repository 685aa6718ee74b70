"""``python -m mixgrpo launch [torchrun's options] COMMAND [options]``: runs several processes.

It calls torchrun, but an error that a process has reported is not buried under torchrun's own.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import re
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

from mixgrpo.commands import COMMANDS
from mixgrpo.commands.command_line import complain, shortened
from mixgrpo.config import Config

GRACE = 900  # seconds for saving and exiting, for commands without run.grace
FAILED_PATIENCE = 10  # seconds that the other processes get once one has failed
MOST_PROCESSES = 1024  # on one machine; none has as many GPUs
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
USAGE = (
    "usage: python -m mixgrpo launch [--nproc_per_node N] [torchrun's other options] "
    "COMMAND [options]"
)


def run(arguments: Sequence[str]) -> int:
    """Starts the processes, waits, and returns the exit code of the first that failed."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(
            f"{USAGE}\ntorchrun --help lists torchrun's options; COMMAND --help lists those of a "
            "command"
        )
        return 0
    from torch.distributed.run import get_args_parser

    if not any(word in COMMANDS for word in arguments):
        words = [word for word in arguments if not word.startswith("-")]
        nearest = [n for word in words for n in difflib.get_close_matches(word, COMMANDS, n=1)]
        return _refuse("no command to run" + (f"; did you mean {nearest[0]!r}?" if nearest else ""))
    parser = get_args_parser()
    parser.error = _raise  # type: ignore[method-assign]
    try:
        # torchrun reads the command as the script's name; it is this package's first argument.
        given: argparse.Namespace = parser.parse_args(["--module", *arguments])
        _check_number(given.nproc_per_node)
    except ValueError as error:
        return _refuse(str(error))
    words = [given.training_script, *given.training_script_args]
    if _parser_of(words[0]) is None:
        return _refuse(f"{words[0]!r} does not run in several processes")
    try:
        config = parse_command(words)  # reports a mistyped knob once, not in every process
    except (ValueError, OSError) as error:
        return complain(error)
    given.training_script_args = words
    given.training_script = "mixgrpo"
    if given.nnodes == "1:1":
        given.standalone = True  # a free port, so that two runs on one machine do not collide
    return _start(given, grace_of(config))


def parse_command(words: Sequence[str]) -> object:
    """The configuration that a command reads from its words.

    Raises:
        ValueError: the command does not run in several processes, or a knob is wrong.
        OSError: a file that the words name does not exist.
    """
    parse = _parser_of(words[0])
    if parse is None:
        raise ValueError(f"{words[0]!r} does not run in several processes")
    return parse(words[1:])


def grace_of(config: object) -> int:
    """Seconds that a command has for saving and exiting when it is stopped."""
    return config.run.grace if isinstance(config, Config) else GRACE


def _start(given: argparse.Namespace, grace: int) -> int:
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import run as torchrun

    PContext.close = _closing(PContext.close, grace)  # type: ignore[method-assign]
    api._terminate_process_handler = _heeded_once(api._terminate_process_handler)
    logging.disable(logging.ERROR)  # only in this process, which does nothing but wait
    try:
        torchrun(given)
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        if first.exitcode > 0:
            return first.exitcode
        killed = RuntimeError(
            f"process {rank} was killed by {signal.Signals(-first.exitcode).name}; unless someone "
            "killed it, the machine ran out of memory: start fewer processes, or lower the knobs "
            "micro_batch and decode_batch"
        )
        return complain(killed, 128 - first.exitcode)
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _closing(close: Callable[..., None], grace: int) -> Callable[..., None]:
    """Wraps torchrun's method that ends processes, to set timeouts that torchrun does not expose.

    Processes that are asked to stop need time to finish their work and save. If one has failed,
    the others would wait for it in vain.
    """

    def closing(
        context: Any, death_sig: signal.Signals | None = None, timeout: int = grace
    ) -> None:
        failures = getattr(context, "_failures", {}).values()
        if any(failure.exitcode not in STOPPED for failure in failures):
            timeout = FAILED_PATIENCE
        close(context, death_sig, timeout)

    return closing


def _heeded_once(handler: Callable[..., None]) -> Callable[..., None]:
    """Wraps a signal handler so that only the first signal takes effect: SLURM signals every
    process of a job, and each passes the signal on. A second one would end the launcher while it
    waits for its processes to save."""
    is_heeded = False

    def once(number: int, frame: FrameType | None) -> None:
        nonlocal is_heeded
        if not is_heeded:
            is_heeded = True
            handler(number, frame)

    return once


def _parser_of(command: str) -> Callable[[Sequence[str]], object] | None:
    """The function that parses a command's options; only commands with one can be launched."""
    if command not in COMMANDS:
        return None
    return getattr(importlib.import_module(f"mixgrpo.commands.{command}"), "parse", None)


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _check_number(processes: str) -> None:
    if processes in ("auto", "gpu", "cpu"):
        return
    if not re.fullmatch("[1-9][0-9]*", processes):
        raise ValueError(
            f"--nproc_per_node is {shortened(processes)!r}; it must be a positive whole number"
        )
    if len(processes) > 4 or int(processes) > MOST_PROCESSES:
        raise ValueError(
            f"--nproc_per_node is {shortened(processes)}; it must be at most {MOST_PROCESSES}, the "
            "processes of one machine"
        )


def _refuse(reason: str) -> int:
    print(f"error: {reason}; {USAGE}", file=sys.stderr)
    return 2
