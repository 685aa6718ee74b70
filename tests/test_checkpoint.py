"""Checkpoints: exact, whole or not at all, whatever fails and whenever the process dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ALONE, started
from tiny_world import same
from torch import Tensor

from mixgrpo.checkpoint import (
    CheckpointError,
    Damaged,
    Position,
    Saver,
    Shards,
    choose,
    find,
    latest,
    manifest,
    open_saved,
    shards,
    verify,
)
from mixgrpo.checkpoint import saver as saver_module

ELEMENTS = 30_000
PARTS = ("model", "ema", "optimizer")
BOTH_WAYS = pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "on a thread"])


def example(iteration: int) -> dict[str, Any]:
    """Its tensors tell the iteration."""
    generator = torch.Generator().manual_seed(iteration)
    weights = {
        "a.weight": torch.full([ELEMENTS], float(iteration)),
        "b.weight": torch.randn(3, 5, generator=generator),
        "b.half": torch.randn(7, generator=generator).bfloat16(),
    }
    moments = {
        "step": torch.tensor(float(iteration)),
        "exp_avg": torch.randn(4, generator=generator),
        "exp_avg_sq": torch.rand(4, generator=generator),
    }
    return {
        "model": weights,
        "ema": {name: weight * 0.5 for name, weight in weights.items()},
        "optimizer": {"a.weight": moments},
        "schedule": {"last_epoch": iteration, "_last_lr": [1e-5 * iteration]},
    }


def position(iteration: int, ema_updates: int | None = None) -> Position:
    config = {"update.learning_rate": 1e-5, "rewards.a.options": {}, "window.envelope": [0, 9]}
    return Position(iteration, 3 * iteration if ema_updates is None else ema_updates, config)


def save(root: Path, iteration: int, keep: int = 0, asynchronous: bool = False) -> Path:
    saver = Saver(ALONE, root, keep, asynchronous)
    saver.save(example(iteration), position(iteration))
    return saver.wait()


def emptied(state: Any) -> Any:
    if isinstance(state, Tensor):
        return torch.full_like(state, -1)
    if isinstance(state, dict):
        return {key: emptied(value) for key, value in state.items()}
    return None


def assert_whole(path: Path | None, iteration: int) -> None:
    assert path is not None
    saved = open_saved(path)
    verify(saved, saved.files)
    assert saved.position == position(iteration)
    found = emptied(example(iteration))
    Shards(path).read(found)
    assert same(found, example(iteration))


def partials(root: Path) -> list[Path]:
    return list(root.glob("partial_*"))


@BOTH_WAYS
def test_what_is_saved_is_read_back_exactly(tmp_path, asynchronous):
    path = save(tmp_path / "checkpoints", 25, 2, asynchronous)
    assert path == tmp_path / "checkpoints" / "iteration_00000025"
    assert latest(tmp_path / "checkpoints") == path
    assert_whole(path, 25)
    for part in PARTS[:2]:
        assert same(Shards(path).whole(part), example(25)[part])


def test_a_part_alone_is_read_without_the_files_of_the_others(tmp_path):
    path = save(tmp_path, 3)
    saved = open_saved(path)
    for file in path.glob("*.distcp"):
        if not file.name.startswith("ema"):
            file.unlink()
    verify(saved, saved.files_of("ema"))
    assert same(Shards(path).whole("ema"), example(3)["ema"])


def test_tensors_are_read_in_the_dtype_of_those_they_fill(tmp_path):
    path = save(tmp_path, 3)
    halves = {name: torch.zeros_like(w).bfloat16() for name, w in example(3)["model"].items()}
    Shards(path).fill("model", halves)
    assert same(halves, {name: w.bfloat16() for name, w in example(3)["model"].items()})


def test_without_an_average(tmp_path):
    saver = Saver(ALONE, tmp_path, 0, False)
    saver.save({"model": example(1)["model"]}, position(1))
    assert Shards(saver.wait()).shapes("ema") == {}


def test_no_checkpoint_yet(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nowhere") is None
    assert choose(ALONE, tmp_path, "undamaged") is None


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4])])
def test_the_newest_are_kept(tmp_path, keep, left):
    for iteration in (1, 2, 3, 4):
        save(tmp_path, iteration, keep)
    names = sorted(path.name for path in tmp_path.glob("iteration_*"))
    assert names == [f"iteration_{iteration:08d}" for iteration in left]
    assert_whole(latest(tmp_path), 4)


@pytest.mark.parametrize("keep", [1, 2])
def test_after_going_back_to_an_older_one_the_new_one_is_kept(tmp_path, keep):
    """Going back must not lose what is saved next."""
    for iteration in (10, 20, 30):
        save(tmp_path, iteration)
    (tmp_path / "latest").write_text("iteration_00000010\n")
    save(tmp_path, 15, keep)
    assert_whole(latest(tmp_path), 15)


def test_the_same_iteration_is_saved_many_times(tmp_path):
    for _ in range(11):
        save(tmp_path, 5, keep=1)
        assert_whole(latest(tmp_path), 5)
        assert len(list(tmp_path.glob("iteration_*"))) == 1


def test_a_checkpoint_from_before_going_back_is_replaced(tmp_path):
    for iteration in (10, 20):
        save(tmp_path, iteration)
    (tmp_path / "latest").write_text("iteration_00000010\n")
    saver = Saver(ALONE, tmp_path, 0, False)
    saver.save(example(20), position(20, ema_updates=99))
    assert open_saved(latest(tmp_path)).position.ema_updates == 99


def test_abandoned_partial_folders_are_removed(tmp_path):
    abandoned = tmp_path / "partial_iteration_00000007"
    abandoned.mkdir()
    (abandoned / "model_00000.distcp").write_bytes(b"half")
    assert latest(tmp_path) is None
    assert choose(ALONE, tmp_path, "undamaged") is None
    save(tmp_path, 8, keep=1)
    assert partials(tmp_path) == []


# ---- while the run goes on


@pytest.fixture
def slow_disk(monkeypatch):
    """Nothing reaches the disk before the event is set."""
    event, fsync = threading.Event(), os.fsync

    def waiting(handle: int) -> None:
        assert event.wait(60)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", waiting)
    yield event
    event.set()


def test_a_save_on_a_thread_is_of_the_moment_it_began(tmp_path, slow_disk):
    state = example(1)
    saver = Saver(ALONE, tmp_path, 0, asynchronous=True)
    saver.save(state, position(1))
    for part in PARTS:
        for tensor in state[part].values():
            (tensor if isinstance(tensor, Tensor) else tensor["exp_avg"]).add_(100)
    state["schedule"]["_last_lr"][0] = 7.0
    saver.poll()
    assert saver.under_way
    assert latest(tmp_path) is None
    slow_disk.set()
    assert_whole(saver.wait(), 1)
    assert not saver.under_way


def test_what_is_written_becomes_a_checkpoint_at_the_next_poll(tmp_path):
    saver = Saver(ALONE, tmp_path, 0, asynchronous=True)
    saver.save(example(1), position(1))
    while saver.under_way:
        saver.poll()
        time.sleep(0.001)
    assert_whole(latest(tmp_path), 1)
    saver.poll()
    assert saver.wait() == latest(tmp_path)


def test_there_are_never_two_saves_at_once(tmp_path, slow_disk):
    saver = Saver(ALONE, tmp_path, 0, asynchronous=True)
    saver.save(example(1), position(1))
    threading.Timer(0.1, slow_disk.set).start()
    saver.save(example(2), position(2))
    assert_whole(latest(tmp_path), 1)
    assert_whole(saver.wait(), 2)


def test_copies_beside_a_gpu_take_the_same_memory_while_the_state_has_its_form(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    copies = saver_module._Copies()
    first = copies.stage(example(1))
    assert same(first, example(1))
    second = copies.stage(example(2))
    assert same(second, example(2))
    assert second["model"]["a.weight"] is first["model"]["a.weight"]
    for other in ({"model": example(3)["model"]}, {"model": {"a.weight": torch.ones(2, 2)}}):
        assert same(copies.stage(other), other)


def test_copies_that_would_take_too_much_of_the_memory_are_not_pinned(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pages = {"SC_PAGE_SIZE": 1}
    monkeypatch.setattr(saver_module.os, "sysconf", pages.__getitem__)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    state = {"model": {"weight": torch.ones(1000)}, "step": 3}
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    for memory, expected in ((2 * 2 * 4000 * 8, 1), (2 * 2 * 4000 * 8 - 1, 0)):
        pages["SC_PHYS_PAGES"] = memory
        pinned.clear()
        assert same(saver_module._Copies().stage(state), state)
        assert len(pinned) == expected


def test_a_saver_knows_which_iteration_it_saved_last(tmp_path):
    saver = Saver(ALONE, tmp_path, 0, asynchronous=True)
    assert not saver.has(1)
    assert saver.wait() is None
    saver.save(example(1), position(1))
    assert saver.has(1)
    saver.wait()
    assert saver.has(1)
    saver.save(example(2), position(2))
    assert saver.has(2)
    assert not saver.has(1)
    saver.wait()


# ---- a write that fails


WRITES = [
    *[(shards._DigestedFile, "write", call) for call in (1, 2, 20)],
    *[(Path, "mkdir", call) for call in (2, 3)],
    *[(Path, "write_text", call) for call in (1, 2)],
    *[(os, "fsync", call) for call in range(1, 10)],
    *[(Path, "rename", call) for call in (1, 2)],
    (os, "replace", 1),
]
FAILING_WRITES = pytest.mark.parametrize(
    ("owner", "name", "call"), WRITES, ids=[f"{name} {call}" for _, name, call in WRITES]
)


def fail_at(patch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """From now on, this function's ``call``-th call finds the disk full."""
    real, calls = getattr(owner, name), count(1)

    def failing(*given, **named):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given, **named)

    patch.setattr(owner, name, failing)


