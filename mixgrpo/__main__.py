"""``python -m mixgrpo COMMAND``."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType

from mixgrpo.commands import main
from mixgrpo.commands.before_torch import prepare
from mixgrpo.commands.output import make_lenient, what_is_lost

prepare()


def run() -> int:
    """The command's exit code; of several processes, one that fails says which it is."""
    if "RANK" not in os.environ:
        return main()
    try:
        return main()
    except Exception:
        # In one piece, and before anything that waits: the others' complaints come behind it.
        sys.stderr.write(f"error (rank {os.environ['RANK']}):\n{traceback.format_exc()}")
        return 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    # As Ctrl-C. By default, SIGTERM would not end the first process of a container.
    signal.signal(signal.SIGTERM, _interrupt)
    make_lenient()
    code = run()
    if (lost := what_is_lost()) and code == 0:
        sys.stderr.write(f"error: standard output could not be written ({lost}); free some space\n")
        code = 1
    if code > 128:  # it ends; the same signal passed on by another process changes nothing
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "torch" in sys.modules:
        from mixgrpo.engines.distributed import leave

        leave(code)
    sys.exit(code)
