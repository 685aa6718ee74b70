"""Reads a run's folder, whether the run has finished, was interrupted, or is damaged."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixgrpo.config import ValidationConfig, dotted
from mixgrpo.files.json_files import is_number, read_json
from mixgrpo.files.json_lines import read_records
from mixgrpo.files.named_paths import check_distinct_names, split_name
from mixgrpo.text.prompts import read_prompts

OF_A_RUN = ("config.json", "metrics.jsonl", "pictures")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """The images of one validation.

    Attributes:
        iteration: number of iterations before it.
        pictures: index among the validation prompts -> file, which may be damaged.
        prompts: prompts by index; empty if unknown.
        scores: reward -> scores by index, None where there is no score; may be empty.
    """

    iteration: int
    pictures: dict[int, Path]
    prompts: tuple[str, ...]
    scores: dict[str, tuple[float | None, ...]]


@dataclass(frozen=True)
class Run:
    """What is known about a run.

    Attributes:
        name: name that distinguishes it from other runs.
        folder: the run's folder.
        records: records of ``metrics.jsonl``, by iteration.
        config: dotted path of each knob -> value; empty if unknown.
        revision: revision of the code; empty if unknown.
        stages: validations, by iteration.
        missing: one sentence for each thing that is missing.
    """

    name: str
    folder: Path
    records: tuple[Record, ...]
    config: dict[str, Any]
    revision: str
    stages: tuple[Stage, ...]
    missing: tuple[str, ...]

    @property
    def done(self) -> int:
        """Number of iterations on record."""
        return max((record["iteration"] for record in self.records), default=0)

    @property
    def planned(self) -> int | None:
        """Number of iterations that the configuration asks for."""
        asked = self.config.get("run.iterations")
        return asked if isinstance(asked, int) else None

    @property
    def patience(self) -> int:
        """Number of consecutive validations that lead to a warning of reward hacking."""
        knob = self.config.get("validation.patience")
        return knob if isinstance(knob, int) else ValidationConfig.patience

    @property
    def keys(self) -> set[str]:
        """Names of all metrics."""
        return {key for record in self.records for key in record} - {"iteration"}

    @property
    def weights(self) -> dict[str, float]:
        """Reward -> weight, 0 for held-out rewards; all equal if the configuration is unknown."""
        known = {
            key.removeprefix("rewards.").removesuffix(".weight"): value
            for key, value in self.config.items()
            if key.startswith("rewards.") and key.endswith(".weight") and is_number(value)
        }
        logged = {
            key.split("/", 1)[1]
            for key in self.keys
            if key.startswith(("reward/", "validation/", "validation_ema/"))
        }
        more = sorted(logged - set(known))
        return known | {name: float(f"reward/{name}" in self.keys) for name in more}


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """The runs that a command line names, each ``FOLDER`` or ``NAME=FOLDER``.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: a folder is not that of a run, or two runs have the same name.
    """
    runs = []
    for argument in arguments:
        name, folder = split_name(argument)
        if not os.path.isdir(folder):  # also for a name that is too long
            raise FileNotFoundError(
                f"there is no folder {str(folder)!r}; give the --run.folder of a training run"
            )
        runs.append(read_run(folder, name))
    check_distinct_names((run.name, run.folder) for run in runs)
    return runs


def read_run(folder: Path, name: str = "") -> Run:
    """Reads everything that a report needs; ``name`` defaults to the folder's name.

    Raises:
        ValueError: the folder is not that of a run.
    """
    if not any((folder / each).exists() for each in OF_A_RUN):
        raise ValueError(
            f"{folder} is not the folder of a run: it holds none of {', '.join(OF_A_RUN)}; give "
            "the --run.folder of a training run"
        )
    missing: list[str] = []
    config, revision = _read_config(folder / "config.json", missing)
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        records=_read_records(folder / "metrics.jsonl", missing),
        config=config,
        revision=revision,
        stages=_read_stages(folder / "pictures", config, missing),
        missing=tuple(missing),
    )


def _read_config(path: Path, missing: list[str]) -> tuple[dict[str, Any], str]:
    saved = _read_object(path, "the configuration is unknown", missing)
    config = saved.get("config")
    if not isinstance(config, dict):
        if saved:
            missing.append(f"{path.name} has no `config`: the configuration is unknown")
        return {}, ""
    return dotted(config), str(saved.get("revision") or "")


def _read_object(path: Path, consequence: str, missing: list[str]) -> dict[str, Any]:
    """A JSON file's object; if it cannot be read, an empty one and an entry in ``missing``."""
    try:
        content = read_json(path)
    except FileNotFoundError:
        missing.append(f"there is no {path.name}: {consequence}")
        return {}
    except (OSError, ValueError) as error:
        reason = str(error).removeprefix(f"{path} ")
        missing.append(f"{path.name} cannot be read ({reason}): {consequence}")
        return {}
    if not isinstance(content, dict):
        missing.append(f"{path.name} is not a JSON object: {consequence}")
        return {}
    return content


