"""Runs commands on hosts: with pdsh on all of them, with ssh on a single one.

Command lines contain no secrets: data for a host is sent through ssh's standard input.
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
    """An ssh command on a host failed; the message is its last line of output."""


def check_tools() -> None:
    """Raises FileNotFoundError if this machine lacks a program needed to reach the hosts."""
    for program, package in (("pdsh", "pdsh"), ("ssh", "openssh-client")):
        if shutil.which(program) is None:
            raise FileNotFoundError(
                f"there is no {program} on this machine, which is needed to reach the hosts; "
                f"install it (Debian, Ubuntu: apt install {package}), or use a hostfile with only "
                "localhost"
            )


def ssh_options(lost_after: int) -> list[str]:
    """Options for no prompts and a disconnect after ``lost_after`` seconds without an answer."""
    third = max(1, lost_after // 3)
    given = ("BatchMode=yes", f"ServerAliveInterval={third}", "ServerAliveCountMax=3")
    own = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    return [*own, *(word for option in given for word in ("-o", option))]


def pdsh_command(hosts: Sequence[str], job: str) -> list[str]:
    """The command that starts every host's part; pdsh replaces ``%h`` with the host's name."""
    script = ROOT_COMMAND.replace("%", "%%") + f" -m mixgrpo.hosts.node {node_file(job, '%h')}"
    all_at_once = ["-f", str(len(hosts))]
    return [
        *("pdsh", "-S", "-b", "-R", "ssh", "-t", str(CONNECT_WITHIN), *all_at_once),
        *("-w", ",".join(hosts), script),
    ]


def pdsh_environment(lost_after: int) -> dict[str, str]:
    """This process's environment, with the ssh options for pdsh."""
    return {**os.environ, "PDSH_SSH_ARGS_APPEND": shlex.join(ssh_options(lost_after))}


ROOT_COMMAND = f"cd {shlex.quote(str(ROOT))} && exec {shlex.quote(sys.executable)}"


def on_host(host: str, script: str, text: str = "", timeout: float = 60) -> str:
    """Runs a shell script on a host and returns its output; ``text`` is its standard input.

    Raises:
        Unreachable: ssh or the script failed; the message is its last line of error output.
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
    """Writes a host's part to the file where the host expects it, readable only by its owner.

    Raises:
        Unreachable: see ``on_host``.
    """
    path = node_file(node.job, node.host)
    # With "set -C", creating the file fails if another user has put one there.
    on_host(node.host, f"umask 077 && rm -f {path} && set -C && cat >{path}", node.to_json())


def withdraw(job: str, host: str) -> None:
    """Removes the file that ``deliver`` wrote, if the host has not read it."""
    on_host(host, f"rm -f {node_file(job, host)}")


def on_all(hosts: Sequence[str], do: Callable[[str], Result]) -> dict[str, Result | Unreachable]:
    """Calls ``do(host)`` for all hosts in parallel; returns each result or the failure."""

    def attempt(host: str) -> Result | Unreachable:
        try:
            return do(host)
        except Unreachable as error:
            return error

    with ThreadPoolExecutor(max(1, len(hosts))) as threads:
        return dict(zip(hosts, threads.map(attempt, hosts), strict=True))
