"""``python -m mixgrpo hosts [options] COMMAND [options]``: runs a command on a hostfile's hosts.

``python -m mixgrpo hosts check`` compares the hosts instead.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import secrets
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from time import strftime

from mixgrpo.commands import launch
from mixgrpo.commands.command_line import (
    OptionParser,
    complain,
    grace_of,
    home_path,
    whole_number,
)
from mixgrpo.config import Config, flatten
from mixgrpo.files.pointer import named_by
from mixgrpo.hosts.check import ask, complaints, data_paths, table
from mixgrpo.hosts.environment import forwarded, read_settings
from mixgrpo.hosts.hostfile import Host, is_this_machine, read_hostfile
from mixgrpo.hosts.job import Node
from mixgrpo.hosts.node import processes_here
from mixgrpo.hosts.remote import ROOT, check_tools
from mixgrpo.hosts.supervise import Job, Supervisor
from mixgrpo.run.guard import stops

JOIN_WITHIN = 120  # seconds


def run(arguments: Sequence[str]) -> int:
    """Runs a command on all hosts, or on this machine if the hostfile names no other."""
    if list(arguments[:1]) in (["-h"], ["--help"]):
        _parser().print_help()
        return 0
    try:
        given, words = _parser().parse_known_args(list(arguments))
        hosts = read_hostfile(given.hostfile)
        if words[:1] == ["check"]:
            return _check(hosts, given, words[1:])
        if words[:1] in ([], ["launch"], ["hosts"]):
            raise ValueError("no command to run on the hosts is given; give one, such as train")
        config = launch.parse_command(words)  # reports a mistyped knob before any host starts
        _check_folder(config)
        if is_this_machine(hosts):
            return _run_here(hosts[0], given, words, config)
        check_tools()
        job = _job(hosts, given, words, config)
    except (ValueError, OSError) as error:
        return complain(error)
    return _supervise(job)


def _run_here(host: Host, given: argparse.Namespace, words: list[str], config: object) -> int:
    """Runs the command on this machine, without pdsh but with the same restarts."""
    start = ["--nproc_per_node", str(_slots(host) or processes_here())]
    has_progress, again = _restarts(words, config)
    for attempt in range(given.max_restarts + 1):
        code = launch.run([*start, *(again() if attempt else words)])
        if code in (0, *launch.STOPPED) or not has_progress() or attempt == given.max_restarts:
            break
        print(f"restart {attempt + 1} of {given.max_restarts}", flush=True)
    return code


def _supervise(job: Job) -> int:
    supervisor = Supervisor(job, lambda line: print(line, flush=True))
    signals = stops()
    before = [signal.signal(s, lambda asked, frame: supervisor.stop(asked)) for s in signals]
    try:
        return supervisor.run()
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _parser() -> OptionParser:
    parser = OptionParser(  # an option that is not spelled out belongs to the command
        "hosts",
        "Runs COMMAND on every host of a hostfile, using pdsh.",
        add_help=False,  # --help after the command belongs to the command
        usage="%(prog)s [options] COMMAND [options of COMMAND]",
    )
    parser.add_argument(
        "--hostfile",
        type=home_path,
        default=ROOT / "hosts" / "hostfile",
        help="file with one host per line: NAME or NAME slots=N",
    )
    parser.add_argument(
        "--settings",
        type=home_path,
        default=ROOT / "hosts" / "nccl.env",
        help="file of NAME=VALUE lines, which are set in every host's environment",
    )
    parser.add_argument(
        "--max-restarts",
        type=whole_number(0, 1_000_000),
        default=3,
        help="maximum number of restarts after a failure; the run restarts only if it has saved a "
        "checkpoint since it started or a host was lost",
    )
    parser.add_argument(
        "--lost-after",
        type=whole_number(3, 1_000_000),
        default=30,
        help="seconds without an answer after which a host counts as lost",
    )
    parser.add_argument(
        "--wait",
        type=whole_number(0, 10_000_000),
        default=1800,
        help="seconds to wait for a lost host before a restart",
    )
    return parser


def _job(hosts: list[Host], given: argparse.Namespace, words: list[str], config: object) -> Job:
    own = Path("logs") / strftime(f"{words[0]}-%Y%m%d-%H%M%S")
    has_progress, again = _restarts(words, config)
    return Job(
        nodes=_nodes(hosts, given, "mixgrpo", words, grace_of(config)),
        logs=Path(config.run.folder) / "logs" if isinstance(config, Config) else own,
        max_restarts=given.max_restarts,
        wait=given.wait,
        is_worth_restarting=has_progress,
        again=again,
    )


def _restarts(
    words: list[str], config: object
) -> tuple[Callable[[], bool], Callable[[], list[str]]]:
    """Two functions: whether a restart may help after a failure, and the words of a restart."""
    if not isinstance(config, Config):
        return lambda: False, lambda: words
    pointer = Path(config.run.folder) / "checkpoints" / "latest"
    begun = _content(pointer)

    def again() -> list[str]:
        # A run that goes back to an older checkpoint does so only once.
        on = ["--run.resume_from", "latest"] if _content(pointer) != begun else []
        return [*words, "--run.resume", "true", *on]

    return _progress(pointer), again


def _check_folder(config: object) -> None:
    if not isinstance(config, Config) or config.run.resume:
        return
    # Checked here and not in the first attempt, since the next attempt would resume that run.
    saved = Path(config.run.folder) / "checkpoints"
    if (saved / "latest").exists() or any(saved.glob("iteration_*")):
        raise ValueError(
            f"{config.run.folder!r} already contains a run; continue it with --run.resume true, or "
            "choose another --run.folder"
        )


def _progress(pointer: Path) -> Callable[[], bool]:
    """Returns a function that reports whether the file names another iteration than at its last
    call: restarting does not help a run that keeps failing before its next checkpoint."""
    before = _iteration(pointer)

    def ask() -> bool:
        nonlocal before
        last, before = before, _iteration(pointer)
        return before != last

    return ask


def _iteration(pointer: Path) -> str:
    """The iteration without the save counter, since a failing run saves where it fails."""
    return "_".join(_content(pointer).split("_")[:2])


def _content(pointer: Path) -> str:
    """The name that the file holds; empty if it cannot be used, which the run itself reports."""
    found = named_by(pointer)
    return found.name if found else ""


def _slots(host: Host) -> int | None:
    wanted = os.environ.get("PROCESSES") or "0"
    if not re.fullmatch("[0-9]{1,4}", wanted):
        raise ValueError(
            f"PROCESSES is {wanted!r}; it must be the number of processes to start on each host"
        )
    return int(wanted) or host.slots


def _nodes(
    hosts: list[Host], given: argparse.Namespace, program: str, words: list[str], grace: int
) -> list[Node]:
    """Each host's part of the job."""
    environment = forwarded(os.environ, read_settings(given.settings))
    job, port = secrets.token_hex(8), 2 * random.randrange(10_000, 14_000)  # below ephemeral ports
    return [
        Node(
            job=job,
            attempt=0,
            hosts=[host.name for host in hosts],
            rank=rank,
            slots=_slots(host),
            port=port,
            program=program,
            words=words,
            environment=environment,
            folder=os.getcwd(),
            grace=grace,
            lost_after=given.lost_after,
            join_within=JOIN_WITHIN,
        )
        for rank, host in enumerate(hosts)
    ]


