"""The plots of family.py, from its JSON alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from family_report import ABLATIONS, Found, values
from family_statistics import Estimate, estimate, paired
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SHOWN = {"all_right": "judge: captions wholly right", "imagereward": "ImageReward"}
PICTURES_PER_PROMPT = 12
DODGE = 0.012  # of a cost, so that intervals at the same cost do not hide each other


def plot_recipes(found: Found, path: Path) -> None:
    """Gain over the base against the seconds and against the evaluations that training took."""
    names = [name for name, about in found["members"].items() if about["timed"]]
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    grid = figure.subplots(2, 2, sharey="row", sharex="col")
    costs = {"seconds": "seconds of training", "evaluations": "model evaluations, thousands"}
    for row, (score, title) in zip(grid, SHOWN.items(), strict=True):
        for axes, cost in zip(row, costs, strict=True):
            for index, name in enumerate(names):
                aside = 1 + DODGE * (index - (len(names) - 1) / 2)
                _path_of(axes, found, name, score, cost, f"C{index}", aside)
            axes.axhline(0, color="gray", linewidth=0.8)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(f"{title},\nchange from the base")
    for axes, label in zip(grid[1], costs.values(), strict=True):
        axes.set_xlabel(label)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)
    figure.suptitle(
        "filled: equal iterations, open: equal time (set a little apart); "
        "mean over seeds, 95% intervals"
    )
    figure.savefig(path, dpi=110)


def _path_of(
    axes: Axes, found: Found, name: str, score: str, cost: str, color: str, aside: float
) -> None:
    """A member's points joined, ``aside`` times what they cost."""
    points = {at: point for at in ("iterations", "time")
              if (point := _point(found, name, at, score, cost)) is not None}  # fmt: skip
    if points.get("time") == points.get("iterations"):
        points.pop("time", None)  # it is the same run
    x, y = [cost * aside for cost, _ in points.values()], [gain.mean for _, gain in points.values()]
    axes.plot(x, y, color=color, alpha=0.6, label=found["members"][name]["label"])
    for place, (at, (_, gain)) in zip(x, points.items(), strict=True):
        axes.errorbar(
            place,
            gain.mean,
            yerr=_drawn(gain),
            fmt="o",
            color=color,
            markerfacecolor=color if at == "iterations" else "white",
            capsize=3,
        )


def _point(
    found: Found, name: str, at: str, score: str, cost: str
) -> tuple[float, Estimate] | None:
    """What training cost on average, and the gain over the base."""
    scores = values(found, name, at, score)
    if not scores:
        return None
    gain = estimate([value - found["base"][score] for value in scores.values()])
    return estimate(list(_cost(found, name, at, cost).values())).mean, gain


def _cost(found: Found, name: str, at: str, cost: str) -> Mapping[int, float]:
    if cost == "seconds":
        return values(found, name, at, "seconds")
    rollout, update, iterations = (
        values(found, name, at, quantity) for quantity in ("rollout", "update", "iterations")
    )
    pictures = found["settings"]["prompts"] * PICTURES_PER_PROMPT
    return {
        seed: pictures * iterations[seed] * (rollout[seed] + update[seed]) / 1000
        for seed in rollout
    }


def _drawn(value: Estimate) -> float | None:
    return None if math.isinf(value.half) else value.half


def plot_ablations(found: Found, path: Path) -> None:
    """Each ablation's difference from its reference, with its interval."""
    differences = {score: _differences(found, score) for score in SHOWN}
    labels = list(differences["all_right"])
    figure = Figure(figsize=(11, 1.5 + 0.3 * max(1, len(labels))), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
    for axes, (score, title) in zip(panels, SHOWN.items(), strict=True):
        for place, (group, value) in enumerate(differences[score].values()):
            color = f"C{list(ABLATIONS).index(group)}"
            axes.errorbar(value.mean, place, xerr=_drawn(value), fmt="o", color=color, capsize=3)
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set_xlabel(f"{title}: difference from the reference")
        axes.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(range(len(labels)), labels, fontsize=9)
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    figure.suptitle("equal iterations; mean of differences by seed, 95% intervals")
    figure.savefig(path, dpi=110)


def _differences(found: Found, score: str) -> dict[str, tuple[str, Estimate]]:
    """Label -> group and difference, of every ablation that has a pair of seeds."""
    named: dict[str, tuple[str, Estimate]] = {}
    for name, about in _ablations(found).items():
        reference = about["reference"]
        difference = paired(
            values(found, name, "iterations", score), values(found, reference, "iterations", score)
        )
        if difference is not None and name != reference:
            label = f"{about['label']} - {found['members'][reference]['label']}"
            named[label] = about["group"], difference
    return named


def _ablations(found: Found) -> dict[str, Any]:
    return {name: about for name, about in found["members"].items() if about["group"] in ABLATIONS}
