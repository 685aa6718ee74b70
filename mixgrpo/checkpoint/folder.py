"""The folder of a run's checkpoints: names, ``latest``, and which checkpoints are kept."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mixgrpo.files.disk import PARTIAL, flush
from mixgrpo.files.pointer import is_plain_name, read_pointer

_PREFIX = "iteration_"
_NOT_OURS = (-1, 0)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what to do."""


def latest(root: Path) -> Path | None:
    """The checkpoint that ``latest`` names; None if nothing has been saved.

    Raises:
        CheckpointError: ``latest`` names no checkpoint beside it, or is missing although there are
            checkpoints.
    """
    pointer = root / "latest"
    if os.path.lexists(root) and not root.is_dir():  # a link, too, whose file system is missing
        raise CheckpointError(
            f"{root} is not a folder that exists; mount what it leads to, move it away, or use "
            "another --run.folder"
        )
    try:
        name = read_pointer(pointer)
    except (FileNotFoundError, NotADirectoryError):
        names = _names(root)
        if not names:
            return None
        fault = f"{pointer} is missing, although there are checkpoints such as {names[-1]}"
    except (OSError, ValueError) as error:
        fault = f"{pointer} cannot be read ({error})"
    else:
        if is_plain_name(name) and _order(name) > _NOT_OURS and (root / name).is_dir():
            return root / name
        fault = f"{pointer} names {name[:80]!r}, which is not a checkpoint beside it"
    raise CheckpointError(
        f"{fault}; continue from the newest undamaged checkpoint with --run.resume true "
        "--run.resume_from undamaged, or train in another --run.folder"
    )


def newest_first(root: Path) -> list[Path]:
    """The checkpoints from the one that ``latest`` names to the oldest; all if it names none.

    Iterations after ``latest`` were saved before the run went back to an older checkpoint.
    """
    paths = [root / name for name in reversed(_names(root))]
    try:
        newest = latest(root)
    except CheckpointError:
        if not paths:
            raise
        return paths
    return [path for path in paths if not newest or _order(path.name) <= _order(newest.name)]


def make_partial(root: Path, iteration: int) -> Path:
    """Creates an empty folder for a new checkpoint; removes what interrupted saves left behind."""
    root.mkdir(parents=True, exist_ok=True)
    for abandoned in root.glob(f"{PARTIAL}*"):
        shutil.rmtree(abandoned)
    partial = root / f"{PARTIAL}{_free_name(root, iteration)}"
    partial.mkdir()
    return partial


def final_path(partial: Path) -> Path:
    """The checkpoint's path once it is complete."""
    return partial.with_name(partial.name.removeprefix(PARTIAL))


def publish(partial: Path, keep: int) -> None:
    """Renames a complete checkpoint, points ``latest`` to it, and removes all but ``keep``."""
    final = final_path(partial)
    partial.rename(final)
    flush(final.parent)
    _point(final.parent, final.name)
    _drop_old(final.parent, final.name, keep)


def _point(root: Path, name: str) -> None:
    pointer = root / "latest.partial"
    pointer.write_text(name + "\n", encoding="utf-8")
    flush(pointer)
    os.replace(pointer, root / "latest")
    flush(root)


def _free_name(root: Path, iteration: int) -> str:
    """A free name for the iteration: a run that went back may save an iteration again, and keeps
    the first checkpoint until the new one is complete."""
    times = [time for number, time in map(_order, _names(root)) if number == iteration]
    again = f"_{max(times) + 1}" if times else ""
    return f"{_PREFIX}{iteration:08d}{again}"


def _names(root: Path) -> list[str]:
    names = (path.name for path in root.glob(f"{_PREFIX}*"))
    return sorted((name for name in names if _order(name) > _NOT_OURS), key=_order)


def _order(name: str) -> tuple[int, int]:
    """(iteration, how many times it has been saved)."""
    numbers = name.removeprefix(_PREFIX).split("_")
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        return _NOT_OURS
    return (int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 1)


def _drop_old(root: Path, newest: str, keep: int) -> None:
    """Keeps the ``keep`` newest checkpoints up to ``newest``, one per iteration.

    Later iterations, saved before the run went back, are kept until they are saved again.
    """
    iteration, _ = _order(newest)
    upto = [name for name in _names(root) if _order(name) <= _order(newest)]
    others = [name for name in upto if _order(name)[0] != iteration]
    replaced = [name for name in upto if _order(name)[0] == iteration and name != newest]
    too_many = others[: len(others) - (keep - 1)] if keep and len(others) > keep - 1 else []
    for name in replaced + too_many:
        shutil.rmtree(root / name, ignore_errors=True)
