"""One host's part in a SLURM job: ``srun python -m mixgrpo.hosts.slurm COMMAND [options]``.

SLURM starts this once on every host, passes the environment, and stops it; everything else works as
with pdsh. MIXGRPO_HOSTS names the hosts, in SLURM's order.
"""

from __future__ import annotations

import os
import queue
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mixgrpo.hosts.environment import read_settings
from mixgrpo.hosts.job import Node
from mixgrpo.hosts.node import Event, listen_to_signals, run
from mixgrpo.hosts.remote import ROOT

GRACE = 900  # seconds; an upper bound, since SLURM's KillWait or --signal decides
LOST_AFTER = 30  # seconds
JOIN_WITHIN = 300  # seconds


def main(words: Sequence[str]) -> int:
    """Runs this host's part; returns the exit code."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    listen_to_signals(events)
    try:
        node = node_of(os.environ, words)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run(node, events)


def node_of(environment: Mapping[str, str], words: Sequence[str]) -> Node:
    """This host's part, read from SLURM's environment variables.

    Raises:
        ValueError: a variable is missing, or the number of hosts differs from SLURM's nodes.
    """
    names = ("MIXGRPO_HOSTS", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODEID", "SLURM_NNODES")
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} not set; submit scripts/finetune/finetune_flux_mixgrpo.slurm "
            "with sbatch, which sets them"
        )
    hosts = environment["MIXGRPO_HOSTS"].split(",")
    if len(hosts) != int(environment["SLURM_NNODES"]):
        raise ValueError(
            f"MIXGRPO_HOSTS names {len(hosts)} hosts, but SLURM has "
            f"{environment['SLURM_NNODES']}; set it from `scontrol show hostnames`, and start one "
            "task on each node"
        )
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    settings = read_settings(ROOT / "hosts" / "nccl.env")
    return Node(
        job=str(job),
        attempt=step,
        hosts=hosts,
        rank=int(environment["SLURM_NODEID"]),
        slots=int(environment.get("PROCESSES") or 0) or None,
        port=20_000 + 2 * ((7 * job + step) % 4000),  # differs between jobs and steps
        program="mixgrpo",
        words=list(words),
        environment={k: v for k, v in settings.items() if k not in environment},
        folder=str(Path.cwd()),
        grace=GRACE,
        lost_after=LOST_AFTER,
        join_within=JOIN_WITHIN,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