@BOTH_WAYS
@FAILING_WRITES
def test_a_full_disk_leaves_what_was_saved(tmp_path, monkeypatch, owner, name, call, asynchronous):
    save(tmp_path, 1, keep=1)
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, call)
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, 2, 1, asynchronous)
    message = str(caught.value)
    assert "No space left on device" in message
    assert str(latest(tmp_path)) in message
    assert "free some disk space" in message
    assert "--run.resume true" in message
    assert "\n" not in message
    assert_whole(latest(tmp_path), 1)
    assert partials(tmp_path) == []

    save(tmp_path, 2, 1, asynchronous)
    assert_whole(latest(tmp_path), 2)


@FAILING_WRITES
def test_saving_an_iteration_again_cannot_lose_it(tmp_path, monkeypatch, owner, name, call):
    save(tmp_path, 1, keep=1)
    with monkeypatch.context() as patch, contextlib.suppress(CheckpointError):
        fail_at(patch, owner, name, call)
        save(tmp_path, 1, keep=1)
    assert_whole(latest(tmp_path), 1)


def test_a_full_disk_at_the_first_checkpoint(tmp_path, monkeypatch):
    fail_at(monkeypatch, shards._DigestedFile, "write", 1)
    with pytest.raises(CheckpointError, match=r"none was saved before.*free some disk space"):
        save(tmp_path, 1, keep=1)
    assert latest(tmp_path) is None
    assert partials(tmp_path) == []