def _read_records(path: Path, missing: list[str]) -> tuple[Record, ...]:
    try:
        found = read_records(path)
    except (OSError, ValueError) as error:
        reason = str(error).removeprefix(f"{path} ")
        missing.append(f"{path.name} cannot be read ({reason}): no curves")
        return ()
    if not path.exists():
        missing.append(f"there is no {path.name}: no curves")
        return ()
    if found.torn:
        missing.append(f"the last line of {path.name} is incomplete and is ignored")
    if found.damaged:
        missing.append(
            f"{len(found.damaged)} of {found.lines} lines of {path.name} are not whole records; "
            f"what can be read of them is shown, the first of them is line {found.damaged[0]}"
        )
    if not found.records:
        missing.append(f"{path.name} has no records yet: no curves")
    return tuple(sorted(map(_numbers, found.records), key=lambda record: record["iteration"]))


def _numbers(record: Record) -> Record:
    return {key: value for key, value in record.items() if value is not None}


def _read_stages(folder: Path, config: Record, missing: list[str]) -> tuple[Stage, ...]:
    prompts = _prompts(config)
    stages = []
    for place in sorted(folder.glob("iteration_*")):
        number = place.name.removeprefix("iteration_")
        pictures = {int(f.stem): f for f in sorted(place.glob("*.png")) if f.stem.isdecimal()}
        if number.isdecimal() and pictures:
            stages.append(_read_stage(int(number), place, pictures, prompts))
    stages.sort(key=lambda stage: stage.iteration)
    if not stages:
        if config.get("validation.pictures") != 0:
            missing.append("there are no validation images")
        return ()
    without = [stage.iteration for stage in stages if not stage.scores]
    if without:
        missing.append(
            "no scores are stored with the images of "
            f"iteration{'s' * (len(without) > 1)} {', '.join(map(str, without))}"
        )
    return tuple(stages)


def _read_stage(
    iteration: int, folder: Path, pictures: dict[int, Path], prompts: tuple[str, ...]
) -> Stage:
    kept = _read_object(folder / "scores.json", "", [])
    own, scores = kept.get("prompts"), kept.get("scores")
    return Stage(
        iteration=iteration,
        pictures=pictures,
        prompts=tuple(map(str, own)) if isinstance(own, list) else prompts,
        scores={
            str(name): tuple(value if is_number(value) else None for value in values)
            for name, values in (scores if isinstance(scores, dict) else {}).items()
            if isinstance(values, list)
        },
    )


def _prompts(config: Record) -> tuple[str, ...]:
    """The prompts of the file that the configuration names; empty if it cannot be read."""
    knob = "validation.prompts_file"
    try:
        return tuple(read_prompts(str(config.get(knob, "")), knob).texts)
    except (OSError, ValueError):
        return ()
