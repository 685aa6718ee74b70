"""A run's windows as tables of at most 100 columns, and as a plot."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mixgrpo.assembly import make_objective, make_plan, make_windows, spacing_for
from mixgrpo.config import Config
from mixgrpo.files.disk import write_whole
from mixgrpo.maths.emphasis import trained_steps
from mixgrpo.maths.schedule import Spacing, make_sigmas
from mixgrpo.maths.window import WindowSchedule
from mixgrpo.planning.coverage import (
    Evaluations,
    Group,
    Visit,
    evaluations_of_group,
    evaluations_of_run,
    iterations_by_step,
    never_trained,
    stretches,
    visits,
)
from mixgrpo.types import Window

WIDTH = 100  # columns of a terminal
_BAR = 30  # columns of the longest bar
_SHOWN = 2  # maximum number of iteration ranges that are written out
# How the strip shows a step: before the window, in it, after it.
_BEFORE, _TRAINED, _BEHIND = 0.0, 1.0, 2.0
_COLOURS = ("#dfe7f0", "#1f5fa8", "#f6f1e7")


@dataclass(frozen=True)
class Coverage:
    """A recipe's windows over its iterations.

    Raises:
        ValueError: on first use, if the windows do not fit the steps.
    """

    config: Config

    @cached_property
    def windows(self) -> WindowSchedule:
        return make_windows(self.config)

    @cached_property
    def visits(self) -> list[Visit]:
        return visits(self.windows, self.config.run.iterations)

    @cached_property
    def iterations(self) -> list[int]:
        """For each step, how many iterations train it."""
        return iterations_by_step(self.visits, self.config.sampling.steps)

    @cached_property
    def sigmas(self) -> list[float]:
        """For each step, the noise level from which it starts."""
        return make_sigmas(self.config.sampling.steps, self.spacing).tolist()[:-1]

    @cached_property
    def spacing(self) -> Spacing:
        """The spacing of the whole schedule."""
        return spacing_for(self.config, self.config.sampling.steps)

    @property
    def group(self) -> Group:
        batch, update = self.config.batch, self.config.update
        return Group(
            samples=batch.samples,
            chosen=self.config.advantage.best_of or batch.samples,
            parts=1 if update.split == "groups" else update.optimizer_steps,
            shared=self.config.sampling.shared_noise,
        )

    def of_group(self, window: Window) -> Evaluations:
        """One group's evaluations in an iteration with this window."""
        plan = make_plan(self.config, window, self.spacing)
        size = plan.window.size
        trained = trained_steps(size, self.config.update.step_fraction) / size
        found = evaluations_of_group(self.group, plan.window, plan.steps, trained)
        return found.with_passes(plan.passes, make_objective(self.config, None).passes)

    @cached_property
    def mean(self) -> Evaluations:
        """One group's evaluations in an iteration, averaged over the run."""
        total = evaluations_of_run(self.visits, self.of_group)
        return total * (1 / self.config.run.iterations)


def report(coverage: Coverage) -> str:
    """The tables, the totals and the warnings."""
    parts = [_heading(coverage), _steps_table(coverage), _windows_table(coverage)]
    return "\n\n".join([*parts, "\n".join([*_totals(coverage), *_remarks(coverage)])])


def _heading(coverage: Coverage) -> str:
    config, window = coverage.config, coverage.config.window
    sizes = {visit.window.size for visit in coverage.visits}
    return (
        f"{config.run.iterations} iterations, {window.strategy} windows of "
        f"{'/'.join(map(str, sorted(sizes)))} of {config.sampling.steps} steps, "
        f"{config.batch.prompts} prompts x {config.batch.samples} images, "
        f"{config.update.optimizer_steps} optimizer steps{_of_these(coverage)}"
    )


def _of_these(coverage: Coverage) -> str:
    """Which of the windows' steps and of the images the update uses, if not all."""
    said, config = "", coverage.config
    most = max(visit.window.size for visit in coverage.visits)
    count = trained_steps(most, config.update.step_fraction)
    if count < most:
        said += f"\neach image trains {count} of its window's {most} steps, drawn separately"
    if coverage.group.chosen < coverage.group.samples:
        said += f"\n{coverage.group.chosen} images of each group are trained"
    return said


