import random
from collections import Counter
from dataclasses import replace

import pytest

from mixgrpo.maths.window import CONVENTIONS, STRATEGIES, WindowSchedule
from mixgrpo.types import Window

PAPER = WindowSchedule(steps=25, strategy="progressive", size=4)


def _starts(schedule: WindowSchedule, iterations: int) -> list[int]:
    return [schedule.at(iteration).start for iteration in range(iterations)]


def _runs(starts: list[int]) -> list[tuple[int, int]]:
    """[0, 0, 1] -> [(0, 2), (1, 1)]: each start with the iterations spent on it."""
    return list(Counter(starts).items())


def test_published_recipe_reaches_start_11_in_300_iterations():
    assert _runs(_starts(PAPER, 300)) == [(start, 25) for start in range(12)]


def test_published_flash_recipe_reaches_start_14():
    assert _runs(_starts(replace(PAPER, iters_per_window=20), 300))[-1] == (14, 20)


def test_iterations_count_from_zero():
    assert PAPER.at(24) == Window(0, 4)
    assert PAPER.at(25) == Window(1, 5)


def test_clamp_stays_at_the_last_valid_start():
    assert PAPER.at(25 * 20) == Window(20, 24)
    assert PAPER.at(25 * 21) == Window(20, 24)
    assert PAPER.at(10**6) == Window(20, 24)


def test_wrap_goes_back_to_the_start():
    schedule = replace(PAPER, start=3, at_end="wrap", iters_per_window=2)
    assert _starts(schedule, 40) == ([s for s in range(3, 21) for _ in range(2)] * 2)[:40]


def test_a_stride_that_jumps_over_the_end():
    clamp = replace(PAPER, stride=6, iters_per_window=1)
    assert _starts(clamp, 6) == [0, 6, 12, 18, 20, 20]
    assert _starts(replace(clamp, at_end="wrap"), 6) == [0, 6, 12, 18, 0, 6]


@pytest.mark.parametrize("at_end", ["clamp", "wrap"])
def test_stride_zero_stays(at_end):
    schedule = replace(PAPER, start=2, stride=0, at_end=at_end)
    assert set(_starts(schedule, 200)) == {2}


def test_frozen_stays():
    assert set(_starts(replace(PAPER, strategy="frozen", start=7), 500)) == {7}


def test_decay_shortens_linearly():
    schedule = WindowSchedule(steps=6, strategy="decay", size=2, min_iters=1, max_iters=7)
    assert _runs(_starts(schedule, 16)) == [(0, 7), (1, 5), (2, 3), (3, 1)]
    assert set(_starts(schedule, 100)[16:]) == {3}
    assert _starts(replace(schedule, at_end="wrap"), 32) == _starts(schedule, 16) * 2


def test_decay_with_one_valid_start():
    schedule = WindowSchedule(steps=5, strategy="decay", size=4)
    assert set(_starts(schedule, 100)) == {0}


def test_exp_decay_is_the_papers():
    runs = _runs(_starts(replace(PAPER, strategy="exp_decay"), 25 * 21))
    # ceil(25 * exp(-0.1 * (l - 13))): 25 up to l = 13, then 22.62, 20.47, 18.52, 16.76, 15.16, ...
    assert runs[:14] == [(start, 25) for start in range(14)]
    assert runs[14:20] == [(14, 23), (15, 21), (16, 19), (17, 17), (18, 16), (19, 14)]


def test_exp_decay_spends_at_least_one_iteration():
    schedule = replace(PAPER, strategy="exp_decay", decay_rate=1000.0, decay_threshold=0)
    assert _runs(_starts(schedule, 50)) == [(0, 25), *((s, 1) for s in range(1, 20)), (20, 6)]


def test_random_is_uniform_over_the_valid_starts():
    counts = Counter(_starts(replace(PAPER, strategy="random", seed=714), 21_000))
    assert sorted(counts) == list(range(21))
    assert all(850 < count < 1150 for count in counts.values())


def test_random_is_the_same_on_every_machine():
    """Values fixed once: a change here changes what an old run, repeated, trains."""
    first = [12, 3, 18, 7, 9, 14, 8, 14]
    assert _starts(replace(PAPER, strategy="random", seed=714), 8) == first
    assert _starts(replace(PAPER, strategy="random", seed=715), 8) != first


