"""The curves that a report shows, as plain numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from mixgrpo.report.runs import Run
from mixgrpo.run.metrics import describe

POINTS = 1000  # maximum number of points per line
MANY = 40  # number of points from which a line is drawn with its running mean

OPTIMISATION = (
    "advantage/deviation",
    "update/ratio_deviation",
    "update/clip_fraction",
    "update/kl",
    "update/grad_norm",
    "update/loss",
    "update/ratio_mean",
    "update/ratio_error_on_policy",
    "rollout/evaluations_per_image",
    "update/evaluations_per_image",
)
EXACT = ("rollout/evaluations_per_image", "update/evaluations_per_image")  # values without noise
PHASES = ("text", "rollout", "decode", "reward", "update")
NOT_STACKED = ("seconds/reward_hidden", "seconds/validation")  # in parallel; between iterations

Values = tuple[float | None, ...]


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        run: index of its run, which determines the colour.
        label: label in the legend.
        kind: ``raw``, ``mean``, ``plain``; ``dots`` and ``dashed`` for sparse points; ``low`` and
            ``high`` for the edges of a filled band; ``area`` for a phase's top edge.
        values: values at each x of the chart; None where there is none.
        shown: values that the legend shows instead; empty to show ``values``.
    """

    run: int
    label: str
    kind: str
    values: Values
    shown: Values = ()


@dataclass(frozen=True)
class Chart:
    """Curves over the iterations.

    Attributes:
        key: the metric's name, or another unique key.
        title, unit, meaning: as in the table of metrics.
        x: the iterations.
        lines: the curves, at least one.
        note: which runs do not have this metric.
    """

    key: str
    title: str
    unit: str
    meaning: str
    x: tuple[int, ...]
    lines: tuple[Line, ...]
    note: str = ""


Points = dict[int, float]


def points(run: Run, key: str) -> Points:
    """Iteration -> value; the last record of an iteration counts.

    Seconds are summed, since an iteration's record and its validation's hold different times.
    """
    found: Points = {}
    for record in run.records:
        if key in record:
            before = found.get(record["iteration"], 0.0) if key.startswith("seconds/") else 0.0
            found[record["iteration"]] = before + float(record[key])
    return found


def reward_charts(runs: Sequence[Run], trained: bool) -> list[Chart]:
    """One chart for each reward that at least one run trains on, or that every run holds out."""
    weights: dict[str, float] = {}
    for run in runs:
        for name, weight in run.weights.items():
            weights[name] = max(weight, weights.get(name, 0.0))
    charts = [
        _reward_chart(runs, name) for name, weight in weights.items() if bool(weight) is trained
    ]
    return [chart for chart in charts if chart is not None]


def _reward_chart(runs: Sequence[Run], name: str) -> Chart | None:
    drawn: list[tuple[Line, Points]] = []
    for place, run in enumerate(runs):
        training = _curve(place, points(run, f"reward/{name}"), "training", 1)
        # Scores vary between prompt batches; with many runs, this noise would hide the means.
        drawn += training if len(runs) <= 2 else training[1:]
        for key, kind, label in (("validation", "dots", "validation"),
                                 ("validation_ema", "dashed", "average")):  # fmt: skip
            found = points(run, f"{key}/{name}")
            if found:
                drawn.append((Line(place, label, kind, ()), found))
    keys = [f"{kind}/{name}" for kind in ("reward", "validation")]
    return _chart(name, name, "", "", runs, drawn, keys)


def metric_charts(runs: Sequence[Run], keys: Iterable[str]) -> list[Chart]:
    """One chart for each of these metrics that any run has."""
    charts = []
    for key in keys:
        drawn = [
            curve
            for place, run in enumerate(runs)
            for curve in _curve(place, points(run, key), "", MANY if key not in EXACT else None)
        ]
        known = describe(key)
        charts.append(_chart(key, known.title, known.unit, known.meaning, runs, drawn, [key]))
    return [chart for chart in charts if chart is not None]


