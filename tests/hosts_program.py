"""What a host runs in the tests of running hosts: no torch, and ends as it is told."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def main(folder: Path, *behaviours: str) -> int:
    """``RANK:ATTEMPT:BEHAVIOUR``, for a host's place and attempt: ``fail``, ``stay``, ``unsaved``,
    ``deaf``.

    A host that stays saves when it is asked to end, an unsaved one tries, a deaf one does not hear;
    others end well.
    """
    rank = os.environ["RANK"]
    attempt = str(len(list(folder.glob(f"started_{rank}_*"))))
    told = [b.split(":")[2] for b in behaviours if b.split(":")[:2] == [rank, attempt]]
    if "deaf" in told:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "stay" in told:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(_save(folder, rank)))
    if "unsaved" in told:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(_fail()))
    print(f"words {' | '.join(behaviours)}, key {len(os.environ.get('WANDB_API_KEY', ''))}")
    # Whoever sees the file may read it, and may send a signal.
    (folder / f"starting_{rank}").write_text(str(os.getpid()))
    (folder / f"starting_{rank}").rename(folder / f"started_{rank}_{attempt}")
    if "fail" in told:
        return _fail()
    if {"stay", "unsaved", "deaf"} & set(told):
        time.sleep(600)
    return 0


def _fail() -> int:
    print("error: out of luck")
    return 3


def _save(folder: Path, rank: str) -> int:
    time.sleep(0.5)
    (folder / f"saved_{rank}").touch()
    print("saved")
    return 143


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