@pytest.mark.parametrize(
    ("seed", "envelope", "starts"),
    [  # random.Random(seed + step).randint(first, end - size), for the steps 1, 2, 3, ...
        (42, (0, 5), [0, 3, 2, 0, 2, 2, 0, 3, 1, 2, 1, 1, 0, 0, 0, 1]),
        (0, (0, 5), [1, 0, 1, 1, 2, 0, 2, 1, 3, 0, 3, 3, 2, 0, 1, 2]),
        (714, (2, 22), [18, 7, 9, 10, 10, 6, 6, 6, 19, 11]),
        (-3, (2, 22), [3, 6, 14, 6, 3, 9, 9, 10, 20, 12]),
    ],
)
def test_random_windows_of_verl_omni(seed, envelope, starts):
    """The values were computed once, with Python's own generator."""
    schedule = WindowSchedule(25, "random", 2, envelope=envelope, seed=seed, convention="verl_omni")
    assert _starts(schedule, len(starts)) == starts
    assert schedule.at(5) == Window(starts[5], starts[5] + 2)  # without the ones before
    assert _starts(replace(schedule, convention="own"), len(starts)) != starts


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(
    ("envelope", "size", "iterations"),
    [((0, 5), 2, 1), ((0, 5), 2, 3), ((3, 11), 4, 5), ((1, 9), 3, 2), ((2, 4), 2, 2)],
)
def test_progressive_windows_of_verl_omni(convention, envelope, size, iterations):
    """A stride of the window's size, clamped to the envelope, is its formula: at step i+1 by its
    own count, at step i by ours."""
    first, end = envelope
    schedule = WindowSchedule(
        *(12, "progressive", size, first, size, iterations),
        envelope=envelope,
        convention=convention,
    )
    steps = range(1, 31) if convention == "verl_omni" else range(30)
    formula = [min(first + (step // iterations) * size, end - size) for step in steps]
    assert _starts(schedule, 30) == formula


def test_all_is_every_stochastic_step():
    assert WindowSchedule(steps=16, strategy="all", size=4).at(99) == Window(0, 15)
    assert WindowSchedule(16, "all", size=4, envelope=(2, 9)).at(0) == Window(2, 9)


def test_envelope_bounds_every_strategy():
    base = WindowSchedule(10, "random", 2, start=1, iters_per_window=3, envelope=(1, 5))
    for strategy in STRATEGIES:
        schedule = replace(base, strategy=strategy, min_iters=1, max_iters=3)
        windows = [schedule.at(iteration) for iteration in range(60)]
        assert all(window.start >= 1 and window.stop <= 5 for window in windows)
    assert set(_starts(base, 60)) == {1, 2, 3}
    assert _starts(replace(base, strategy="progressive"), 12) == [
        1,
        1,
        1,
        2,
        2,
        2,
        3,
        3,
        3,
        3,
        3,
        3,
    ]


def _random_schedule(rng: random.Random) -> WindowSchedule:
    steps = rng.randint(2, 50)
    first = rng.randint(0, steps - 2)
    end = rng.randint(first + 1, steps - 1)
    size = rng.randint(1, end - first)
    strategy = rng.choice(STRATEGIES)
    has_others = strategy in ("random", "progressive")
    return WindowSchedule(
        steps=steps,
        strategy=strategy,
        size=size,
        start=rng.randint(first, end - size),
        stride=rng.randint(0, 7),
        iters_per_window=rng.randint(1, 30),
        at_end=rng.choice(["clamp", "wrap"]),
        min_iters=rng.randint(1, 10),
        max_iters=rng.randint(10, 30),
        decay_rate=rng.random(),
        decay_threshold=rng.randint(0, 20),
        envelope=(first, end),
        seed=rng.randint(0, 2**40),
        convention=rng.choice(CONVENTIONS) if has_others else "own",
    )


def test_windows_are_full_size_and_pure_for_any_configuration():
    rng = random.Random(0)
    for _ in range(400):
        schedule = _random_schedule(rng)
        assert schedule.envelope is not None
        first, end = schedule.envelope
        iterations = [rng.randint(0, 1000) for _ in range(8)]
        windows = [schedule.at(iteration) for iteration in iterations]
        again = [replace(schedule).at(iteration) for iteration in reversed(iterations)]
        assert windows == again[::-1]
        for window in windows:
            assert window.size == (end - first if schedule.strategy == "all" else schedule.size)
            assert first <= window.start < window.stop <= end <= schedule.steps - 1


@pytest.mark.parametrize("strategy", ["progressive", "decay", "exp_decay"])
def test_moving_windows_never_go_back_and_visit_every_start(strategy):
    starts = _starts(replace(PAPER, strategy=strategy), 1000)
    assert starts == sorted(starts)
    assert set(starts) == set(range(21))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "sliding"}, "'sliding'; known: progressive, random, decay"),
        ({"at_end": "stop"}, "'stop'; known: clamp, wrap"),
        ({"convention": "theirs"}, "'theirs'; known: own, verl_omni"),
        (
            {"convention": "verl_omni", "strategy": "decay"},
            "no strategy 'decay'; set --window.convention own, or .*to random or progressive",
        ),
        ({"size": 25}, r"size 25 does not fit the envelope \[0, 24\) of 25 steps.*1..24"),
        ({"size": 0}, "size 0"),
        ({"start": 21}, r"size 4 at start 21 .*\[0, 24\) of 25 steps: valid starts are 0..20"),
        ({"start": -1}, "start -1"),
        ({"envelope": (3, 8)}, r"start 0 .*\[3, 8\).*valid starts are 3..4"),
        ({"envelope": (0, 25)}, r"\[0, 25\) must lie within \[0, 24\)"),
        ({"envelope": (5, 5)}, r"\[5, 5\)"),
        ({"steps": 1}, "at least 2 denoising steps, got 1"),
        ({"stride": -1}, "stride must be at least 0, got -1"),
        ({"iters_per_window": 0}, "iters_per_window must be at least 1, got 0"),
        ({"min_iters": 9, "max_iters": 8}, "min_iters 9 and max_iters 8"),
        ({"min_iters": 0}, "min_iters 0"),
        ({"decay_rate": -0.1}, "decay_rate must be at least 0, got -0.1"),
    ],
)
def test_errors_name_the_numbers_and_the_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(PAPER, **changes)


def test_random_needs_no_start_inside_the_envelope():
    assert WindowSchedule(10, "random", 2, envelope=(3, 5)).at(0) == Window(3, 5)


def test_negative_iteration_is_an_error():
    with pytest.raises(ValueError, match="count from 0, got -1"):
        PAPER.at(-1)
