"""The validation images of a report: over training, and the best, worst and most improved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixgrpo.evaluation.gallery import ALL, mean_z, thumbnail
from mixgrpo.evaluation.pictures import Unreadable
from mixgrpo.report.runs import Run, Stage

STAGES = 12  # maximum number of validations shown per run
PROMPTS = 16  # maximum number of prompts shown over training
RANKED = 48  # maximum number of prompts ranked as best, worst and most improved
PICKS = 4  # prompts shown of each kind


@dataclass(frozen=True)
class Album:
    """Images of all runs, ready for the page.

    Attributes:
        prompts: the prompts of all runs, each once.
        runs: for each run, iteration -> index into ``prompts`` -> image as a data URI, or None if
            its file is damaged.
        scores: for each run, iteration -> index -> reward -> score.
        shown: for each run, the indices that are shown over training.
        picks: for each run, measure -> ``best``, ``worst``, ``improved`` -> indices.
        faults: for each run, one sentence for each problem.
    """

    prompts: list[str] = field(default_factory=list)
    runs: list[dict[int, dict[int, str | None]]] = field(default_factory=list)
    scores: list[dict[int, dict[int, dict[str, float]]]] = field(default_factory=list)
    shown: list[list[int]] = field(default_factory=list)
    picks: list[dict[str, dict[str, list[int]]]] = field(default_factory=list)
    faults: list[list[str]] = field(default_factory=list)


def make_album(runs: Sequence[Run]) -> Album:
    """Reads the images and makes thumbnails. A prompt has the same index in all runs."""
    album = Album()
    known: dict[tuple[str, int], int] = {}
    for run in runs:
        places = _places(run, known, album.prompts)
        _add(album, run, places)
    return album


def _places(run: Run, known: dict[tuple[str, int], int], prompts: list[str]) -> dict[int, int]:
    """Index among the run's prompts -> index among all; new prompts are added to ``prompts``.

    Repeated prompts are distinguished by their occurrence.
    """
    # Prompts saved with the images are correct even if the prompts file has changed since.
    kept = [stage.prompts for stage in run.stages if stage.scores]
    texts = max(kept or [stage.prompts for stage in run.stages], key=len, default=())
    count = max((max(stage.pictures) + 1 for stage in run.stages), default=0)
    own: dict[int, int] = {}
    seen: dict[str, int] = {}
    for place in range(min(count, RANKED)):
        text = texts[place] if place < len(texts) else f"image {place}"
        seen[text] = seen.get(text, 0) + 1
        key = text, seen[text]
        if key not in known:
            known[key] = len(prompts)
            prompts.append(text)
        own[place] = known[key]
    return own


def _add(album: Album, run: Run, places: Mapping[int, int]) -> None:
    pictures: dict[int, dict[int, str | None]] = {}
    scores: dict[int, dict[int, dict[str, float]]] = {}
    faults: list[str] = []
    shown = spread(run.stages, STAGES)
    for stage in shown:
        is_an_end = stage in (shown[0], shown[-1])
        kept = {own: p for own, p in places.items() if is_an_end or own < PROMPTS}
        pictures[stage.iteration] = {
            place: _small(stage.pictures[own], faults)
            for own, place in kept.items()
            if own in stage.pictures
        }
        scores[stage.iteration] = {place: _scores(stage, own) for own, place in kept.items()}
    lacking = [stage.iteration for stage in shown if len(stage.pictures) < _most(run.stages)]
    if lacking:
        faults.append(f"images are missing at iteration {', '.join(map(str, lacking))}")
    if len(shown) < len(run.stages):
        faults.append(f"the images of {len(shown)} of {len(run.stages)} validations are shown")
    album.runs.append(pictures)
    album.scores.append(scores)
    album.shown.append([place for own, place in places.items() if own < PROMPTS])
    album.picks.append(picks(scores))
    album.faults.append(faults)


def _most(stages: Iterable[Stage]) -> int:
    return max(len(stage.pictures) for stage in stages)


def _small(file: Path, faults: list[str]) -> str | None:
    try:
        return thumbnail(file)[0]
    except Unreadable as error:
        faults.append(f"{file.parent.name}/{file.name} cannot be read as an image: {error}")
        return None


def _scores(stage: Stage, place: int) -> dict[str, float]:
    values = {n: own[place] for n, own in stage.scores.items() if place < len(own)}
    return {name: float(f"{value:.6g}") for name, value in values.items() if value is not None}


def spread(stages: Sequence[Stage], count: int) -> list[Stage]:
    """At most ``count`` evenly spaced stages, including the first and the last."""
    if len(stages) <= count:
        return list(stages)
    last = len(stages) - 1
    return [stages[round(place * last / (count - 1))] for place in range(count)]


def picks(
    scores: Mapping[int, Mapping[int, Mapping[str, float]]],
) -> dict[str, dict[str, list[int]]]:
    """Measure -> the best and worst indices of the last validation, and the most improved ones.

    The measures are the mean z-score of all rewards, then each reward. An image has improved if its
    score is higher than at the first validation.

    Args:
        scores: iteration -> index -> reward -> score.
    """
    ends = {"first": scores[min(scores)], "last": scores[max(scores)]} if scores else {}
    names = list(dict.fromkeys(n for end in ends.values() for own in end.values() for n in own))
    by_reward = {
        name: {
            when: {(place, 0): own.get(name, math.nan) for place, own in end.items()}
            for when, end in ends.items()
        }
        for name in names
    }
    measures: dict[str, Any] = {ALL: mean_z(by_reward), **by_reward} if names else {}
    return {name: _picked(values["first"], values["last"]) for name, values in measures.items()}


def _picked(first: Mapping[Any, float], last: Mapping[Any, float]) -> dict[str, list[int]]:
    level = {key[0]: value for key, value in last.items() if not math.isnan(value)}
    gain = {key[0]: value - first.get(key, math.nan) for key, value in last.items()}
    gained = {place: value for place, value in gain.items() if value > 0}  # excludes NaN
    return {
        "best": sorted(level, key=lambda place: -level[place])[:PICKS],
        "worst": sorted(level, key=level.__getitem__)[:PICKS],
        "improved": sorted(gained, key=lambda place: -gained[place])[:PICKS],
    }
