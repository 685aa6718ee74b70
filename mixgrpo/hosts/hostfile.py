"""The hostfile: which machines a run uses, and how many processes run on each."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LOCAL = ("localhost", "127.0.0.1")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Host:
    """A machine of a run.

    Attributes:
        name: name by which ssh reaches it.
        slots: number of processes on it; None for one per GPU, or one on the CPU.
    """

    name: str
    slots: int | None = None


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file, in its order; the processes connect to the first one.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is neither ``NAME`` nor ``NAME slots=N``, a name occurs twice, there is
            no host, or localhost is listed with other hosts.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no hostfile {path}; write one with one host per line, localhost for this "
            "machine"
        )
    hosts = list(_hosts(path))
    names = [host.name for host in hosts]
    if not hosts:
        raise ValueError(f"{path} names no host; write one per line, localhost for this machine")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{path} names {name} {names.count(name)} times; write it once, with slots=N for "
                "N processes"
            )
        if name in LOCAL and len(names) > 1:
            raise ValueError(
                f"{path} names {name} together with other hosts, on each of which it means that "
                "host itself; write the name by which the others reach this machine"
            )
    return hosts


def is_this_machine(hosts: Sequence[Host]) -> bool:
    """Whether the only host is this machine, which needs no ssh."""
    own = socket.gethostname()
    names = {*LOCAL, own, own.split(".")[0], socket.getfqdn()}
    return len(hosts) == 1 and hosts[0].name in names


def _hosts(path: Path) -> Iterator[Host]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        name, *settings = words
        slots = [word.removeprefix("slots=") for word in settings]
        is_counted = all(
            word.startswith("slots=") and count.isdecimal() and int(count)
            for word, count in zip(settings, slots, strict=True)
        )
        if not _NAME.fullmatch(name) or len(settings) > 1 or not is_counted:
            raise ValueError(
                f"{path}, line {number} is not a host; write NAME, or NAME slots=N with N at "
                "least 1 (user names and ports belong in ~/.ssh/config)"
            )
        yield Host(name, int(slots[0]) if slots else None)
