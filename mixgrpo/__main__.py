"""``python -m mixgrpo COMMAND``."""

from __future__ import annotations

import os
import sys
import traceback

# Before torch is imported: where several processes share the cores, OpenMP threads that wait must
# sleep, because spinning ones take the cores from the other processes' threads, and two processes
# on two cores become many times slower. One process alone is faster with threads that spin.
if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from mixgrpo.commands import main


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
