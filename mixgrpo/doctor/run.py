"""Checks of the recipe's knobs, of an earlier run in its folder, and of wandb."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mixgrpo import checkpoint as checkpoints
from mixgrpo.assembly import make_windows
from mixgrpo.checks import check
from mixgrpo.config import Config
from mixgrpo.doctor.devices import processes_here
from mixgrpo.doctor.lines import Line, error, ok, warning
from mixgrpo.files.disk import existing
from mixgrpo.planning.coverage import iterations_by_step, never_trained, visits
from mixgrpo.run.contents import contents_of
from mixgrpo.run.saving import check_same_run, checkpoints_root
from mixgrpo.run.start import holds_results

_ANOTHER = "choose another --run.folder"


def check_knobs(config: Config, processes: int) -> Iterator[Line]:
    """Reports combinations of knobs that cannot work, and steps that no window reaches."""
    count = processes or processes_here(0)
    try:
        check(config, count)
        windows = make_windows(config)
    except ValueError as caught:
        yield error("knobs", str(caught), "python -m mixgrpo train --help explains every knob")
        return
    yield ok("knobs", f"consistent, for {count} process{'es' if count > 1 else ''}")
    done = visits(windows, config.run.iterations)
    missed = never_trained(windows, iterations_by_step(done, config.sampling.steps))
    if missed:
        yield warning(
            "knobs",
            f"{len(missed)} of {config.sampling.steps} steps are never trained",
            "run python -m mixgrpo schedule with the same knobs to see which",
        )


def check_folder(config: Config, processes: int) -> Iterator[Line]:
    """Checks that the folder is unused, or holds a run that can continue with these knobs."""
    folder = config.run.folder
    try:
        wanted = config.run.resume_from if config.run.resume else "latest"
        saved = checkpoints.find(checkpoints_root(config), wanted)
    except (checkpoints.CheckpointError, OSError) as caught:
        yield error("folder", str(caught), _ANOTHER)
        return
    if saved is None:
        yield from _without_checkpoint(config)
        return
    try:
        done = _resumable(saved, config)
    except (ValueError, OSError, checkpoints.CheckpointError) as caught:
        yield error("folder", f"{folder} holds a run that cannot continue: {caught}", _ANOTHER)
        return
    text = f"{folder} holds a run of {done} iterations that can continue to {config.run.iterations}"
    if config.run.resume:
        yield ok("folder", text)
    else:
        yield error("folder", text, f"--run.resume true, or {_ANOTHER}")


def _without_checkpoint(config: Config) -> Iterator[Line]:
    folder = Path(config.run.folder)
    above = existing(folder)
    if not above.is_dir() or not os.access(above, os.W_OK):
        yield error("folder", f"{folder} cannot be created or written: {above} is not a folder "
                    "that this user can write to", _ANOTHER)  # fmt: skip
    elif holds_results(folder):
        yield warning(
            "folder",
            f"{folder} holds the results of a run without a checkpoint, which will be moved to a "
            "folder earlier_N in it",
            _ANOTHER,
        )
    else:
        yield ok("folder", f"{folder} is unused")


def _resumable(checkpoint: Path, config: Config) -> int:
    """Completed iterations. Raises ValueError or CheckpointError if the run cannot continue."""
    position = checkpoints.open_saved(checkpoint).position
    check_same_run(position, config, contents_of(config))
    if position.iteration > config.run.iterations:
        raise ValueError(
            f"it has {position.iteration} iterations, more than run.iterations "
            f"({config.run.iterations})"
        )
    return position.iteration


def check_wandb(config: Config, processes: int) -> Iterator[Line]:
    """Reports whether a key is set, never its value."""
    there = bool(os.environ.get("WANDB_API_KEY", "").strip())
    mode = config.log.wandb
    if mode == "online" and not there:
        yield warning(
            "wandb",
            "log.wandb is online, but WANDB_API_KEY is not set",
            "export WANDB_API_KEY, or --log.wandb offline",
        )
        return
    used = mode if mode != "auto" else ("online" if there else "not used")
    key = "WANDB_API_KEY is set" if there else "WANDB_API_KEY is not set"
    yield ok("wandb", f"{used}; {key}")
