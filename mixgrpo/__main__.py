"""``python -m mixgrpo COMMAND``."""

from __future__ import annotations

import os
import sys
import traceback

from mixgrpo.commands import main
from mixgrpo.commands.before_torch import prepare

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


if __name__ == "__main__":
    code = run()
    if "torch" in sys.modules and "RANK" in os.environ:
        from mixgrpo.engines.distributed import leave

        leave(code)
    sys.exit(code)