def _check(hosts: list[Host], given: argparse.Namespace, words: list[str]) -> int:
    """Compares the hosts; returns 0 if there is no problem."""
    if is_this_machine(hosts):
        print(f"{given.hostfile} names only this machine, so there is nothing to compare")
        return 0
    config = launch.parse_command(["train", *words])
    check_tools()
    paths = data_paths(flatten(config), Path.cwd())
    reports = ask([host.name for host in hosts], os.getcwd(), paths)
    print(table(reports), flush=True)
    found = list(complaints(reports, paths))
    if all(report.facts is not None for report in reports.values()) and len(hosts) > 1:
        found += _try_all_reduce(hosts, given)
    print("\n".join(found) if found else f"{len(hosts)} hosts, no differences")
    return 1 if found else 0


def _try_all_reduce(hosts: list[Host], given: argparse.Namespace) -> list[str]:
    nodes = _nodes(hosts, given, "mixgrpo.hosts.allreduce", [], grace=1)
    logs = Path("logs") / strftime("check-%Y%m%d-%H%M%S")
    if _supervise(Job(nodes, logs, 0, 0, is_worth_restarting=lambda: False, again=lambda: [])) == 0:
        return []
    return [
        "all hosts: the all-reduce failed (see above); open the ports between the hosts, and set "
        f"their network interface in {given.settings}"
    ]
