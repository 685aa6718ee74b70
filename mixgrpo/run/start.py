"""The beginning of a run: its folder, and what it prints before the first iteration."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from mixgrpo.config import Config
from mixgrpo.engines import Engine
from mixgrpo.files.disk import write_text_whole
from mixgrpo.files.revision import git_revision
from mixgrpo.maths.window import WindowSchedule
from mixgrpo.models import Policy
from mixgrpo.run.saving import Saving


def prepare_folder(config: Config, engine: Engine, saving: Saving) -> None:
    """Writes the resolved configuration; checks that every process sees it.

    Raises:
        CheckpointError: one does not, so that its host would write to a disk of its own.
    """
    folder = Path(config.run.folder)
    if engine.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        saved = {"revision": git_revision(), "config": asdict(config)}
        write_text_whole(folder / "config.json", json.dumps(saved, indent=1) + "\n")
        if engine.settings:
            text = json.dumps(engine.settings, indent=1)
            write_text_whole(folder / "engine.json", text + "\n")
    engine.barrier()
    saving.check_shared(folder / "config.json")


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
    ahead = [windows.at(i) for i in range(iteration, total)]
    start, stop = min(w.start for w in ahead), max(w.stop for w in ahead)
    say(
        f"iterations {iteration + 1} to {total} on {engine.world_size} x {engine.device.type}, "
        f"{trained_weights / 1e6:.2f}M trained weights; windows of {ahead[0].size} steps lie in "
        f"[{start}, {stop}) of {config.sampling.steps}; results in {folder}"
    )
