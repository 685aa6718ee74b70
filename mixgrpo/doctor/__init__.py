"""Looks for what would stop a run, before it starts. Nothing is loaded, nothing is written."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

from mixgrpo.config import Config
from mixgrpo.doctor.lines import SETUP, Line, error, warning

Check = Callable[[Config, int], Iterable[Line]]

# Subject -> the function that looks. Imported one by one: a missing package costs its checks alone.
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
    """The lines of every check, one after the other as they are made. Raises nothing.

    Args:
        processes: of the run, on all its machines together; 0 for one on each GPU of this machine.
    """
    for subject, place in checks.items():
        yield from guarded(subject, place, config, processes)


def guarded(subject: str, place: str, config: Config, processes: int) -> list[Line]:
    """What the check at ``module:function`` says; if it breaks, a line that says so."""
    module, _, function = place.partition(":")
    try:
        check: Check = getattr(importlib.import_module(module), function)
        return list(check(config, processes))
    except ImportError as caught:
        return [error(subject, f"could not be looked at: {_reason(caught)}", SETUP)]
    except Exception as caught:  # whatever it is, the other checks go on
        remedy = "the other checks count; please report this one"
        return [warning(subject, f"the check itself broke: {_reason(caught)}", remedy)]


def _reason(caught: Exception) -> str:
    said = " ".join(str(caught).split())
    return f"{type(caught).__name__}: {said}" if said else type(caught).__name__
