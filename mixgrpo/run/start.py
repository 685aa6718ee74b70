"""The beginning of a run: its folder, and what it prints before the first iteration."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from mixgrpo.config import Config
from mixgrpo.engines import Engine
from mixgrpo.files.disk import first_free
from mixgrpo.files.revision import git_revision
from mixgrpo.maths.window import WindowSchedule
from mixgrpo.models import Policy
from mixgrpo.run.saving import Saving
from mixgrpo.run.tracking import write_file

# What a run leaves beside its checkpoints and logs. If the results are missing, it did nothing.
_RESULTS = ("metrics.jsonl", "pictures", "model")
_FOLDERS = ("pictures", "model", "tensorboard")
_FILES = (
    *("metrics.jsonl", "config.json", "engine.json", "wandb_id"),
    *("report.html", "before_after.png", "rewards.png"),
)


def prepare_folder(config: Config, engine: Engine, saving: Saving) -> None:
    """Writes the resolved configuration; checks that every process sees it.

    What another run left there is first moved to a folder of its own, unless this run continues it.

    Raises:
        ValueError: something that is neither a file nor a folder, as it should be, is in the way.
        CheckpointError: a process does not see it, so that its host would write to a disk of its
            own.
    """
    folder = Path(config.run.folder)
    if engine.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _check_kinds(folder)
        if not saving.continues:
            _set_aside(folder)
        _write_json(folder / "config.json", {"revision": git_revision(), "config": asdict(config)})
        if engine.settings:
            _write_json(folder / "engine.json", engine.settings)
    engine.barrier()
    saving.check_shared(folder / "config.json")


def _check_kinds(folder: Path) -> None:
    """A run that has trained should not fail because it cannot write its results."""
    for name in (*_FILES, *_FOLDERS):
        path, kind = folder / name, "regular file" if name in _FILES else "folder"
        if path.exists() and not (path.is_file() if name in _FILES else path.is_dir()):
            raise ValueError(
                f"{path} is not a {kind}; move it away, or train in another --run.folder"
            )


def _write_json(path: Path, content: object) -> None:
    write_file(path, json.dumps(content, indent=1) + "\n")


def _set_aside(folder: Path) -> None:
    """Moves the results of a run whose checkpoints are gone, or that had none, to ``earlier_1``."""
    if not holds_results(folder):
        return
    place = first_free(folder, "earlier_{}")
    place.mkdir()
    for name in (*_FILES, *_FOLDERS):
        if (folder / name).exists():
            (folder / name).rename(place / name)
    print(
        f"warning: {folder} holds the results of a run without a checkpoint to continue from; they "
        f"are now in {place}",
        file=sys.stderr,
    )


def holds_results(folder: Path) -> bool:
    """Whether a run without a checkpoint to continue from has left results in this folder."""
    return any(map(_holds_something, (folder / name for name in _RESULTS)))


def _holds_something(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() and path.stat().st_size > 0


def warn_of_truncation(say: Callable[[str], None], policy: Policy, prompts: list[str]) -> None:
    """Warns if the text encoder cuts prompts off."""
    truncated = policy.count_truncated(prompts)
    if truncated:
        say(
            f"warning: {truncated} of {len(prompts)} training and validation prompts are longer "
            "than the text encoder takes and are truncated"
        )


def announce(
    say: Callable[[str], None],
    config: Config,
    engine: Engine,
    windows: WindowSchedule,
    trained_weights: int,
    iteration: int,
) -> None:
    """Prints what the run is about to do.

    Args:
        trained_weights: number of weights that are trained.
        iteration: number of iterations done.
    """
    folder, total = Path(config.run.folder), config.run.iterations
    if config.run.resume and iteration == 0:
        say(f"nothing to continue from in {folder}: starting at the beginning")
    if iteration >= total:
        say(f"all {total} iterations are done; results in {folder}")
        return
    guidance = config.guidance
    if guidance.update_scale not in (None, guidance.scale):
        say(
            f"warning: guidance.update_scale ({guidance.update_scale:g}) is not guidance.scale "
            f"({guidance.scale:g}), so the ratio of an unchanged policy is not 1"
        )
    ahead = [windows.at(i) for i in range(iteration, total)]
    start, stop = min(w.start for w in ahead), max(w.stop for w in ahead)
    say(
        f"iterations {iteration + 1} to {total} on {engine.world_size} x {engine.device.type}, "
        f"{trained_weights / 1e6:.2f}M trained weights; windows of {ahead[0].size} steps lie in "
        f"[{start}, {stop}) of {config.sampling.steps}; results in {folder}"
    )
