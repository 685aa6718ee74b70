"""One host's part of a job, passed to the host in a file that only its owner can read.

The file is read once. It holds the environment, including keys, and the command's words, which
therefore never appear in a process list and are not interpreted by a shell.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

MARK = "MIXGRPO_NODE"  # set in the environment of every process that a node starts
PARENT = "MIXGRPO_PARENT"  # number of the process without which the one that it starts must end


@dataclass(frozen=True)
class Node:
    """One host's part of a job.

    Attributes:
        job: identifier of the job.
        attempt: counted from 0; each restart is a new attempt.
        hosts: names of all hosts; the others connect to the first.
        rank: this host's index among them.
        slots: number of processes on this host; None for one per GPU, or one on the CPU.
        port: port on the first host for torchrun's store; the next port is for the hosts' link.
        program: the module to run, with ``words``.
        environment: variables of its processes in addition to this machine's environment.
        folder: working directory of the processes.
        grace: seconds allowed for saving and exiting when the job is stopped.
        lost_after: seconds without an answer after which a host counts as lost.
        join_within: seconds within which all hosts must have connected.
    """

    job: str
    attempt: int
    hosts: list[str]
    rank: int
    slots: int | None
    port: int
    program: str
    words: list[str]
    environment: dict[str, str]
    folder: str
    grace: int
    lost_after: int
    join_within: int

    @property
    def host(self) -> str:
        return self.hosts[self.rank]

    @property
    def mark(self) -> str:
        """The value of ``MARK``."""
        return f"{self.job}/{self.host}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def node_file(job: str, host: str) -> str:
    """Path of the file with a host's part; with ``%h`` as the host, pdsh inserts its name."""
    return f"/tmp/mixgrpo-{job}-{host}.json"


def take(path: Path) -> Node:
    """Reads a host's part, and deletes the file.

    Raises:
        FileNotFoundError: the file does not exist.
        PermissionError: other users can read or write it.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(handle, encoding="utf-8") as file:
            status = os.fstat(handle)
            if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
                raise PermissionError(
                    f"{path} is not used: it must belong to this user and be accessible to no other"
                )
            return Node(**json.load(file))
    finally:
        path.unlink(missing_ok=True)
