"""Which version of the code runs."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_revision() -> str:
    """The commit, with "-dirty" after changes; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
