"""What the schedule command counts: by hand, and against what rollout and update make."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import torch
from small import Counted, SmallNet, small_noise, small_plan, small_text

from mixgrpo.commands import main
from mixgrpo.commands.train import parse
from mixgrpo.maths.window import WindowSchedule
from mixgrpo.methods.grpo import evaluations_for, parts_of_groups
from mixgrpo.noise import drawn_steps
from mixgrpo.planning.coverage import (
    Evaluations,
    Group,
    evaluations_of_group,
    evaluations_of_run,
    iterations_by_step,
    never_trained,
    stretches,
    visits,
)
from mixgrpo.planning.coverage_report import Coverage, report, save_picture, strip_of
from mixgrpo.rollout import rollout
from mixgrpo.types import Window

PROGRESSIVE = WindowSchedule(steps=6, strategy="progressive", size=2, iters_per_window=3)


def recipe(name: str, **knobs: object) -> Coverage:
    words = [f"--{path.replace('__', '.')}={value}" for path, value in knobs.items()]
    return Coverage(parse(["--recipe", name, *words]))


# ---- which steps


def test_progressive_windows_by_hand() -> None:
    """Windows [0,2) for 3 iterations, [1,3) for 3, [2,4) for 1."""
    found = visits(PROGRESSIVE, 7)
    assert [(v.window.start, v.window.stop, v.iterations) for v in found] == [
        (0, 2, (0, 1, 2)),
        (1, 3, (3, 4, 5)),
        (2, 4, (6,)),
    ]
    counts = iterations_by_step(found, 6)
    assert counts == [3, 6, 4, 1, 0, 0]
    assert never_trained(PROGRESSIVE, counts) == [4]  # 5 is the last step, never stochastic


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"strategy": "progressive"}, 4 * 3),
        ({"strategy": "progressive", "convention": "verl_omni"}, 4 * 3 - 1),
        ({"strategy": "progressive", "stride": 2}, 3 * 3),  # starts 0, 2 and the last, 3
        ({"strategy": "decay", "max_iters": 4, "min_iters": 1}, 4 + 3 + 2 + 1),
        ({"strategy": "random"}, None),
        ({"strategy": "frozen"}, None),
    ],
)
def test_iterations_until_every_window_had_its_turn(knobs: dict, expected: int | None) -> None:
    windows = WindowSchedule(steps=6, size=2, iters_per_window=3, **knobs)
    assert windows.iterations_to_the_end == expected
    if expected:
        last = windows.valid_starts[-1]
        assert windows.at(expected - 1).start == last
        reached = [visit.window.start for visit in visits(windows, expected)]
        assert reached == sorted(set(reached))
        assert reached[-1] == last


def test_every_transition_is_counted_once() -> None:
    windows = WindowSchedule(steps=9, strategy="random", size=3, seed=1)
    assert sum(iterations_by_step(visits(windows, 40), 9)) == 40 * 3


def test_stretches() -> None:
    assert stretches([0, 1, 2, 5, 7, 8]) == [range(3), range(5, 6), range(7, 9)]
    assert stretches([]) == []


# ---- how many evaluations


def test_published_numbers_by_hand() -> None:
    """G = 12, T = 25, w = 4, 4 optimizer steps, window start 11: 12 + 12*13 and 4*(1 + 3*3)."""
    group = Group(samples=12, chosen=12, parts=4, shared=True)
    found = evaluations_of_group(group, Window(11, 15), 25, trained=1.0)
    assert found == Evaluations(168, 40, 300, 48)


@pytest.mark.parametrize(
    ("start", "size", "ratio", "shared"),
    [*product([0, 3], [1, 2], [1.0, 0.4], [True, False]), (0, 7, 1.0, True)],
)
def test_the_rollout_and_the_update_count_the_same(
    start: int, size: int, ratio: float, shared: bool
) -> None:
    plan = small_plan(8, start, size, solver="dpm" if ratio < 1 else "euler", ratio=ratio)
    noise = small_noise(prompts=(0, 1), samples=6, shared=shared)
    counted = Counted(SmallNet())
    trajectory = rollout(counted, small_text(2), plan, noise, micro_batch=5)
    group = Group(samples=6, chosen=6, parts=3, shared=shared)
    found = evaluations_of_group(group, plan.window, plan.steps, trained=1.0)
    assert 2 * found.rollout == trajectory.evaluations == counted.evaluations
    assert found.rollout_alone == 6 * plan.steps
    updates = [
        len(evaluations_for(trajectory, rows, torch.ones(12, size, dtype=torch.bool)))
        for rows in parts_of_groups(trajectory, 3)
    ]
    assert 2 * found.update == sum(updates)
    assert found.update_alone == 6 * size


def test_whole_groups_share_their_first_step_in_one_optimizer_step() -> None:
    """Update of G = 12, w = 4, 4 optimizer steps: 1 + 12*3 instead of 4*(1 + 3*3)."""
    by_samples = recipe("flux_mixgrpo", run__iterations=1)
    by_groups = recipe("flux_mixgrpo", run__iterations=1, update__split="groups")
    assert (by_samples.mean.update, by_groups.mean.update) == (40, 37)
    assert by_groups.mean.rollout == by_samples.mean.rollout
    assert report(by_groups).splitlines()[:8] == report(by_samples).splitlines()[:8]


def test_a_share_of_the_transitions_is_the_expected_number() -> None:
    """Each of 2 pictures trains one of 2 steps: 4 equal cases of 1 + 0, 1 + 1, 1 + 1, 0 + 2."""
    group = Group(samples=2, chosen=2, parts=1, shared=True)
    found = evaluations_of_group(group, Window(0, 2), 5, trained=0.5)
    assert found.update == (1 + 2 + 2 + 2) / 4
    assert found.update_alone == 2
    alone = Group(samples=2, chosen=2, parts=1, shared=False)
    assert evaluations_of_group(alone, Window(0, 2), 5, trained=0.5).update == 2


def test_drawn_steps_cost_what_is_expected() -> None:
    """The mean of 200 draws by two parts."""
    plan, noise = small_plan(8, 0, 5), small_noise(prompts=(0, 1), samples=4)
    trajectory = rollout(SmallNet(), small_text(2), plan, noise, micro_batch=8)
    made = [
        len(evaluations_for(trajectory, rows, drawn_steps(3, iteration, 2, 4, 5, 2)))
        for iteration in range(200)
        for rows in parts_of_groups(trajectory, 2)
    ]
    group = Group(samples=4, chosen=4, parts=2, shared=True)
    expected = evaluations_of_group(group, plan.window, plan.steps, trained=2 / 5)
    of_a_part = sum(made) / len(made)  # both groups
    assert 2 * of_a_part == pytest.approx(2 * expected.update, rel=0.02)
    assert expected.update_alone == 8


def test_fewer_pictures_in_the_update_than_in_the_rollout() -> None:
    group = Group(samples=12, chosen=4, parts=2, shared=True)
    found = evaluations_of_group(group, Window(0, 3), 5, trained=1.0)
    assert (found.rollout, found.update, found.update_alone) == (1 + 12 * 4, 2 * (1 + 2 * 2), 12)


def test_a_run_is_the_sum_of_its_iterations() -> None:
    group = Group(samples=4, chosen=4, parts=2, shared=True)

    def each(window: Window) -> Evaluations:
        return evaluations_of_group(group, window, 6, trained=1.0)

    total = evaluations_of_run(visits(PROGRESSIVE, 7), each)
    by_hand = 3 * (1 + 4 * 5) + 3 * (2 + 4 * 4) + 1 * (3 + 4 * 3)
    assert total.rollout == by_hand
    assert total.update == 7 * 2 * (1 + 2)


# ---- the published recipe


def test_the_published_recipe_reaches_start_11_of_20() -> None:
    coverage = recipe("flux_mixgrpo")
    counts = coverage.iterations
    assert counts[:4] == [25, 50, 75, 100]
    assert counts[11:16] == [100, 75, 50, 25, 0]
    text = report(coverage)
    warning = " ".join(text[text.index("warning") :].split())
    assert "steps 15-23 are never trained" in warning
    assert "300 iterations reach window start 11 of 20" in warning
    assert "--run.iterations 525" in warning
    assert sum(visit.window.start for visit in coverage.visits) / 12 == 5.5
    # Per group the mean over starts 0..11 of (l+1) + 12*(24-l).
    assert coverage.mean.rollout == pytest.approx(6.5 + 12 * 18.5)
    assert "2,193,600 evaluations instead of 2,880,000: sharing saves 23.8%" in text


def test_no_warning_where_all_is_trained() -> None:
    text = report(recipe("flux_mixgrpo", run__iterations=525))
    assert "warning" not in text
    assert "the last step is never stochastic" in text


def test_steps_outside_the_envelope_are_no_warning() -> None:
    text = report(recipe("shapes_mixgrpo"))
    assert text.count("outside window.envelope") == 4
    assert "warning" not in text


def test_flash_shortens_tails() -> None:
    """T = 25, window at 0: 21 steps behind it become 8."""
    coverage = recipe("flux_mixgrpo", tail__ratio=0.4, tail__solver="dpm", run__iterations=1)
    assert coverage.mean.rollout == 1 + 12 * (4 + 8 - 1)


@pytest.mark.parametrize("knobs", [{}, {"window__strategy": "random"}, {"window__strategy": "all"}])
def test_narrow_enough_for_a_terminal(knobs: dict) -> None:
    text = report(recipe("flux_mixgrpo", **knobs))
    assert max(map(len, text.splitlines())) <= 100


def test_the_dance_recipe_trains_14_of_24_steps_of_its_windows() -> None:
    coverage = recipe("flux_dancegrpo", sampling__steps=25, update__step_fraction=0.6)
    assert "trains 14 of its window's 24 steps" in report(coverage)
    assert coverage.mean.update_alone == 14 * coverage.group.chosen


def test_the_best_and_worst_half_are_trained() -> None:
    coverage = recipe("shapes_mixgrpo", advantage__best_of=4)
    assert "4 images of each group are trained" in report(coverage)
    assert coverage.mean.update == 4 * (1 + 1 * 3)


def test_a_shortened_prefix_is_counted() -> None:
    """Window start 11 of 25 steps with half of the prefix: 6 steps, of them 5.5 rounded."""
    coverage = recipe("flux_mixgrpo", window__strategy="frozen", window__start=11,
                      prefix__ratio=0.5, run__iterations=1)  # fmt: skip
    assert coverage.mean.rollout == (round(5.5) + 1) + 12 * (4 + 10 - 1)


def test_sigmas_are_the_schedules() -> None:
    sigmas = recipe("flux_mixgrpo").sigmas
    assert sigmas[0] == 1
    torch.testing.assert_close(torch.tensor(sigmas[24]), torch.tensor(3 / 27))  # 3u/(1+2u), u=1/25


# ---- the picture and the command


def test_the_strip_shows_before_in_and_behind() -> None:
    coverage = recipe("shapes_mixgrpo", run__iterations=2, window__iters_per_window=1)
    strip = strip_of(coverage)
    assert [row[0] for row in strip] == [1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    assert [row[1] for row in strip] == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "new" / "windows.png"
    save_picture(recipe("shapes_mixgrpo"), path)
    with Image.open(path) as picture:
        assert picture.width > picture.height > 200
        assert (31, 95, 168) in {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "windows.svg"
    code = main(["schedule", "--recipe", "shapes_mixgrpo", "--output", str(path)])
    said = capsys.readouterr()
    assert code == 0
    assert path.is_file()
    assert re.search(r"^   4  0\.8182 +60 +240 ", said.out, re.MULTILINE)
    assert str(path) in said.out


def test_a_plot_replaces_no_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "windows.png"
    path.symlink_to("/dev/null")
    assert main(["schedule", "--recipe", "shapes_mixgrpo", "--output", str(path)]) == 1
    assert "windows.png is a device, not a regular file" in capsys.readouterr().err
    assert path.is_symlink()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "windows.doc"], "--output is 'windows.doc'"),
        (["--output"], "--output needs a value"),
        (["--output", "/dev/null/x.png"], "lies below /dev/null, which is not a folder"),
        (["--output", "x" * 300 + ".png"], "cannot be written (File name too long)"),
        (["--window.sise", "3"], "did you mean window.size?"),
        (["--window.size", "30"], "window of size 30"),
    ],
)
def test_what_cannot_be_shown(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schedule", "--recipe", "shapes_mixgrpo", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
