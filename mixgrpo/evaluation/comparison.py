"""Statistics that compare sets of images by score: means, win rates, differences, intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# (index, sample) -> score; NaN if an image could not be scored.
Values = Mapping[tuple[int, int], float]

_CHUNK = 2**21  # random numbers drawn at once


@dataclass(frozen=True)
class Bootstrap:
    """Settings of the bootstrap intervals, from the 2.5% to the 97.5% quantile of the means."""

    resamples: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval; NaN where there are no data to estimate it from."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """The scores of one manifest by one reward, and their comparison with the baseline.

    Attributes:
        mean: mean over all scored images.
        scored: number of images with a score.
        pictures: total number of images.
        pairs: number of (index, sample) that the baseline has scores for too; 0 for the baseline.
        wins: fraction of the pairs in which the baseline scores lower; ties count half.
        difference: mean over the pairs of the score minus the baseline's.
    """

    reward: str
    manifest: str
    mean: Estimate
    scored: int
    pictures: int
    pairs: int
    wins: float
    difference: Estimate


def compare(
    reward: str,
    values: Mapping[str, Values],
    baseline: str,
    bootstrap: Bootstrap,
    prompts: Mapping[int, str] | None = None,
) -> list[Row]:
    """Returns a row for every manifest in ``values`` (name -> scores by one reward).

    ``prompts`` maps indices to prompts, because a prompts file may contain a prompt several times;
    see ``estimate``.
    """
    rows = []
    for name, own in values.items():
        pairs = {} if name == baseline else differences(own, values[baseline])
        scored = sum(not math.isnan(value) for value in own.values())
        rows.append(
            Row(
                reward=reward,
                manifest=name,
                mean=estimate(own, bootstrap, prompts),
                scored=scored,
                pictures=len(own),
                pairs=len(pairs),
                wins=win_rate(pairs),
                difference=estimate(pairs, bootstrap, prompts),
            )
        )
    return rows


def estimate(
    values: Values, bootstrap: Bootstrap, prompts: Mapping[int, str] | None = None
) -> Estimate:
    """The mean over all images, and its percentile bootstrap interval (Efron 1979).

    Images of the same prompt are not independent, so prompts are resampled, each with all of its
    images. There is no interval for a single prompt. Without ``prompts``, every index counts as a
    distinct prompt.
    """
    known = {key: value for key, value in values.items() if not math.isnan(value)}
    if not known:
        return Estimate(math.nan, math.nan, math.nan)
    scores = np.array(list(known.values()), np.float64)
    # Relative to one of the scores, so that the interval of equal scores has width 0 exactly.
    origin = scores[0]
    drawn = [prompts[index] if prompts else index for index, _ in known]
    distinct, place = np.unique(drawn, return_inverse=True)
    sums, counts = np.bincount(place, scores - origin), np.bincount(place)
    mean = float(origin + sums.sum() / counts.sum())
    if len(distinct) < 2:
        return Estimate(mean, math.nan, math.nan)
    low, high = np.quantile(_resampled_means(sums, counts, bootstrap), (0.025, 0.975))
    return Estimate(mean, float(origin + low), float(origin + high))


def _resampled_means(sums: np.ndarray, counts: np.ndarray, bootstrap: Bootstrap) -> np.ndarray:
    """[resamples] means, each over prompts drawn with replacement, as many as there are."""
    generator = np.random.default_rng(bootstrap.seed)
    rows = max(1, _CHUNK // len(sums))
    means = []
    for start in range(0, bootstrap.resamples, rows):
        size = (min(rows, bootstrap.resamples - start), len(sums))
        drawn = generator.integers(len(sums), size=size)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)


def differences(values: Values, baseline: Values) -> dict[tuple[int, int], float]:
    """Value minus baseline, where both are known."""
    pairs = {key: value - baseline[key] for key, value in values.items() if key in baseline}
    return {key: difference for key, difference in pairs.items() if not math.isnan(difference)}


def win_rate(pairs: Values) -> float:
    """Fraction of the differences above zero, with ties counted half; NaN if there are none."""
    if not pairs:
        return math.nan
    return sum((value > 0) + 0.5 * (value == 0) for value in pairs.values()) / len(pairs)


def pairwise_distance(features: Tensor) -> float:
    """[n, C] -> mean of 1 - cosine over the n(n-1)/2 pairs of rows; n must be at least 2."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    count = len(unit)
    # The squared norm of the sum is the sum of all n^2 cosines, n of them of a row with itself.
    cosines = unit.sum(0).square().sum() - unit.square().sum()
    return 1 - (cosines / (count * (count - 1))).item()


def table(rows: Sequence[Row], baseline: str) -> str:
    """The rows as a Markdown table with aligned columns."""
    cells = [[_in_a_cell(cell) for cell in line] for line in table_cells(rows, baseline)]
    widths = [max(3, *(len(line[column]) for line in cells)) for column in range(len(cells[0]))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in (cells[0], rule, *cells[1:])
    )


def _in_a_cell(text: str) -> str:
    """A name in one line, in which nothing ends the cell."""
    return " ".join(text.split()).replace("|", "\\|")


def table_cells(rows: Sequence[Row], baseline: str) -> list[list[str]]:
    """The cells of the table, line by line; the first line is the header."""
    head = ["reward", "manifest", "mean", "95% interval", "wins", "difference", "95% interval"]
    return [[*head, "scored"], *(_cells(row, baseline) for row in rows)]


def _cells(row: Row, baseline: str) -> list[str]:
    own = [row.reward, row.manifest, number(row.mean.value), _interval(row.mean)]
    scored = f"{row.scored}/{row.pictures}"
    if row.manifest == baseline:
        return [*own, "baseline", "", "", scored]
    wins = "-" if math.isnan(row.wins) else f"{row.wins:.1%}"
    difference = number(row.difference.value, plus=True)
    return [*own, wins, difference, _interval(row.difference, plus=True), scored]


def _interval(estimate: Estimate, plus: bool = False) -> str:
    if math.isnan(estimate.low):
        return "-"
    return f"{number(estimate.low, plus)} .. {number(estimate.high, plus)}"


def number(value: float, plus: bool = False) -> str:
    """Four decimal places, with a sign if ``plus``; ``-`` for NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:+.4f}" if plus else f"{value:.4f}"
