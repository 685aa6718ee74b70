"""Checks for problems that would stop a run, before it starts. Loads and writes nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

from mixgrpo.config import Config
from mixgrpo.doctor.lines import SETUP, Line, error, warning
from mixgrpo.files.messages import in_one_line

Check = Callable[[Config, int], Iterable[Line]]

# Subject -> the check's function. Each is imported on its own, so that a missing package disables
# only the checks that need it.
ENVIRONMENT = {
    "python": "mixgrpo.doctor.environment:check_python",
    "packages": "mixgrpo.doctor.environment:check_packages",
}
OF_THE_RUN = {
    "devices": "mixgrpo.doctor.devices:check_devices",
    "knobs": "mixgrpo.doctor.run:check_knobs",
    "model": "mixgrpo.doctor.model:check_model",
    "rewards": "mixgrpo.doctor.rewards:check_rewards",
    "prompts": "mixgrpo.doctor.prompts:check_prompts",
    "text": "mixgrpo.doctor.prompts:check_text",
    "memory": "mixgrpo.doctor.room:check_memory",
    "disk": "mixgrpo.doctor.room:check_disk",
    "folder": "mixgrpo.doctor.run:check_folder",
    "wandb": "mixgrpo.doctor.run:check_wandb",
}


def examine(config: Config, processes: int, checks: dict[str, str]) -> Iterable[Line]:
    """Yields the lines of every check as they become available. Never raises.

    Args:
        processes: number of processes of the run on all its machines together; 0 for one per GPU
            of this machine.
    """
    for subject, place in checks.items():
        yield from guarded(subject, place, config, processes)


def guarded(subject: str, place: str, config: Config, processes: int) -> list[Line]:
    """The lines of the check at ``module:function``; if the check fails, a line that reports it."""
    module, _, function = place.partition(":")
    try:
        check: Check = getattr(importlib.import_module(module), function)
        return list(check(config, processes))
    except ImportError as caught:
        return [
            error(subject, f"could not be checked: {in_one_line(caught, with_kind=True)}", SETUP)
        ]
    except Exception as caught:  # whatever happened, the other checks continue
        remedy = "the other checks are still valid; please report this failure"
        return [
            warning(
                subject, f"the check itself failed: {in_one_line(caught, with_kind=True)}", remedy
            )
        ]
