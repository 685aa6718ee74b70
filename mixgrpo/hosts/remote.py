"""Reaching hosts: by pdsh for what runs on all of them, by ssh for a word to one.

Nothing secret is in a command line: what a host is told goes through ssh's standard input.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from mixgrpo.hosts.job import Node, node_file

CONNECT_WITHIN = 10  # seconds
ROOT = Path(__file__).parent.parent.parent
Result = TypeVar("Result")


class Unreachable(ConnectionError):
    """ssh could not do what it should on a host; says what it said."""


def check_tools() -> None:
    """Raises FileNotFoundError if this machine lacks a program that reaches the others."""
    for program, package in (("pdsh", "pdsh"), ("ssh", "openssh-client")):
        if shutil.which(program) is None:
            raise FileNotFoundError(
                f"there is no {program} on this machine, by which the hosts are reached; install "
                f"it (Debian, Ubuntu: apt install {package}), or give a hostfile with localhost "
                "alone"
            )


def ssh_options(lost_after: int) -> list[str]:
    """No questions; an end within ``lost_after`` seconds where the other side is silent."""
    third = max(1, lost_after // 3)
    given = ("BatchMode=yes", f"ServerAliveInterval={third}", "ServerAliveCountMax=3")
    own = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    return [*own, *(word for option in given for word in ("-o", option))]


def pdsh_command(hosts: Sequence[str], job: str) -> list[str]:
    """What starts every host's part: the same words for all, in which ``%h`` is the host."""
    script = ROOT_COMMAND.replace("%", "%%") + f" -m mixgrpo.hosts.node {node_file(job, '%h')}"
    all_at_once = ["-f", str(len(hosts))]
    return [
        *("pdsh", "-S", "-b", "-R", "ssh", "-t", str(CONNECT_WITHIN), *all_at_once),
        *("-w", ",".join(hosts), script),
    ]


def pdsh_environment(lost_after: int) -> dict[str, str]:
    """This process's, with ssh's options for pdsh."""
    return {**os.environ, "PDSH_SSH_ARGS_APPEND": shlex.join(ssh_options(lost_after))}


ROOT_COMMAND = f"cd {shlex.quote(str(ROOT))} && exec {shlex.quote(sys.executable)}"


def on_host(host: str, script: str, text: str = "", timeout: float = 60) -> str:
    """What a shell script on a host prints; ``text`` is its standard input.

    Raises:
        Unreachable: ssh or the script failed; with the last line that was said.
    """
    options = ["-o", f"ConnectTimeout={CONNECT_WITHIN}", *ssh_options(30)]
    try:
        done = subprocess.run(
            ["ssh", *options, "--", host, f"sh -c {shlex.quote(script)}"],
            input=text,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"no answer within {timeout:.0f} s") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Unreachable(said[-1])
    return done.stdout


def deliver(node: Node) -> None:
    """Puts a host's part where it will look for it, readable by its owner alone.

    Raises:
        Unreachable: see ``on_host``.
    """
    path = node_file(node.job, node.host)
    # "set -C" makes the file anew or fails, so that nobody can have put another one there.
    on_host(node.host, f"umask 077 && rm -f {path} && set -C && cat >{path}", node.to_json())


def withdraw(job: str, host: str) -> None:
    """Removes what ``deliver`` put there, if it was not taken."""
    on_host(host, f"rm -f {node_file(job, host)}")


def on_all(hosts: Sequence[str], do: Callable[[str], Result]) -> dict[str, Result | Unreachable]:
    """``do(host)`` for all hosts at once: what it gave, or why it failed."""

    def attempt(host: str) -> Result | Unreachable:
        try:
            return do(host)
        except Unreachable as error:
            return error

    with ThreadPoolExecutor(max(1, len(hosts))) as threads:
        return dict(zip(hosts, threads.map(attempt, hosts), strict=True))
