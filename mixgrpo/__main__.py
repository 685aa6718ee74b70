"""``python -m mixgrpo COMMAND``."""

from __future__ import annotations

import os
import sys

# Before torch is imported: threads that wait must sleep. Spinning ones take the cores from other
# processes' threads, and two processes on two cores become many times slower than one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from mixgrpo.commands import main

if __name__ == "__main__":
    code = main()
    if "torch" in sys.modules and "RANK" in os.environ:
        from mixgrpo.distributed import leave

        leave(code)
    sys.exit(code)
