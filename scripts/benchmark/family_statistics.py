"""Means over seeds with their 95% intervals, and what a difference shows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the values.
        half: half the width of its 95% interval; infinite for a single value.
        count: number of values.
    """

    mean: float
    half: float
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 if the interval lies on that side of 0, else 0: not resolved."""
        if self.mean - self.half > 0:
            return 1
        return -1 if self.mean + self.half < 0 else 0


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval by Student's t with n-1 degrees of freedom.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("no value to take the mean of")
    count, mean = len(values), statistics.fmean(values)
    if count == 1:
        return Estimate(mean, math.inf, 1)
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Estimate(mean, quantile * statistics.stdev(values) / math.sqrt(count), count)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """Of the differences by seed, values minus reference; None if they share no seed."""
    seeds = sorted(values.keys() & reference.keys())
    return estimate([values[seed] - reference[seed] for seed in seeds]) if seeds else None


def verdict(difference: Estimate, expected: int) -> str:
    """Whether a difference has the sign that the paper reports."""
    if difference.sign == 0:
        return "not resolved"
    return "yes" if difference.sign == expected else "no"
