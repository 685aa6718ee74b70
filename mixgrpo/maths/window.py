"""The schedule of the stochastic window over the iterations (MixGRPO, arXiv 2507.21802)."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from itertools import accumulate

from mixgrpo.types import Window

STRATEGIES = ("progressive", "random", "decay", "exp_decay", "frozen", "all")
CONVENTIONS = ("own", "verl_omni")


@dataclass(frozen=True)
class WindowSchedule:
    """The window as a pure function of the 0-based iteration: stateless and equal on every rank.

    Steps 0..T-2 can be stochastic (the last one never is), so a window of size w starts in
    0..T-1-w. Windows are never truncated.

    Attributes:
        steps: T, the denoising steps of a rollout.
        strategy: "progressive" moves by ``stride`` every ``iters_per_window`` iterations; "decay"
            does the same but spends fewer iterations on later windows, decreasing linearly from
            ``max_iters`` at ``start`` to ``min_iters`` at the last valid start; "exp_decay" spends
            ceil(iters_per_window * exp(-decay_rate * max(0, l - decay_threshold))) iterations at
            start l; "random" draws each iteration's start uniformly; "frozen" stays at ``start``;
            "all" trains every step of the envelope, regardless of ``size`` and ``start``.
        size: w, the number of steps in a window.
        start: the start of the first window.
        stride: steps by which the window moves; at 0 it does not move.
        iters_per_window: iterations spent on one window.
        at_end: after the last valid start, "clamp" stays there and "wrap" returns to ``start``.
        min_iters: used by "decay" only.
        max_iters: used by "decay" only.
        decay_rate: k of "exp_decay".
        decay_threshold: "exp_decay" spends fewer iterations on windows that start after this step.
        envelope: [first, end), the steps within which windows must lie; None for all steps that
            can be stochastic.
        seed: used by "random" only.
        convention: "own", or "verl_omni" for the windows of verl-omni's MixGRPO with the same seed,
            range and size. It counts the steps from 1, so that the 0-based iteration i has the
            step s = i+1. "random" starts at ``random.Random(seed + s).randint(first, end - w)``;
            "progressive" has moved s // ``iters_per_window`` times, so its first window lasts one
            iteration less than the others. verl-omni has no other strategies; its "progressive"
            moves by w, which is ``stride``.

    Raises:
        ValueError: if a field is out of range or the windows do not fit; the message states the
            numbers.
    """

    steps: int
    strategy: str
    size: int
    start: int = 0
    stride: int = 1
    iters_per_window: int = 25
    at_end: str = "clamp"
    min_iters: int = 10
    max_iters: int = 40
    decay_rate: float = 0.1
    decay_threshold: int = 13
    envelope: tuple[int, int] | None = None
    seed: int = 0
    convention: str = "own"

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_pace()
        self._check_fit()

    def at(self, iteration: int) -> Window:
        """Return the window of the 0-based ``iteration``, independently of earlier calls.

        Raises:
            ValueError: if ``iteration`` is negative.
        """
        if iteration < 0:
            raise ValueError(f"iterations count from 0, got {iteration}")
        if self.strategy == "all":
            return Window(*self.bounds)
        start = self._start_at(iteration)
        return Window(start, start + self.size)

    @property
    def bounds(self) -> tuple[int, int]:
        """[first, end): the steps that windows may cover."""
        return self.envelope if self.envelope is not None else (0, self.steps - 1)

    @property
    def valid_starts(self) -> range:
        """Every start at which a full window fits."""
        first, end = self.bounds
        return range(first, end - self.size + 1)

    @property
    def iterations_to_the_end(self) -> int | None:
        """Iterations of one pass over all windows; None for strategies that make no such pass."""
        if self.strategy in ("frozen", "random", "all") or self.stride == 0:
            return None
        return sum(map(self._iterations_at, self._route())) - self._first_step

    @property
    def _first_step(self) -> int:
        """The number of the first iteration."""
        return 1 if self.convention == "verl_omni" else 0

    def _start_at(self, iteration: int) -> int:
        if self.strategy == "frozen":
            return self.start
        step = iteration + self._first_step
        if self.strategy == "random":
            return self._drawn_start(step)
        starts = self._route()
        ends = list(accumulate(self._iterations_at(start) for start in starts))
        if self.at_end == "wrap":
            step %= ends[-1]
        return next((s for s, end in zip(starts, ends, strict=True) if step < end), starts[-1])

    def _drawn_start(self, step: int) -> int:
        starts = self.valid_starts
        if self.convention == "verl_omni":
            return random.Random(self.seed + step).randint(starts[0], starts[-1])
        return starts[_uniform(self.seed, step, len(starts))]

    def _route(self) -> list[int]:
        """The starts of one pass, from ``start`` to the end of the range."""
        last = self.valid_starts[-1]
        if self.stride == 0:
            return [self.start]
        if self.at_end == "wrap":
            return list(range(self.start, last + 1, self.stride))
        # The clamped route ends at the last valid start even if the stride would skip it.
        return [*range(self.start, last, self.stride), last]

    def _iterations_at(self, start: int) -> int:
        """Iterations spent on the window at ``start``, at least 1."""
        if self.strategy == "decay":
            length = max(1, self.valid_starts[-1] - self.start)
            done = (start - self.start) / length
            return round(self.max_iters - (self.max_iters - self.min_iters) * done)
        if self.strategy == "exp_decay":
            excess = max(0, start - self.decay_threshold)
            # Never 0, even where the exponential underflows.
            return max(1, math.ceil(self.iters_per_window * math.exp(-self.decay_rate * excess)))
        return self.iters_per_window

    def _check_choices(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"unknown window strategy {self.strategy!r}; known: {', '.join(STRATEGIES)}"
            )
        if self.at_end not in ("clamp", "wrap"):
            raise ValueError(f"unknown window at_end {self.at_end!r}; known: clamp, wrap")
        if self.convention not in CONVENTIONS:
            raise ValueError(
                f"unknown window convention {self.convention!r}; known: {', '.join(CONVENTIONS)}"
            )
        if self.convention == "verl_omni" and self.strategy not in ("random", "progressive"):
            raise ValueError(
                f"window.convention is 'verl_omni', which has no strategy {self.strategy!r}; set "
                "--window.convention own, or --window.strategy to random or progressive"
            )

    def _check_pace(self) -> None:
        if self.stride < 0:
            raise ValueError(
                f"window stride must be at least 0, got {self.stride}; 0 keeps the window in place"
            )
        if self.iters_per_window < 1:
            raise ValueError(f"iters_per_window must be at least 1, got {self.iters_per_window}")
        if not 1 <= self.min_iters <= self.max_iters:
            raise ValueError(
                "window decay needs 1 <= min_iters <= max_iters, got "
                f"min_iters {self.min_iters} and max_iters {self.max_iters}"
            )
        if not 0 <= self.decay_rate < math.inf:
            raise ValueError(f"window decay_rate must be at least 0, got {self.decay_rate}")

    def _check_fit(self) -> None:
        if self.steps < 2:
            raise ValueError(f"windows need at least 2 denoising steps, got {self.steps}")
        first, end = self.bounds
        if not 0 <= first < end <= self.steps - 1:
            raise ValueError(
                f"window envelope [{first}, {end}) must lie within [0, {self.steps - 1}), the "
                f"steps of {self.steps} that can be stochastic (the last one never is)"
            )
        if self.strategy == "all":
            return
        if not 1 <= self.size <= end - first:
            raise ValueError(
                f"a window of size {self.size} does not fit the envelope [{first}, {end}) of "
                f"{self.steps} steps: choose a size in 1..{end - first}"
            )
        if self.strategy != "random" and self.start not in self.valid_starts:
            raise ValueError(
                f"a window of size {self.size} at start {self.start} does not fit the envelope "
                f"[{first}, {end}) of {self.steps} steps: valid starts are "
                f"{first}..{end - self.size}"
            )


def _uniform(seed: int, iteration: int, count: int) -> int:
    """A number in 0..count-1 that depends only on the arguments, on every platform."""
    digest = hashlib.sha256(f"window/{seed}/{iteration}".encode()).digest()
    # The modulo bias of 64 bits is count/2^64, far too small to matter.
    return int.from_bytes(digest[:8], "big") % count
