"""Which steps a run's windows cover, how often, and how many model evaluations that takes.

Everything is counted per group of G images of one prompt, as ``rollout`` and ``update`` do it:
evaluations that the images of a group share are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mixgrpo.maths.window import WindowSchedule
from mixgrpo.types import Window


@dataclass(frozen=True)
class Group:
    """The settings that determine the evaluations of one group in one iteration.

    Attributes:
        samples: G, the number of images.
        chosen: number of images that the update uses.
        parts: equal parts of the chosen images, each of which an optimizer step of its own uses.
        shared: whether the images start from the same noise.
    """

    samples: int
    chosen: int
    parts: int
    shared: bool


@dataclass(frozen=True)
class Evaluations:
    """Model evaluations of one group, or of several: with sharing, and as if nothing were shared.

    Attributes:
        rollout: model evaluations of the rollout.
        update: forward and backward passes of the policy update.
        rollout_alone: ``rollout`` if every image were sampled separately.
        update_alone: ``update`` if every transition were evaluated separately.
    """

    rollout: float = 0
    update: float = 0
    rollout_alone: float = 0
    update_alone: float = 0

    def __add__(self, other: Evaluations) -> Evaluations:
        return Evaluations(
            self.rollout + other.rollout,
            self.update + other.update,
            self.rollout_alone + other.rollout_alone,
            self.update_alone + other.update_alone,
        )

    def with_passes(self, rollout: int, update: int) -> Evaluations:
        """With several evaluations of the network for each velocity, as guidance needs."""
        return Evaluations(
            self.rollout * rollout,
            self.update * update,
            self.rollout_alone * rollout,
            self.update_alone * update,
        )

    def __mul__(self, times: float) -> Evaluations:
        return Evaluations(
            self.rollout * times,
            self.update * times,
            self.rollout_alone * times,
            self.update_alone * times,
        )


@dataclass(frozen=True)
class Visit:
    """A window, and the 0-based iterations that use it, ascending."""

    window: Window
    iterations: tuple[int, ...]


def visits(windows: WindowSchedule, iterations: int) -> list[Visit]:
    """Every window of a run, ordered by position."""
    found: dict[Window, list[int]] = {}
    for iteration in range(iterations):
        found.setdefault(windows.at(iteration), []).append(iteration)
    ordered = sorted(found, key=lambda window: (window.start, window.stop))
    return [Visit(window, tuple(found[window])) for window in ordered]


def iterations_by_step(visited: Sequence[Visit], steps: int) -> list[int]:
    """How many iterations have each of the ``steps`` denoising steps in their window."""
    counts = [0] * steps
    for visit in visited:
        for step in visit.window.steps:
            counts[step] += len(visit.iterations)
    return counts


def never_trained(windows: WindowSchedule, counts: Sequence[int]) -> list[int]:
    """The steps that windows may cover but that no iteration of the run covers."""
    return [step for step in range(*windows.bounds) if counts[step] == 0]


def evaluations_of_group(group: Group, window: Window, steps: int, trained: float) -> Evaluations:
    """Model evaluations of one group in one iteration.

    The rollout shares the steps before the window and the window's first: (l+1) + G*(T-l-1) instead
    of G*T evaluations. The update shares the window's first step among the G' = chosen/parts
    images of an optimizer step: parts * (1 + G'*(w-1)) instead of chosen * w.

    Args:
        window: its position among the sampled steps.
        steps: T, the number of sampled steps; with Flash, of the shortened schedule.
        trained: fraction of the window's transitions that is trained, drawn for each image; the
            update's count is then an expectation.
    """
    samples, size = group.samples, window.size
    spread = samples if group.shared else 1
    before = (window.start + 1) * (samples // spread)
    part = group.chosen // group.parts
    first = _chosen_at_least_once(trained, part) if group.shared else part * trained
    return Evaluations(
        rollout=before + samples * (steps - window.start - 1),
        update=group.parts * (first + part * (size - 1) * trained),
        rollout_alone=samples * steps,
        update_alone=group.chosen * size * trained,
    )


def _chosen_at_least_once(share: float, pictures: int) -> float:
    """Probability that any of the images trains a step that each trains with this probability."""
    return 1 - (1 - share) ** pictures


def evaluations_of_run(
    visited: Sequence[Visit], each: Callable[[Window], Evaluations]
) -> Evaluations:
    """The sum over all iterations; ``each`` maps a window to the evaluations of one iteration."""
    total = Evaluations()
    for visit in visited:
        total += each(visit.window) * len(visit.iterations)
    return total


def stretches(iterations: Sequence[int]) -> list[range]:
    """Groups ascending iterations into ranges of consecutive ones."""
    found: list[range] = []
    for iteration in iterations:
        if found and found[-1].stop == iteration:
            found[-1] = range(found[-1].start, iteration + 1)
        else:
            found.append(range(iteration, iteration + 1))
    return found
