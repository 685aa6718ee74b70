"""The revision of the running code."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

HERE = Path(__file__).parent


def git_revision(folder: Path = HERE) -> str:
    """The commit, with "-dirty" if there are uncommitted changes; "unknown" without git."""
    found = _git(folder, "describe", "--always", "--dirty", "--abbrev=40")
    return "unknown" if found is None else found.decode().strip()


def exact_revision(folder: Path = HERE) -> str:
    """Like ``git_revision``, with a digest of uncommitted changes to tell them apart."""
    revision = git_revision(folder)
    if not revision.endswith("-dirty"):
        return revision
    changes = _git(folder, "diff", "HEAD", "--binary") or b""
    return f"{revision}-{hashlib.blake2b(changes, digest_size=4).hexdigest()}"


def _git(folder: Path, *words: str) -> bytes | None:
    try:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