def _steps_table(coverage: Coverage) -> str:
    parts, most = coverage.config.update.optimizer_steps, max(coverage.iterations)
    lines = ["step   sigma  iterations  optimizer steps"]
    for step, (sigma, count) in enumerate(zip(coverage.sigmas, coverage.iterations, strict=True)):
        note = "#" * -(-_BAR * count // most) if count else _why_untrained(coverage, step)
        lines.append(f"{step:4d}  {sigma:6.4f}  {count:10d}  {count * parts:15d}  {note}".rstrip())
    return "\n".join(lines)


def _why_untrained(coverage: Coverage, step: int) -> str:
    if step == coverage.config.sampling.steps - 1:
        return "the last step is never stochastic"
    first, end = coverage.windows.bounds
    return "never trained" if first <= step < end else "outside window.envelope"


def _windows_table(coverage: Coverage) -> str:
    samples = coverage.config.batch.samples
    lines = [
        f"{'evaluations per image':>60}  {'per group':>29}",
        _columns("window", "iterations", ["rollout", "update", "rollout", "update"]),
        _columns("", "", ["made (alone)"] * 4),
    ]
    for visit in coverage.visits:
        found = coverage.of_group(visit.window)
        lines.append(_row(str(visit.window), _when(visit.iterations), found, samples))
    lines.append(_row("mean", "of the run", coverage.mean, samples))
    return "\n".join(lines)


def _row(window: str, when: str, found: Evaluations, samples: int) -> str:
    each = found * (1 / samples)
    cells = [
        f"{each.rollout:5.2f} ({each.rollout_alone:5.2f})",
        f"{each.update:4.2f} ({each.update_alone:5.2f})",
        f"{found.rollout:6.1f} ({found.rollout_alone:5.1f})",
        f"{found.update:6.1f} ({found.update_alone:5.1f})",
    ]
    return _columns(window, when, cells)


def _columns(window: str, when: str, cells: Sequence[str]) -> str:
    return f"{window:9}  {when:20}  {cells[0]:>13} {cells[1]:>13}  {cells[2]:>14} {cells[3]:>14}"


def _when(iterations: Sequence[int]) -> str:
    """Iterations counted from 1, as a run counts them."""
    found = stretches(iterations)
    if len(found) > _SHOWN:
        return f"{len(iterations)} in {iterations[0] + 1}-{iterations[-1] + 1}"
    return ", ".join(
        f"{part.start + 1}-{part.stop}" if len(part) > 1 else f"{part.stop}" for part in found
    )


def _totals(coverage: Coverage) -> list[str]:
    config, mean = coverage.config, coverage.mean
    groups = config.run.iterations * config.batch.prompts
    total = mean * groups
    return [
        f"the run: {groups * config.batch.samples:,} images, "
        f"{config.run.iterations * config.update.optimizer_steps:,} optimizer steps; validations "
        "are not counted",
        f"  rollout {total.rollout:,.0f} evaluations instead of {total.rollout_alone:,.0f}: "
        f"sharing saves {_saved(total.rollout, total.rollout_alone)}",
        f"  update  {total.update:,.0f} evaluations, forward and backward, instead of "
        f"{total.update_alone:,.0f}: sharing saves {_saved(total.update, total.update_alone)}",
    ]


def _saved(made: float, alone: float) -> str:
    return f"{1 - made / alone:.1%}"


def _remarks(coverage: Coverage) -> list[str]:
    missed = never_trained(coverage.windows, coverage.iterations)
    if not missed:
        return []
    warning = f"warning: {_ranges(missed)} never trained{_how_far(coverage)}"
    return textwrap.wrap(warning, WIDTH, subsequent_indent="  ")


def _ranges(steps: Sequence[int]) -> str:
    found = ", ".join(
        f"{part.start}-{part[-1]}" if len(part) > 1 else f"{part.start}"
        for part in stretches(steps)
    )
    return f"steps {found} are" if len(steps) > 1 else f"step {found} is"


def _how_far(coverage: Coverage) -> str:
    """How far the windows moved, and how to reach the last one."""
    windows, done = coverage.windows, coverage.config.run.iterations
    to_the_end = windows.iterations_to_the_end
    if to_the_end is None or to_the_end <= done:
        return ""
    return (
        f": {done} iterations reach window start {coverage.visits[-1].window.start} of "
        f"{windows.valid_starts[-1]}; set --run.iterations {to_the_end} to reach every window, or "
        "spend fewer iterations on each"
    )


# ---- the plot


def save_picture(coverage: Coverage, path: Path) -> None:
    """Plots the steps over the iterations, and next to them how often each step is trained."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.6 + 0.17 * len(coverage.sigmas)), layout="constrained")
    strip, bars = figure.subplots(1, 2, width_ratios=[3, 1], sharey=True)
    _draw_strip(strip, coverage)
    _draw_bars(bars, coverage)
    figure.suptitle(_heading(coverage), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: figure.savefig(partial, dpi=120))


def strip_of(coverage: Coverage) -> list[list[float]]:
    """[steps][iterations]: position of each step relative to the iteration's window."""
    steps = coverage.config.sampling.steps
    return [
        [_place(step, coverage.windows.at(i)) for i in range(coverage.config.run.iterations)]
        for step in range(steps)
    ]


def _place(step: int, window: Window) -> float:
    if step in window:
        return _TRAINED
    return _BEFORE if step < window.start else _BEHIND


def _draw_strip(axes: Any, coverage: Coverage) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    axes.imshow(
        strip_of(coverage),
        cmap=ListedColormap(_COLOURS),
        vmin=_BEFORE,
        vmax=_BEHIND,
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, coverage.config.run.iterations + 0.5, len(coverage.sigmas) - 0.5, -0.5),
    )
    before = "once per prompt" if coverage.group.shared else "once per image"
    labels = (f"before: {before}", "window: stochastic, trained", "after: once per image")
    handles = [
        Patch(facecolor=colour, edgecolor="#888888", label=label)
        for colour, label in zip(_COLOURS, labels, strict=True)
    ]
    axes.figure.legend(handles=handles, loc="outside lower left", ncols=3, fontsize=8)
    axes.set_xlabel("iteration")
    axes.set_ylabel("step (sigma)")
    ticks = range(0, len(coverage.sigmas), max(1, len(coverage.sigmas) // 12))
    axes.set_yticks(list(ticks), [f"{i} ({coverage.sigmas[i]:.2f})" for i in ticks], fontsize=8)


def _draw_bars(axes: Any, coverage: Coverage) -> None:
    counts = coverage.iterations
    missed = set(never_trained(coverage.windows, counts))
    axes.barh(range(len(counts)), counts, color=_COLOURS[1], height=0.8)
    for step in sorted(missed):
        axes.text(0, step, " never", va="center", fontsize=7, color="#b03020")
    axes.set_xlabel("iterations that train the step")
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlim(left=0)
