"""Reward hacking: the trained rewards go up while one that nobody trains on goes down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any


def hacking_warning(
    history: Sequence[Mapping[str, Any]], weights: Mapping[str, float], patience: int
) -> str | None:
    """The warning that the newest validations give reason for; None if they give none.

    The reason is a held-out reward that fell in each of the last ``patience`` validations, while
    trained rewards with more than half of the total weight rose over the same validations.

    Args:
        history: the records of a run's ``metrics.jsonl``, oldest first.
        weights: weight of every reward; 0 for held-out rewards.
        patience: number of consecutive validations; 0 never warns.
    """
    validations = [r for r in history if any(f"validation/{name}" in r for name in weights)]
    if not patience or len(validations) <= patience:
        return None
    recent = validations[-patience - 1 :]
    courses = {name: [record.get(f"validation/{name}") for record in recent] for name in weights}
    risen = sum(weights[name] for name, course in courses.items() if _rose(course))
    fallen = [name for name, course in courses.items() if not weights[name] and _fell(course)]
    if not fallen or risen <= sum(weights.values()) / 2:
        return None
    told = "; ".join(f"{name} {' '.join(f'{v:.4g}' for v in courses[name])}" for name in fallen)
    return (
        f"the trained rewards rose over the last {patience} validations, but held-out ones fell "
        f"in each of them ({told}): this may be reward hacking. Remedies: stop early and use an "
        "older checkpoint, or use hybrid inference (the base model for the last steps)"
    )


def _rose(course: Sequence[float | None]) -> bool:
    first, last = course[0], course[-1]
    return first is not None and last is not None and last > first


def _fell(course: Sequence[float | None]) -> bool:
    return all(
        before is not None and after is not None and after < before
        for before, after in pairwise(course)
    )
