"""``python -m mixgrpo launch [torchrun's options] COMMAND [options]``: runs several processes.

It calls torchrun, but an error that a process has reported is not buried under torchrun's own.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

from mixgrpo.commands import COMMANDS
from mixgrpo.commands.command_line import complain, grace_of
from mixgrpo.files.messages import shortened
from mixgrpo.hosts.job import PARENT
from mixgrpo.run.guard import Guard, speak, stops

FAILED_PATIENCE = 10  # seconds that the other processes get once one has failed
LATE = 3  # seconds beyond the processes' own time, in which they say where they hang
FIRST_WORD = 10  # seconds of waiting for other hosts until it is reported
PER_CORE = 16  # processes at most: each takes some hundred MB before it does anything
STOPPED = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
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
        _check_hosts(given)
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
    return _start(given, grace_of(config), lambda: _left(words[0], config))


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


def _left(command: str, config: object) -> str:
    """What the command says of what it has saved, and of how to continue."""
    module = importlib.import_module(f"mixgrpo.commands.{command}")
    tell = getattr(module, "how_to_continue", lambda config: "run the same command again")
    return tell(config)


def _start(given: argparse.Namespace, grace: int, left: Callable[[], str]) -> int:
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import run as torchrun

    guard = _LaunchGuard(grace, left)
    PContext.start = _noted(PContext.start, guard)  # type: ignore[method-assign]
    PContext.close = _closing(PContext.close, grace + LATE)  # type: ignore[method-assign]
    handler = _heeded_once(api._terminate_process_handler)
    api._terminate_process_handler = handler
    given.signals_to_handle = ",".join(number.name for number in (*stops(), signal.SIGQUIT))
    logging.disable(logging.ERROR)  # only in this process, which does nothing but wait
    before = {number: signal.signal(number, handler) for number in stops()}
    try:
        with guard:
            os.environ[PARENT] = str(os.getpid())  # for the processes that it starts
            _report_waiting(given, guard.has_started)
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
    except (ValueError, AssertionError) as error:  # an option that torchrun refuses
        return _refuse(" ".join(str(error).split()))
    except (DistError, RendezvousError, OSError) as error:
        return complain(_not_met(given, error))
    finally:
        os.environ.pop(PARENT, None)
        for number, previous in before.items():
            signal.signal(number, previous)
    return 0


class _LaunchGuard(Guard):
    """Ends the processes together with this one."""

    def __init__(self, grace: int, left: Callable[[], str]) -> None:
        super().__init__(grace + 2 * LATE, left)
        self.has_started = threading.Event()
        self.context: Any = None

    def first(self) -> None:
        if not self.has_started.is_set():  # torch waits for the other hosts, deaf to signals
            assert self.asked is not None
            speak(f"error: stopped by {signal.Signals(self.asked).name} before the command started")
            os._exit(128 + self.asked)

    def second(self) -> NoReturn:
        self._kill()
        super().second()

    def end_late(self) -> NoReturn:
        self._kill()
        super().end_late()

    def _kill(self) -> None:
        for handler in getattr(self.context, "subprocess_handlers", {}).values():
            if handler.proc.returncode is None:
                with suppress(OSError):
                    os.killpg(handler.proc.pid, signal.SIGKILL)  # each has a session of its own


def _noted(start: Callable[..., None], guard: _LaunchGuard) -> Callable[..., None]:
    """Wraps torchrun's method that starts processes, so that the guard knows of them."""

    def starting(context: Any) -> None:
        guard.context = context
        guard.has_started.set()
        start(context)

    return starting


def _report_waiting(given: argparse.Namespace, has_started: threading.Event) -> None:
    """Reports, from a thread, that the other hosts have not come; each time after a longer wait."""
    if given.standalone:
        return

    def report() -> None:
        waited, pause = 0, FIRST_WORD
        while not has_started.wait(pause):
            waited, pause = waited + pause, 2 * (waited + pause)
            speak(f"after {waited} s, still waiting for the others of {_meeting(given)}")

    threading.Thread(target=report, daemon=True).start()


def _meeting(given: argparse.Namespace) -> str:
    static = given.rdzv_backend == "static" and not given.rdzv_endpoint
    where = f"{given.master_addr}:{given.master_port}" if static else given.rdzv_endpoint
    how = (
        f"this one has --node_rank {given.node_rank}; start the same command on each host, with "
        "its own --node_rank and the first host's --master_addr"
        if given.rdzv_backend == "static"
        else "start the same command on each host, with the same --rdzv_endpoint"
    )
    return f"{given.nnodes.rpartition(':')[2]} hosts, which meet at {where}; {how}"


def _not_met(given: argparse.Namespace, error: Exception) -> Exception:
    """The error to report when the hosts could not meet."""
    text = " ".join((str(error).splitlines() or [type(error).__name__])[0].split())
    if "EADDRINUSE" in text:
        return OSError(
            f"port {given.master_port} of this host is in use by another program; choose another "
            "--master_port, the same on all hosts"
        )
    return ConnectionError(f"lost the others of {_meeting(given)} ({text})")


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
    if not re.fullmatch("[1-9][0-9]{0,18}", processes):
        raise ValueError(
            f"--nproc_per_node is {shortened(processes)!r}; it must be a positive whole number"
        )
    import torch

    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    most, there = (
        (gpus, f"{gpus} GPUs") if gpus else (PER_CORE * cores, f"{cores} cores and no GPU")
    )
    if int(processes) > most:
        raise ValueError(
            f"--nproc_per_node is {processes}, but this host has {there}; start at most {most} "
            "processes" + (", or set CUDA_VISIBLE_DEVICES= to run on the CPU" if gpus else "")
        )


def _check_hosts(given: argparse.Namespace) -> None:
    """Checks the options about hosts; on a single one, lets torchrun choose a free port, so that
    two runs on one machine do not collide."""
    numbers = re.fullmatch(r"(?:([0-9]+):)?([0-9]+)", given.nnodes)
    if numbers is None or not 0 < int(numbers[1] or numbers[2]) <= int(numbers[2]):
        raise ValueError(
            f"--nnodes is {given.nnodes!r}; it must be the number of hosts, or MIN:MAX"
        )
    hosts = int(numbers[2])
    if hosts == 1:
        given.standalone = True
    elif given.standalone:
        raise ValueError(f"--standalone is for one host, but --nnodes is {given.nnodes}; leave one")
    elif not 0 <= given.node_rank < hosts:
        raise ValueError(
            f"--node_rank is {given.node_rank}, but --nnodes is {given.nnodes}; it must be from 0 "
            f"to {hosts - 1}"
        )
    if not 0 < given.master_port < 1 << 16:
        raise ValueError(f"--master_port is {given.master_port}; it must be from 1 to 65535")


def _refuse(reason: str) -> int:
    print(f"error: {reason}; {USAGE}", file=sys.stderr)
    return 2
