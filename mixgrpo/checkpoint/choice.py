"""Chooses and verifies the checkpoint from which a run continues."""

from __future__ import annotations

import sys
from pathlib import Path

from mixgrpo.checkpoint.folder import CheckpointError, latest, newest_first
from mixgrpo.checkpoint.manifest import MANIFEST, Damaged, Saved, open_saved, verify
from mixgrpo.engines.distributed import Process, gather_objects
from mixgrpo.files.pointer import is_plain_name


def choose(process: Process, root: Path, wanted: str) -> Saved | None:
    """The checkpoint to continue from, verified by all processes; None if there is none.

    Args:
        wanted: ``latest``; ``undamaged``, the newest undamaged checkpoint, with a warning for each
            damaged one that is skipped; or the name of a folder.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    path, complaint = None, None
    try:
        path = find(root, wanted)
    except CheckpointError as error:
        complaint = error
    _check_same(process, root, complaint or path)
    if complaint is not None:
        raise complaint
    if path is None:
        return None
    if wanted == "undamaged":
        return _newest_undamaged(process, root)
    try:
        return open_verified(process, path)
    except Damaged as error:
        older = [other.name for other in newest_first(root) if other != path]
        there = f"older ones: {', '.join(older)}" if older else "there is no older one"
        raise Damaged(
            f"{error}; --run.resume_from undamaged continues from the newest checkpoint that is "
            f"not damaged ({there})"
        ) from error


def _check_same(process: Process, root: Path, found: Path | CheckpointError | None) -> None:
    """Raises CheckpointError on every process if the processes see different checkpoints."""
    seen = gather_objects(process, str(found))
    for rank, other in enumerate(seen):
        if other != seen[0]:
            raise CheckpointError(
                f"process 0 finds {seen[0]} in {root}, but process {rank} finds {other}: "
                "run.folder must be on a file system that all hosts share"
            )


def find(root: Path, wanted: str) -> Path | None:
    """Like ``choose``, but opens nothing: for ``undamaged``, returns the first candidate.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    if wanted == "undamaged":
        return next(iter(newest_first(root)), None)
    return latest(root) if wanted == "latest" else _named(root, wanted)


def open_verified(process: Process, path: Path) -> Saved:
    """Opens a checkpoint; each process verifies an equal share of its files.

    Raises:
        Damaged: on every process.
    """
    saved, complaint = None, None
    try:
        saved = open_saved(path)
        verify(saved, sorted(saved.files)[process.rank :: process.world_size])
    except Damaged as error:
        complaint = error
    complaints = [found for found in gather_objects(process, complaint) if found is not None]
    if complaints:
        raise complaints[0]
    assert saved is not None
    return saved


def _newest_undamaged(process: Process, root: Path) -> Saved | None:
    paths = newest_first(root)
    for path in paths:
        try:
            return open_verified(process, path)
        except Damaged as error:
            if process.rank == 0:
                print(f"warning: {error}; it is skipped", file=sys.stderr)
    if paths:
        raise CheckpointError(
            f"every checkpoint in {root} is damaged; train in another --run.folder"
        )
    return None


def _named(root: Path, name: str) -> Path:
    path = root / name
    if not is_plain_name(name) or not (path / MANIFEST).is_file():
        there = ", ".join(other.name for other in newest_first(root)) or "none"
        raise CheckpointError(
            f"run.resume_from is {name!r}, which is not a checkpoint in {root} (found: {there}); "
            "set it to one of them, latest, or undamaged"
        )
    return path
