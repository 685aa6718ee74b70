"""Metrics on disk, the progress bar, and wandb without an account."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_world import records

from mixgrpo.config import Config, LogConfig, RewardConfig, RunConfig
from mixgrpo.files.json_lines import read_records
from mixgrpo.run.tracking import Phases, Tracker, read_metrics


@pytest.fixture(autouse=True)
def no_account(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)


def config(iterations: int = 4, **log: Any) -> Config:
    return Config(
        run=RunConfig(iterations=iterations),
        rewards={"a": RewardConfig("jpeg_size")},
        log=LogConfig(**{"wandb": "disabled", "progress": False, **log}),
    )


def started(folder: Path, first: int = 0, active: bool = True, **log: Any) -> Tracker:
    folder.mkdir(exist_ok=True)
    return Tracker(config(**log), folder, first, active)


# ---- metrics.jsonl


def test_records_are_json_lines_and_nan_is_null(tmp_path):
    tracker = started(tmp_path)
    tracker.log(1, {"reward/a": 0.25, "reward/b": float("nan"), "reward/c": float("inf")})
    written = (tmp_path / "metrics.jsonl").read_text()
    tracker.close()
    assert written.endswith("\n"), "a record is on disk as soon as it is logged"
    assert json.loads(written) == {
        "iteration": 1, "reward/a": 0.25, "reward/b": None, "reward/c": None
    }  # fmt: skip


def test_a_half_written_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1, "a": 2}\n{"iteration": 2, "a": 3}\n{"iteration": 3, "a')
    assert [r["iteration"] for r in read_metrics(tmp_path)] == [1, 2]
    assert read_metrics(tmp_path / "nowhere") == []


RECORD = b'{"iteration": 2, "a": 3.5}'
NOT_RECORDS = {
    "zeros": b"\0" * 4096,
    "half a record": b'{"iteration": 9, "a": ',
    "an empty object": b"{}",
    "a list": b'[{"iteration": 9}]',
    "a number": b"9",
    "NaN": b"NaN",
    "null": b"null",
    "text": b'"iteration"',
    "no iteration": b'{"a": 1}',
    "an iteration that is null": b'{"iteration": null}',
    "an iteration that is text": b'{"iteration": "9"}',
    "an iteration that is true": b'{"iteration": true, "a": 1}',
    "an iteration of 1.5": b'{"iteration": 1.5}',
    "an iteration below zero": b'{"iteration": -9}',
    "an iteration of NaN": b'{"iteration": NaN}',
    "an iteration of many digits": b'{"iteration": 1' + b"0" * 5000 + b"}",
    "bytes that are not text": b'{"iteration": 9, "\xff\xfe": 1}',
    "UTF-16": '{"iteration": 9}'.encode("utf-16"),
    "lists in lists": b"[" * 100_000,
    "objects in objects": b'{"iteration": ' * 10_000,
    "a page": b"<html>",
}


@pytest.mark.parametrize("name", NOT_RECORDS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_a_record_takes_no_record_with_it(tmp_path, name, place):
    lines = [b'{"iteration": 1, "a": 1}', RECORD]
    lines.insert(place, NOT_RECORDS[name])
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    found = read_records(tmp_path / "metrics.jsonl")
    assert found == ([{"iteration": 1, "a": 1}, {"iteration": 2, "a": 3.5}], [place + 1], 3, False)


@pytest.mark.parametrize(
    ("line", "whole"),
    [
        *((RECORD + b"\r", True), (b"\xef\xbb\xbf" + RECORD, True), (b"  " + RECORD + b" ", True)),
        *((b"\0" * 100 + RECORD, False), (RECORD + b"\0" * 100, False)),
        (b'{"iteration": 9, "b": 0.1' + RECORD, False),
        (b'{"iteration": 9, "b' + RECORD, False),
        (b'{"iteration"' + RECORD, False),
        (b'{"iteration": 2, "a": 3.5, "note": "by hand", "all": [1], "on": true}', False),
    ],
)
def test_a_record_is_found_beside_what_is_none(tmp_path, line, whole):
    (tmp_path / "metrics.jsonl").write_bytes(line + b"\n")
    found = read_records(tmp_path / "metrics.jsonl")
    assert found == ([{"iteration": 2, "a": 3.5}], [] if whole else [1], 1, False)


def test_records_without_a_line_between_them_are_all_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(RECORD * 3)
    assert len(read_metrics(tmp_path)) == 3


def test_numbers_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1, "a": NaN, "b": -Infinity}\n\n\n{"iteration": 2}')
    expected = [{"iteration": 1, "a": None, "b": None}, {"iteration": 2}]
    assert read_records(path) == (expected, [], 4, False)


@pytest.mark.parametrize("end", [b"{", b'{"iter', b'{"iteration": 3', b'{"iteration": 3, "a": 1'])
def test_a_last_line_that_was_not_written_to_its_end_is_no_damage(tmp_path, capsys, end):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(RECORD + b"\n" + end)
    assert read_records(path)[1:] == ([], 2, True)
    started(tmp_path, first=2).close()
    assert path.read_bytes() == RECORD + b"\n"
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == [path]


def test_a_resumed_run_keeps_every_record_and_the_file_as_it_was(tmp_path, capsys):
    """Lines that cannot be read may be mended by hand later."""
    path = tmp_path / "metrics.jsonl"
    lines = [b"\0" * 40, b'{"iteration": 1, "a": 1}', b"{}", b"half a {", RECORD]
    path.write_bytes(b"\n".join([*lines, b'{"iteration": 3, "a": 1}', b'{"iteration": 4, "a']))
    before = path.read_bytes()
    for number in (1, 2):
        started(tmp_path, first=2).close()
        assert path.read_bytes() == lines[1] + b"\n" + RECORD + b"\n"
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"warning: 3 of 7 lines of {path} are not whole records")
        assert "the first of them line 1" in said
        assert f"metrics_damaged_{number}.jsonl" in said
        assert (tmp_path / f"metrics_damaged_{number}.jsonl").read_bytes() == before
        path.write_bytes(before)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_records_that_are_not_a_file_are_not_waited_for(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not a regular file"):
        started(tmp_path)


def test_a_resumed_run_drops_what_it_will_repeat(tmp_path):
    first = started(tmp_path)
    for iteration in range(5):
        first.log(iteration, {"reward/a": float(iteration)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "rew')

    second = started(tmp_path, first=2)
    second.log(3, {"reward/a": 33.0})
    second.close()
    assert [(r["iteration"], r["reward/a"]) for r in records(tmp_path)] == [
        (0, 0.0), (1, 1.0), (2, 2.0), (3, 33.0)
    ]  # fmt: skip


def test_a_full_disk_at_the_start_of_a_resumed_run_loses_no_record(tmp_path, monkeypatch):
    first = started(tmp_path)
    for iteration in range(5):
        first.log(iteration, {"reward/a": float(iteration)})
    first.close()
    before = (tmp_path / "metrics.jsonl").read_text()
    real = Path.write_bytes

    def half(path: Path, data: bytes) -> int:
        real(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        started(tmp_path, first=4)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_other_ranks_write_nothing(tmp_path, capsys):
    tracker = started(tmp_path, active=False, progress=True, wandb="offline")
    tracker.log(1, {"reward/a": 1.0})
    tracker.advance("window [0, 2)")
    tracker.pictures(1, torch.zeros(1, 3, 4, 4, dtype=torch.uint8), ["a red circle"])
    tracker.say("something")
    tracker.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


# ---- what is shown


def test_the_progress_bar_shows_iteration_window_reward_and_phases(tmp_path, capsys):
    tracker = started(tmp_path, progress=True)
    tracker.advance("window [0, 2) | a 0.250 | rollout 1.00s")
    tracker.bar.refresh()
    tracker.close()
    shown = capsys.readouterr().err
    for part in ("1/4", "window [0, 2)", "a 0.250", "rollout 1.00s"):
        assert part in shown


def test_a_resumed_bar_starts_where_the_run_stands(tmp_path, capsys):
    tracker = started(tmp_path, first=3, progress=True)
    tracker.bar.refresh()
    tracker.close()
    assert "3/4" in capsys.readouterr().err


def test_without_progress_nothing_is_drawn(tmp_path, capsys):
    tracker = started(tmp_path)
    tracker.advance("window [0, 2)")
    tracker.say("said")
    tracker.close()
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out == "said\n"


def test_phases_add_up_and_are_taken_once():
    phases = Phases(torch.device("cpu"))
    for name in ("rollout", "reward", "rollout"):
        with phases(name):
            pass
    taken = phases.take()
    assert set(taken) == {"rollout", "reward"}
    assert all(seconds >= 0 for seconds in taken.values())
    assert phases.take() == {}


def test_a_phase_leaves_out_the_ones_inside_it(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 4.0, 7.0, 10.0])  # rollout 0-10, in it decode 1-3 and 4-7
    monkeypatch.setattr("mixgrpo.devices.perf_counter", lambda: next(clock))
    phases = Phases(torch.device("cpu"))
    with phases("rollout"):
        for _ in range(2):
            with phases("decode"):
                pass
    phases.add("reward_hidden", 1.5)
    assert phases.take() == {"decode": 5.0, "rollout": 5.0, "reward_hidden": 1.5}


def test_a_phase_that_fails_is_left_with_those_around_it(monkeypatch):
    """Its end is not waited for: after a failed kernel, waiting fails too and would hide why."""
    clock = iter([0.0, 1.0, 8.0, 9.0])  # rollout from 0, in it decode from 1; then update 8-9
    monkeypatch.setattr("mixgrpo.devices.perf_counter", lambda: next(clock))
    phases = Phases(torch.device("cpu"))
    with pytest.raises(ValueError), phases("rollout"), phases("decode"):
        raise ValueError
    with phases("update"):
        pass
    assert phases.take() == {"update": 1.0}


def test_on_a_gpu_only_the_end_of_an_outermost_phase_is_waited_for(monkeypatch):
    """An event that decoding waited for would leave the GPU idle until the next launch."""
    clock = mock.Mock()
    phases = Phases(torch.device("cpu"))
    monkeypatch.setattr(phases, "clock", clock)
    clock.seconds.side_effect = [5.0, 2.0]
    with phases("rollout"):
        with phases("decode"):
            pass
        clock.seconds.assert_not_called()
    assert phases.take() == {"decode": 2.0, "rollout": 3.0}


# ---- TensorBoard


def shown_by_tensorboard(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def test_tensorboard_gets_what_wandb_gets(tmp_path):
    tracker = started(tmp_path, tensorboard=True)
    tracker.log(1, {"reward/a": 0.25, "reward/b": float("nan")})
    tracker.pictures(1, torch.full((2, 3, 4, 6), 255, dtype=torch.uint8), ["one", "two"])
    before_the_end = shown_by_tensorboard(tmp_path)
    tracker.close()
    assert before_the_end.Tags()["scalars"] == ["reward/a"], "a metric is there once it is logged"
    assert [(e.step, e.value) for e in before_the_end.Scalars("reward/a")] == [(1, 0.25)]
    assert before_the_end.Tags()["images"] == ["pictures/000", "pictures/001"]
    (image,) = before_the_end.Images("pictures/000")
    assert (image.step, image.width, image.height) == (1, 6, 4)
    (text,) = before_the_end.Tensors("config/text_summary")
    assert b"| window.size | `4` |" in text.tensor_proto.string_val[0]


@pytest.mark.parametrize("first", [0, 2, 4])
def test_a_resumed_run_has_no_point_twice_in_tensorboard(tmp_path, monkeypatch, first):
    """As a run of 4 iterations logs them: a validation at both ends, each resumed run anew."""
    clock = itertools.count(1_700_000_000)  # the files' names, by which they are ordered
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time.time", clock.__next__)
    for done, value in ((0, 1.0), (first, 2.0)):
        tracker = started(tmp_path, first=done, tensorboard=True)
        if done == 0:
            tracker.log(0, {"validation/a": value})
        for iteration in range(done + 1, 5):
            tracker.log(iteration, {"reward/a": value})
        tracker.log(4, {"validation/a": value})
        tracker.close()
    found = shown_by_tensorboard(tmp_path)
    of_training = [(e.step, e.value) for e in found.Scalars("reward/a")]
    assert of_training == [(i, 1.0 if i <= first else 2.0) for i in range(1, 5)]
    of_validation = [(e.step, e.value) for e in found.Scalars("validation/a")]
    assert of_validation == [(0, 2.0 if first == 0 else 1.0), (4, 2.0)]


def test_tensorboard_switched_on_late_gets_the_whole_run(tmp_path):
    for first, is_on in ((0, False), (2, True)):
        tracker = started(tmp_path, first=first, tensorboard=is_on)
        for iteration in (first + 1, first + 2):
            tracker.log(iteration, {"reward/a": float(iteration)})
        tracker.close()
    points = shown_by_tensorboard(tmp_path).Scalars("reward/a")
    assert [(e.step, e.value) for e in points] == [(i, float(i)) for i in range(1, 5)]


def test_without_the_knob_tensorboard_gets_nothing(tmp_path):
    tracker = started(tmp_path)
    tracker.log(1, {"reward/a": 1.0})
    tracker.close()
    assert not (tmp_path / "tensorboard").exists()


# ---- wandb


class WandbError(Exception):
    """wandb's own, played."""


