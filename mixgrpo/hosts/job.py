"""What a host is told of a job: one file, for its owner's eyes, read once.

It holds the environment, keys among it, and the command's words. Neither is seen in a list of
processes on the way, and no shell can change them.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

MARK = "MIXGRPO_NODE"  # in the environment of every process that a node started


@dataclass(frozen=True)
class Node:
    """One host's part of a job.

    Attributes:
        job: identifier of the job.
        attempt: counted from 0; a restart is another attempt.
        hosts: names of all hosts; the first is where they meet.
        rank: this host's place among them.
        slots: processes here; None for one on each GPU, or one on the CPU.
        port: on the first host, for torchrun's store; the next one is for the hosts' link.
        program: the module to run, with ``words``.
        environment: what its processes get beside this machine's own.
        folder: where they work.
        grace: seconds to save and end in, when asked to.
        lost_after: seconds without an answer after which a host is lost.
        join_within: seconds in which all hosts must have met.
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
    """Where a host finds its part; ``%h`` for the host lets pdsh put in its name."""
    return f"/tmp/mixgrpo-{job}-{host}.json"


def take(path: Path) -> Node:
    """Reads a host's part, and deletes the file.

    Raises:
        FileNotFoundError: it is not there.
        PermissionError: others could read or have written it.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(handle) as file:
            status = os.fstat(handle)
            if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
                raise PermissionError(f"{path} is not this user's alone; it is not used")
            return Node(**json.load(file))
    finally:
        path.unlink(missing_ok=True)
