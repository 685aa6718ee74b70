"""The runs of family.py in their order, and the collection of their results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from family_members import KEY, REFERENCE, Member, Settings, members
from family_runs import SPEED_ITERATIONS, Task, at_equal_time


def speed_tasks(everyone: Sequence[Member]) -> list[Task]:
    """How long an iteration takes, of every member that is compared at equal time."""
    return [Task(member, None, (SPEED_ITERATIONS,)) for member in everyone if member.timed]


def training_tasks(
    everyone: Sequence[Member], settings: Settings, equal_time: Mapping[str, int]
) -> list[Task]:
    """All runs, the most important first: the recipes and independent noise by seed, more seeds of
    the key comparisons, the ablations by seed."""

    def task(member: Member, seed: int) -> Task:
        both = {settings.iterations, equal_time.get(member.name, settings.iterations)}
        return Task(member, seed, tuple(sorted(both)))

    main = [member for member in everyone if member.timed]
    others = [member for member in everyone if not member.timed]
    key = [member for member in main if member.name in KEY]
    return [
        *(task(member, seed) for seed in settings.seeds for member in main),
        *(task(member, seed) for seed in settings.key_seeds for member in key),
        *(task(member, seed) for seed in settings.ablation_seeds for member in others),
    ]


def equal_times(speeds: Mapping[str, float], iterations: int) -> dict[str, int]:
    """Member -> iterations in the time that the reference takes for its own."""
    budget = iterations * speeds[REFERENCE]
    return {name: at_equal_time(budget, seconds) for name, seconds in speeds.items()}


# --- collecting -----------------------------------------------------------------------------------


def read_results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))]


def read_speeds(folder: Path) -> dict[str, float]:
    """Member -> seconds per iteration, as they were measured first of all.

    Raises:
        ValueError: the reference's could not be measured.
    """
    found = [r for r in read_results(folder) if r["seed"] is None]
    speeds = {r["member"]: r["seconds_per_iteration"] for r in found if "error" not in r}
    if REFERENCE not in speeds:
        raise ValueError(
            f"nothing to report yet: the speed of {REFERENCE} is not measured; the same command "
            "goes on"
        )
    return speeds


def collect(folder: Path, settings: Settings, about: Mapping[str, Any]) -> dict[str, Any]:
    """Collects all results in the folder as one JSON object."""
    everyone = members(settings.iterations)
    speeds = read_speeds(folder)
    results = read_results(folder)
    equal_time = equal_times(speeds, settings.iterations)
    base = next(r["base"] for r in results if r["seed"] is None and r["member"] == REFERENCE)
    tasks = training_tasks(everyone, settings, equal_time)
    return {
        **about,
        "base": base,
        "members": {member.name: described(member) for member in everyone},
        "speeds": speeds,
        "budget": settings.iterations * speeds[REFERENCE],
        "equal_time": equal_time,
        "points": [r for r in results if r["seed"] is not None],
        "missing": list(_missing(tasks, folder)),
    }


def described(member: Member) -> dict[str, Any]:
    described = asdict(member)
    del described["name"]
    return described


def _missing(tasks: Iterable[Task], folder: Path) -> Iterable[str]:
    for task in tasks:
        for iterations in task.iterations:
            if not task.result(folder, iterations).exists():
                yield f"{task.member.name}, seed {task.seed}, {iterations} iterations: not run"


def keep_settings(folder: Path, settings: Settings) -> None:
    """Writes the settings into the folder, or checks that it holds the same ones.

    Raises:
        ValueError: the folder's runs were made with others.
    """
    path, mine = folder / "settings.json", asdict(settings)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(mine, indent=1) + "\n")
        return
    comparable = json.loads(json.dumps(mine))
    theirs = json.loads(path.read_text())
    may_differ = {"seeds", "key_seeds", "ablation_seeds"}
    differing = [
        f"{key} was {theirs.get(key)}, is {value}"
        for key, value in comparable.items()
        if key not in may_differ and theirs.get(key) != value
    ]
    if differing:
        raise ValueError(f"{folder} holds runs of other settings ({'; '.join(differing)}); "
                         "use the same settings, or another --folder")  # fmt: skip
