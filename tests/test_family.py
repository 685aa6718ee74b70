"""The comparison of the recipes: its arithmetic, its tables, and that it goes on where it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from time import monotonic
from typing import Any

import family
import pytest
from family_claims import CLAIMS
from family_members import (
    FREE,
    KEY,
    RECIPES,
    Member,
    Settings,
    configuration,
    members,
    set_knob,
)
from family_pool import pool
from family_report import SCORES, claims_table, differences_table, report, scores_table
from family_results import (
    collect,
    described,
    equal_times,
    keep_settings,
    read_speeds,
    speed_tasks,
    training_tasks,
)
from family_runs import (
    TEST_CAPTIONS,
    Task,
    at_equal_time,
    expected_seconds,
    measured,
    perform,
    write_captions,
)
from family_statistics import Estimate, estimate, paired, verdict

from mixgrpo.assembly import make_windows
from mixgrpo.checks import check
from mixgrpo.config import RECIPES as RECIPE_FOLDER
from mixgrpo.run.stopping import TrainingStopped

SETTINGS = Settings(iterations=6, prompts=1, seeds=(1, 2), key_seeds=(3,), ablation_seeds=(1,))
CAPTIONS = Path("captions.txt")
MIX = Member("mixgrpo", "MixGRPO", "recipes", timed=True)


# --- statistics -----------------------------------------------------------------------------------


def test_interval_is_students():
    found = estimate([1.0, 2.0, 3.0])  # s = 1; t(0.975, 2) = 4.302653 in every table
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    two = estimate([0.0, 2.0])  # s = sqrt 2; t(0.975, 1) = tan(0.475 pi)
    assert two.half == pytest.approx(math.tan(0.475 * math.pi), rel=1e-6)
    assert estimate([5.0]) == Estimate(5.0, math.inf, 1)
    with pytest.raises(ValueError, match="no value"):
        estimate([])


def test_differences_are_paired_by_seed():
    found = paired({1: 1.0, 2: 2.5, 9: 100.0}, {1: 0.5, 2: 2.0, 8: 0.0})
    assert found == Estimate(0.5, 0.0, 2)  # the seeds' own level does not widen it
    assert paired({1: 1.0}, {2: 1.0}) is None


@pytest.mark.parametrize(
    ("mean", "half", "expected", "said"),
    [
        (1.0, 0.5, 1, "yes"),
        (1.0, 0.5, -1, "no"),
        (-1.0, 0.5, -1, "yes"),
        (1.0, 1.5, 1, "not resolved"),
        (1.0, math.inf, 1, "not resolved"),
    ],
)
def test_verdict_wants_an_interval_without_zero(mean, half, expected, said):
    assert verdict(Estimate(mean, half, 3), expected) == said


# --- equal time -----------------------------------------------------------------------------------


def record(iteration: int, seconds: float, start: int = 0) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "window/start": start,
        "seconds/rollout": seconds / 2,
        "seconds/update": seconds / 2,
        "seconds/reward_hidden": 100.0,
        "rollout/evaluations_per_image": 9.0 - start,
        "update/evaluations_per_image": 3.0,
    }


def test_seconds_count_each_window_as_often_as_the_run_visits_it():
    quick = [record(1, 99.0), record(2, 4.0), record(3, 4.0), record(4, 1.0, 1)]
    assert expected_seconds(quick, [0, 0, 0, 1]) == (3 * 4 + 1) / 4
    assert expected_seconds(quick, [0, 7]) == 4.0  # an unseen start counts as the median of all


def test_equal_time_divides_the_budget():
    assert [at_equal_time(100, s) for s in (2.5, 3.0, 40.0, 500.0)] == [40, 33, 2, 1]
    assert equal_times({"mixgrpo": 2.0, "slow": 5.0, "fast": 1.6}, 40) == {
        "mixgrpo": 40,
        "slow": 16,
        "fast": 50,
    }


def test_a_point_holds_what_the_iterations_up_to_it_took():
    records = [
        *(record(i, float(i), start=i // 3) for i in (1, 2, 3)),
        {"iteration": 3, "validation/all_right": 0.5, "seconds/validation": 50.0},
        record(4, 4.0, start=1),
    ]
    found = measured(records, 3)
    assert found["scores"] == {"all_right": 0.5}
    assert (found["seconds"], found["seconds_per_iteration"]) == (6.0, 2.0)
    assert found["evaluations"] == {"rollout": (9 + 9 + 8) / 3, "update": 3.0}
    assert found["windows"] == {"0": 2, "1": 1}


# --- members and order ----------------------------------------------------------------------------


def test_names_are_unique_and_all_references_and_claims_are_members():
    everyone = {member.name: member for member in members(30)}
    assert len(everyone) == len(members(30))
    assert set(RECIPES) | set(KEY) <= set(everyone)
    assert {member.reference for member in everyone.values()} <= set(everyone)
    assert {name for claim in CLAIMS for name in (claim.a, claim.b)} <= set(everyone)


def test_every_member_can_be_trained_and_its_windows_move(tmp_path):
    settings = Settings()
    for member in members(settings.iterations):
        config = configuration(member, settings, 1, tmp_path, CAPTIONS)
        check(config, 1)
        starts = [make_windows(config).at(i).start for i in range(settings.iterations)]
        if member.recipe == "mixgrpo" and config.window.strategy == "progressive":
            assert len(set(starts)) > 1, member.name
        assert (config.run.seed, config.batch.prompts) == (1, settings.prompts)


def test_window_sizes_share_their_starts(tmp_path):
    settings = Settings()
    everyone = {member.name: member for member in members(settings.iterations)}
    starts = []
    for name in ("mixgrpo", "window_1", "window_2", "window_6"):
        windows = make_windows(configuration(everyone[name], settings, 1, tmp_path, CAPTIONS))
        starts.append([windows.at(i).start for i in range(settings.iterations)])
    assert all(other == starts[0] for other in starts)


def test_free_windows_cover_the_range_in_one_run(tmp_path):
    settings = Settings(iterations=36)
    everyone = {member.name: member for member in members(36)}

    def starts(name: str) -> list[int]:
        windows = make_windows(configuration(everyone[name], settings, 1, tmp_path, CAPTIONS))
        return [windows.at(i).start for i in range(36)]

    assert starts(FREE) == [i // 6 for i in range(36)]
    decaying = [starts("free_decay").count(start) for start in range(6)]
    assert decaying == sorted(decaying, reverse=True)
    assert set(starts("free_frozen")) == {0}
    assert max(starts("windows_3")) == 2


def test_a_mistyped_knob_is_an_error(tmp_path):
    config = configuration(MIX, SETTINGS, 1, tmp_path, CAPTIONS)
    with pytest.raises(ValueError, match=r"no knob window\.sise"):
        set_knob(config, "window.sise", 3)


def test_the_most_important_runs_come_first():
    everyone = members(6)
    tasks = training_tasks(everyone, SETTINGS, {"mixgrpo": 6, "dancegrpo": 2})
    timed = [member.name for member in everyone if member.timed]
    order = [(task.member.name, task.seed) for task in tasks]
    assert order[: 2 * len(timed)] == [(name, seed) for seed in (1, 2) for name in timed]
    assert {name for name, seed in order if seed == 3} == set(KEY)
    assert order.index(("dancegrpo", 3)) < order.index(("window_1", 1))
    assert {task.member.name: task.iterations for task in tasks}["dancegrpo"] == (2, 6)


# --- going on -------------------------------------------------------------------------------------


class StubTraining:
    """Writes the metrics that a run would leave behind; may be told to stop."""

    def __init__(self, stop_at: int = 0, exit_code: int = 143) -> None:
        self.stop_at, self.exit_code = stop_at, exit_code
        self.calls: list[tuple[int, bool]] = []

    def __call__(self, config: Any) -> None:
        self.calls.append((config.run.iterations, config.run.resume))
        if config.run.iterations == self.stop_at:
            raise TrainingStopped("stopped", self.exit_code)
        iterations = range(1, config.run.iterations + 1)
        scores = dict.fromkeys((f"validation/{name}" for name in SCORES), 0.5)
        records = [{"iteration": 0, **scores}, *(record(i, 2.0) for i in iterations)]
        records.append({"iteration": config.run.iterations, **scores})
        folder = Path(config.run.folder)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_a_run_goes_on_where_it_was(tmp_path):
    task = Task(MIX, 1, (2, 6))
    with pytest.raises(TrainingStopped):
        perform(task, SETTINGS, tmp_path, StubTraining(stop_at=6))
    assert task.result(tmp_path, 2).exists()
    assert not task.is_done(tmp_path)
    assert (tmp_path / "runs" / task.name / "checkpoints").exists()  # what it goes on from
    second = StubTraining()
    perform(task, SETTINGS, tmp_path, second)
    assert second.calls == [(6, True)]
    assert task.is_done(tmp_path)
    assert not (tmp_path / "runs" / task.name / "checkpoints").exists()
    third = StubTraining()
    perform(task, SETTINGS, tmp_path, third)
    assert third.calls == []


def test_captions_are_repeated_in_their_order(tmp_path):
    lines = TEST_CAPTIONS.read_text().splitlines()
    found = write_captions(tmp_path, len(lines) + 3).read_text().splitlines()
    assert found == [*lines, *lines[:3]]


def test_a_run_that_failed_has_a_result_that_says_so(tmp_path):
    task = Task(MIX, 1, (6,))
    perform(task, SETTINGS, tmp_path, StubTraining(stop_at=6, exit_code=1))
    assert json.loads(task.result(tmp_path, 6).read_text())["error"] == "TrainingStopped: stopped"


def measure_all(folder: Path, settings: Settings, but: int = 0) -> dict[str, Any]:
    """The collected results of stubbed runs, all but the last so many."""
    everyone = members(settings.iterations)
    for task in speed_tasks(everyone):
        perform(task, settings, folder, StubTraining())
    speeds = read_speeds(folder)
    tasks = training_tasks(everyone, settings, equal_times(speeds, settings.iterations))
    for task in tasks[: len(tasks) - but]:
        perform(task, settings, folder, StubTraining())
    about = dict.fromkeys(("hardware", "software", "revision", "command"), "-")
    more = {"settings": {**vars(settings), "parallel": 2}}
    return collect(folder, settings, {**about, **more})


def test_what_is_missing_is_told(tmp_path):
    found = measure_all(tmp_path, SETTINGS, but=2)
    assert len(found["missing"]) == 2
    assert "fast_prefix, seed 1, 6 iterations: not run" in found["missing"]
    assert found["missing"][1] in report(found, {})


def test_settings_of_a_folder_stay_the_same(tmp_path):
    keep_settings(tmp_path, SETTINGS)
    keep_settings(tmp_path, Settings(iterations=6, prompts=1))  # more seeds may come
    with pytest.raises(ValueError, match=r"iterations was 6, is 40; prompts was 1, is 4"):
        keep_settings(tmp_path, Settings(iterations=40, prompts=4))


def test_workers_do_tasks_until_the_deadline(tmp_path, monkeypatch):
    (tmp_path / "stub_work.py").write_text(
        "from pathlib import Path\n"
        "from time import sleep\n"
        "def work(task):\n"
        "    if task.name == 'slow': sleep(60)\n"
        "    if task.name == 'bad': raise ValueError('broken')\n"
        "    if task.name == 'dead': import os; os._exit(3)\n"
        "class Task:\n"
        "    def __init__(self, name): self.name = name\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import stub_work

    def run(names: str, minutes: float) -> tuple[bool, list[str]]:
        done: list[str] = []
        with pool(2, stub_work.work, monotonic() + 60 * minutes) as workers:
            tasks = [stub_work.Task(name) for name in names.split()]
            return workers.run(tasks, lambda task: done.append(task.name)), done

    finished, done = run("a b c d e", 1)
    assert finished
    assert sorted(done) == list("abcde")
    begun = monotonic()
    assert run("slow slow a", 0.02) == (False, [])
    assert monotonic() - begun < 30
    with pytest.raises(RuntimeError, match="bad: ValueError: broken"):
        run("bad", 1)
    with pytest.raises(RuntimeError, match="dead: its process ended"):
        run("dead", 1)


# --- what is shown --------------------------------------------------------------------------------


def canned() -> dict[str, Any]:
    """Three seeds of MixGRPO and DanceGRPO: DanceGRPO learns less, in twice the time."""

    def point(member: str, seed: int, iterations: int, level: float, pace: float) -> dict[str, Any]:
        return {
            "member": member,
            "seed": seed,
            "iterations": iterations,
            "scores": dict.fromkeys(SCORES, level + 0.01 * seed),
            "seconds": pace * iterations,
            "seconds_per_iteration": pace,
            "evaluations": {"rollout": 9.0, "update": 3.25},
            "windows": {"0": iterations},
            "revision": "abc",
        }

    points = [
        point(member, seed, iterations, level, pace)
        for seed in (1, 2, 3)
        for member, iterations, level, pace in (
            ("mixgrpo", 40, 0.5, 2.0),
            ("dancegrpo", 40, 0.4, 4.0),
            ("dancegrpo", 20, 0.3, 4.0),
            ("window_1", 40, 0.5, 2.0),
        )
    ]
    return {
        **dict.fromkeys(("hardware", "software", "command"), "-"),
        "revision": "abc",
        "settings": {"iterations": 40, "prompts": 4, "learning_rate": 1e-4, "parallel": 2},
        "base": dict.fromkeys(SCORES, 0.25),
        "members": {member.name: described(member) for member in members(40)},
        "speeds": {"mixgrpo": 2.0, "dancegrpo": 4.0},
        "budget": 80.0,
        "equal_time": {"mixgrpo": 40, "dancegrpo": 20},
        "points": points,
        "missing": [],
    }


def test_tables_show_the_points():
    scores = scores_table(canned(), ["mixgrpo", "dancegrpo", "grpo_guard"], "time").splitlines()
    assert len(scores) == 5  # head, rule, base, two members; the third has no run
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert f"| MixGRPO | 3 | 40 | 0.520 ± {half:.3f} |" in scores[3]
    assert f"| DanceGRPO | 3 | 20 | 0.320 ± {half:.3f} |" in scores[4]
    assert "| 9.00 + 3.25 | 4.00 ± 0.00 |" in scores[4]
    (difference,) = differences_table(canned(), ["dancegrpo"], "iterations").splitlines()[2:]
    assert difference.startswith("| DanceGRPO - MixGRPO | 3 | **-0.100 ± 0.000** |")


def test_claims_are_judged_by_the_numbers():
    found = canned()
    lines = claims_table(found, {"mix_dance": "because"}).splitlines()[2:]
    shown = {line.split(" | ")[0].strip("| "): line for line in lines}
    assert "| imagereward +0.100 ± 0.000 | yes | +0.100 ± 0.000 | yes | because |" in shown[
        "MixGRPO learns more than DanceGRPO"
    ]  # fmt: skip
    assert "+0.200" in shown["... and still more in equal time"]
    assert "seconds per iteration -2.00 ± 0.00 | yes |" in shown[
        "an iteration of MixGRPO is shorter than DanceGRPO's"
    ]  # fmt: skip
    assert "| not resolved |" in shown["a window of 4 is better than one of 1"]
    assert len(lines) == 4  # nothing is said of what was not run


def test_the_report_is_made_from_the_json_alone(tmp_path, capsys):
    output = tmp_path / "family.json"
    with pytest.raises(SystemExit, match=r"family\.json does not exist; run without --report-only"):
        family.main(["--report-only", "--output", str(output)])
    output.write_text(json.dumps(canned()))
    assert family.main(["--report-only", "--output", str(output)]) == 0
    text = (tmp_path / "family.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert "## Equal time" in text
    assert "### Window size" in text
    for name in ("recipes", "ablations"):
        assert (tmp_path / f"family_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_refuses_no_time(capsys):
    with pytest.raises(SystemExit):
        family.parse(["--minutes", "0"])
    assert "--minutes must be positive" in capsys.readouterr().err


def test_recipes_are_those_of_the_shapes_world():
    there = {path.stem for path in RECIPE_FOLDER.glob("shapes_*.yaml")}
    assert {f"shapes_{name}" for name in RECIPES} == there