class FakeWandb(SimpleNamespace):
    """Remembers what it is told."""

    def __init__(self) -> None:
        super().__init__(started=[], logged=[], finished=0)
        self.util = SimpleNamespace(generate_id=lambda: f"id{len(self.started)}")
        self.errors = SimpleNamespace(Error=WandbError)

    def init(self, **given: Any) -> FakeWandb:
        self.started.append(given)
        return self

    def Settings(self, init_timeout: int) -> int:
        return init_timeout

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1

    def Image(self, data: Any, caption: str) -> tuple[Any, str]:
        return data.shape, caption


@pytest.fixture
def fake_wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_is_off_without_a_key(tmp_path, fake_wandb):
    tracker = started(tmp_path, wandb="auto")
    tracker.log(1, {"reward/a": 1.0})
    tracker.close()
    assert fake_wandb.started == []


def test_wandb_disabled_stays_off_with_a_key(tmp_path, fake_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    started(tmp_path, wandb="disabled").close()
    assert fake_wandb.started == []


def test_wandb_follows_the_key_and_a_resumed_run_continues_its_curves(
    tmp_path, fake_wandb, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    for first in (0, 2):
        tracker = started(tmp_path, first=first, wandb="auto", project="mine")
        tracker.log(first + 1, {"reward/a": 1.0, "reward/b": float("nan")})
        images = torch.zeros(2, 3, 4, 6, dtype=torch.uint8)
        tracker.pictures(first + 1, images, ["one", "two"])
        tracker.close()
    one, two = fake_wandb.started
    assert one["mode"] == two["mode"] == "online"
    assert one["project"] == "mine"
    assert one["id"] == two["id"]
    assert two["resume"] == "allow"
    assert "k" * 40 not in repr(fake_wandb.started)
    assert one["config"]["window.size"] == 4
    assert fake_wandb.logged[0] == (1, {"reward/a": 1.0})
    step, values = fake_wandb.logged[1]
    assert step == 1
    assert values["pictures"] == [((4, 6, 3), "one"), ((4, 6, 3), "two")]
    assert fake_wandb.finished == 2


def test_wandb_that_cannot_be_started_is_one_sentence(tmp_path, fake_wandb, monkeypatch):
    def refuse(**given: Any) -> None:
        raise WandbError("API key\n must have 40 characters")

    monkeypatch.setattr(fake_wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"must have 40 characters\).*--log.wandb offline"):
        started(tmp_path, wandb="online")


def test_wandb_offline_needs_no_account(tmp_path):
    tracker = started(tmp_path, wandb="offline")
    tracker.log(1, {"reward/a": 1.0})
    tracker.pictures(1, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["one", "two"])
    tracker.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert (tmp_path / "wandb_id").read_text() in run.name
    assert any(file.suffix == ".wandb" and file.stat().st_size for file in run.iterdir())
    assert [r["iteration"] for r in records(tmp_path)] == [1]