def test_an_error_on_the_thread_is_told_in_the_same_words(tmp_path, monkeypatch):
    messages = []
    for asynchronous in (False, True):
        with monkeypatch.context() as patch:
            fail_at(patch, os, "fsync", 2)
            saver = Saver(ALONE, tmp_path, 0, asynchronous)
            with pytest.raises(CheckpointError) as caught:
                saver.save(example(1), position(1))
                saver.wait()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


# ---- other processes: files that may not grow, and kill -9


def _save_on_a_full_disk(root: str, limit: int, said: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as on a full disk, an error and not a death
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save(Path(root), 2, keep=1)
    except CheckpointError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path(said).write_text(str(error))


@pytest.mark.parametrize("limit", [ELEMENTS * 2, 200], ids=["the weights", "every file"])
def test_a_file_that_cannot_grow_leaves_what_was_saved(tmp_path, limit):
    root, said = tmp_path / "checkpoints", tmp_path / "said"
    save(root, 1, keep=1)
    (child,) = started(1, _save_on_a_full_disk, str(root), limit, str(said))
    child.join(600)
    assert child.exitcode == 0
    assert "free some disk space" in said.read_text()
    assert_whole(latest(root), 1)
    assert partials(root) == []


def _save_for_ever(root: str, first: int, asynchronous: bool) -> None:
    saver = Saver(ALONE, Path(root), 1, asynchronous)
    for number in count(2 * first):
        saver.save(example(number // 2), position(number // 2))  # each is saved twice


def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(tmp_path):
    root = tmp_path / "checkpoints"
    save(root, 1, keep=1)
    for number in range(12):  # a save takes some ten milliseconds
        before = (root / "latest").read_text()
        first = int(before.split("_")[1]) + 1
        (child,) = started(1, _save_for_ever, str(root), first, number % 2 == 1)
        while child.is_alive() and (root / "latest").read_text() == before:
            time.sleep(0.001)
        time.sleep(0.002 * number)
        child.kill()
        child.join(600)
        assert child.exitcode == -signal.SIGKILL
        found = latest(root)
        assert_whole(found, int(found.name.split("_")[1]))


# ---- damaged


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 4
    path.write_bytes(contents)


FILES = [f"{part}_00000.distcp" for part in (*PARTS, "schedule")] + [".metadata", "state.json"]


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_with_the_way_out(tmp_path, capsys, name, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    assert {file.name for file in newest.iterdir()} == set(FILES)
    damage(newest / name)
    with pytest.raises(CheckpointError) as caught:
        choose(ALONE, tmp_path, "latest")
    message = str(caught.value)
    assert str(newest) in message or newest.name in message
    assert name in message
    assert "--run.resume_from undamaged" in message
    assert "\n" not in message

    assert_whole(choose(ALONE, tmp_path, "undamaged").path, 1)
    assert newest.name in capsys.readouterr().err


def test_a_number_in_the_manifest_that_was_changed_is_damage(tmp_path):
    path = save(tmp_path, 2)
    content = json.loads((path / "state.json").read_text())
    content["iteration"] = 3
    (path / "state.json").write_text(json.dumps(content))
    with pytest.raises(Damaged, match=r"state\.json was altered"):
        open_saved(path)
    (path / "state.json").write_text('{"iteration": 2, "config": {}}')
    with pytest.raises(CheckpointError, match="written by another version"):
        open_saved(path)


def test_where_all_are_damaged_none_is_taken(tmp_path):
    for iteration in (1, 2):
        truncate(save(tmp_path, iteration) / FILES[0])
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged"):
        choose(ALONE, tmp_path, "undamaged")


def test_undamaged_is_the_newest_where_nothing_is_damaged(tmp_path):
    """So it may stay in a command that is started again and again."""
    for iteration in (1, 2, 3):
        save(tmp_path, iteration)
    assert choose(ALONE, tmp_path, "undamaged").path == latest(tmp_path)
    (tmp_path / "latest").write_text("iteration_00000002\n")  # the run went back
    assert choose(ALONE, tmp_path, "undamaged").path.name == "iteration_00000002"


def test_a_checkpoint_by_its_name(tmp_path):
    for iteration in (1, 2):
        save(tmp_path, iteration)
    assert choose(ALONE, tmp_path, "iteration_00000001").position == position(1)
    for name in ("iteration_00000003", f"../{tmp_path.name}/iteration_00000001", ""):
        with pytest.raises(CheckpointError) as caught:
            choose(ALONE, tmp_path, name)
        assert f"run.resume_from is {name!r}" in str(caught.value)
    assert "iteration_00000002, iteration_00000001" in str(caught.value)


@pytest.mark.parametrize(
    "pointer",
    [
        *(b"iteration_00000009\n", b"", b"\n", b"../elsewhere", b"iteration_\xff\xfe"),
        *(b"../checkpoints/iteration_00000001", b"./iteration_00000001", b"iteration_00000001/"),
        *(b"iteration_00000001\0", b"iteration_00000001\niteration_00000001", b".", b".."),
        *(b"iteration_", b"iteration_1_2_3", b"iteration_-1", b"x" * 9999),
    ],
)
def test_a_pointer_to_nothing_is_an_error_with_a_way_out(tmp_path, pointer):
    tmp_path /= "checkpoints"
    save(tmp_path, 1)
    (tmp_path / "latest").write_bytes(pointer)
    with pytest.raises(
        CheckpointError, match=r"not a checkpoint beside it; .*--run\.resume_from undamaged"
    ) as caught:
        latest(tmp_path)
    assert "\n" not in str(caught.value)
    assert_whole(choose(ALONE, tmp_path, "undamaged").path, 1)


def test_an_absolute_pointer_is_an_error(tmp_path):
    path = save(tmp_path / "checkpoints", 1)
    (tmp_path / "checkpoints" / "latest").write_text(str(path))
    with pytest.raises(CheckpointError, match="not a checkpoint beside it"):
        latest(tmp_path / "checkpoints")


@pytest.mark.parametrize("kind", ["missing", "FIFO", "folder", "too large"])
def test_a_pointer_that_cannot_be_read_is_an_error_with_a_way_out(tmp_path, kind):
    save(tmp_path, 1)
    pointer = tmp_path / "latest"
    pointer.unlink()
    if kind == "FIFO":
        os.mkfifo(pointer)
    elif kind == "folder":
        pointer.mkdir()
    elif kind == "too large":
        pointer.write_bytes(b"iteration_00000001\n")
        os.truncate(pointer, 2**40)
    said = (
        "although there are checkpoints such as iteration_00000001" if kind == "missing" else kind
    )
    with pytest.raises(CheckpointError, match=r"--run\.resume_from undamaged") as caught:
        choose(ALONE, tmp_path, "latest")
    assert said.replace("too large", "is larger") in str(caught.value)
    assert_whole(choose(ALONE, tmp_path, "undamaged").path, 1)


def test_a_first_checkpoint_whose_pointer_cannot_be_written_is_a_full_disk(tmp_path, monkeypatch):
    fail_at(monkeypatch, os, "replace", 1)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(tmp_path, 1, keep=1)


# ---- what does not belong in a checkpoint


class Code:
    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Code, "ran", True))


def test_code_in_a_shard_does_not_run(tmp_path):
    saver = Saver(ALONE, tmp_path, 0, False)
    saver.save({**example(1), "schedule": {"last_epoch": Code()}}, position(1))
    Code.ran = False
    with pytest.raises(CheckpointError, match="cannot be read"):
        Shards(saver.wait()).read({"schedule": {"last_epoch": 0}})
    assert not Code.ran


def altered(path: Path, change: Any) -> None:
    """Rewrites the manifest as someone would who knows how its digest is made."""
    content = json.loads((path / "state.json").read_text())
    del content["digest"]
    change(content)
    text = json.dumps({**content, "digest": manifest._digest_of(content)})
    (path / "state.json").write_text(text)


OUTSIDE = ("../secret", "/etc/passwd", "", ".", "..", "a/b", "a\0b")
ALTERATIONS = {
    **{
        f"a file {name!r}": lambda content, name=name: content["files"].update(
            {name: content["files"][".metadata"]}
        )
        for name in OUTSIDE
    },
    "a size that is text": lambda content: content["files"][".metadata"].update(size="9"),
    "a size below zero": lambda content: content["files"][".metadata"].update(size=-1),
    "a size that is true": lambda content: content["files"][".metadata"].update(size=True),
    "a digest more": lambda content: content["files"][".metadata"].update(sha="0"),
    "files as a list": lambda content: content.update(files=[]),
    "an iteration of text": lambda content: content.update(iteration="2"),
    "an iteration of 1.5": lambda content: content.update(iteration=1.5),
    "an iteration below zero": lambda content: content.update(iteration=-2),
    "no updates of the average": lambda content: content.update(ema_updates=None),
    "a weight of NaN": lambda content: content.update(kl_weight=float("nan")),
    "a weight of text": lambda content: content.update(kl_weight="0"),
    "knobs as a list": lambda content: content.update(config=[]),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_a_manifest_that_no_run_writes_is_damage(tmp_path, alteration):
    path = save(tmp_path, 2)
    altered(path, ALTERATIONS[alteration])
    with pytest.raises(Damaged, match=r"state\.json cannot be read") as caught:
        open_saved(path)
    assert "\n" not in str(caught.value)


def test_an_altered_manifest_can_be_read(tmp_path):
    """Or else the test before this one proves nothing."""
    path = save(tmp_path, 2)
    altered(path, lambda content: content.update(kl_weight=0.5))
    assert open_saved(path).position.kl_weight == 0.5


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"7", b"null", b"\xff\xfe{", b"\0" * 9])
def test_a_manifest_that_is_not_one_is_damage(tmp_path, content):
    path = save(tmp_path, 2)
    (path / "state.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"state\.json cannot be read"):
        open_saved(path)


@pytest.mark.parametrize("name", [".metadata", "model_00000.distcp", "state.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_not_a_file_is_damage_and_is_not_waited_for(tmp_path, name, make):
    path = save(tmp_path, 2)
    (path / name).unlink()
    make(path / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        choose(ALONE, tmp_path, "latest")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_saved(path)
        Shards(path).read({"model": emptied(example(2))["model"]})


def test_a_state_that_does_not_fit_is_an_error(tmp_path):
    path = save(tmp_path, 1)
    for state in ({"model": {"c": torch.zeros(1)}}, {"model": {"b.half": torch.zeros(8)}}):
        with pytest.raises(CheckpointError, match=r"cannot be read \(.*(model\.c|model\.b\.half)"):
            Shards(path).read(state)
    shutil.rmtree(path)
    with pytest.raises(CheckpointError):
        Shards(path).shapes("model")


def test_a_folder_that_is_a_link_to_nothing_is_not_an_empty_one(tmp_path):
    """The file system of the checkpoints is not mounted, for example."""
    (tmp_path / "checkpoints").symlink_to("not/mounted")
    for wanted in ("latest", "undamaged"):
        with pytest.raises(CheckpointError, match="mount what it leads to"):
            find(tmp_path / "checkpoints", wanted)