def other_keys(runs: Sequence[Run]) -> list[str]:
    """Metrics that no other chart shows."""
    shown = ("reward/", "validation/", "validation_ema/", "seconds/")
    keys = {key for run in runs for key in run.keys if not key.startswith(shown)}
    failed = {key for key in keys if key.startswith("reward_failed/")}
    silent = {key for key in failed if not any(any(points(r, key).values()) for r in runs)}
    return sorted(keys - {*OPTIMISATION, "window/start", "window/stop"} - silent)


def window_chart(runs: Sequence[Run]) -> Chart | None:
    """The window's first and last step at every iteration."""
    drawn = []
    for place, run in enumerate(runs):
        for label, kind, key in (("end", "high", "window/stop"), ("start", "low", "window/start")):
            if found := points(run, key):
                drawn.append((Line(place, label, kind, ()), found))
    known = describe("window/start")
    return _chart(
        known.key, known.title, known.unit, known.meaning, runs, drawn, [known.key], thin=False
    )


def phase_chart(run: Run, place: int) -> Chart | None:
    """Seconds of an iteration's phases, stacked."""
    keys = [f"seconds/{name}" for name in PHASES]
    more = {key for key in run.keys if key.startswith("seconds/")} - {*keys, *NOT_STACKED}
    known = {key: points(run, key) for key in (*keys, *sorted(more))}
    iterations = sorted({iteration for found in known.values() for iteration in found})
    if not iterations:
        return None
    phases = {
        key: thinned({iteration: found.get(iteration, 0.0) for iteration in iterations})
        for key, found in known.items()
        if found
    }
    x = tuple(next(iter(phases.values())))
    rows = [[found[iteration] for found in phases.values()] for iteration in x]
    edges = list(zip(*(accumulate(row) for row in rows), strict=True))
    lines = tuple(
        Line(place, describe(key).title, "area", edge, own)
        for key, edge, own in zip(phases, edges, zip(*rows, strict=True), strict=True)
    )
    meaning = "time of an iteration by phase, without validations and hidden scoring"
    return _rounded(Chart(f"seconds {place}", run.name, "s", meaning, x, lines))


def _curve(place: int, found: Points, label: str, many: int | None) -> list[tuple[Line, Points]]:
    """The points, and their running mean if there are at least ``many``; None: no running mean."""
    if not found:
        return []
    if many is None or len(found) < many:
        return [(Line(place, label, "plain", ()), found)]
    mean = running_mean(found)
    return [(Line(place, "", "raw", ()), found), (Line(place, label, "mean", ()), mean)]


def _chart(
    key: str,
    title: str,
    unit: str,
    meaning: str,
    runs: Sequence[Run],
    drawn: Sequence[tuple[Line, Points]],
    keys: Sequence[str],
    thin: bool = True,
) -> Chart | None:
    """A chart of the lines over all their iterations; None if there are no lines."""
    if not drawn:
        return None
    drawn = [(line, thinned(found) if thin else found) for line, found in drawn]
    x = tuple(sorted({iteration for _, found in drawn for iteration in found}))
    lines = tuple(
        replace(line, values=tuple(found.get(iteration) for iteration in x))
        for line, found in drawn
    )
    without = [run.name for run in runs if not run.keys & set(keys)]
    note = f"not in {', '.join(without)}" if without else ""
    return _rounded(Chart(key, title, unit, meaning, x, lines, note))


def running_mean(found: Points) -> Points:
    """Mean of each value and the values before it, over a twentieth of the curve."""
    iterations, values = list(found), list(found.values())
    width = max(1, len(values) // 20)
    parts = [values[max(0, end - width) : end + 1] for end in range(len(values))]
    return {
        iteration: sum(part) / len(part) for iteration, part in zip(iterations, parts, strict=True)
    }


def thinned(found: Points) -> Points:
    """At most ``POINTS`` points: means of groups of neighbours, at each group's last iteration."""
    size = -(-len(found) // POINTS) or 1
    items = list(found.items())
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    return {part[-1][0]: sum(value for _, value in part) / len(part) for part in parts}


def _rounded(chart: Chart) -> Chart:
    """Rounds to six digits, which keeps the report small."""
    lines = [
        replace(line, values=_short(line.values), shown=_short(line.shown)) for line in chart.lines
    ]
    return replace(chart, lines=tuple(lines))


def _short(values: Values) -> Values:
    return tuple(None if value is None else float(f"{value:.6g}") for value in values)
