"""Checkpoints of several processes: sharded, of one process alone, and read by another number."""

from __future__ import annotations

import errno
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import ALONE, started, together
from tiny_world import same
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from whole_states import whole

from mixgrpo.checkpoint import CheckpointError, Damaged, Position, Saver, Shards, choose, latest
from mixgrpo.checkpoint import folder as checkpoint_folder
from mixgrpo.checkpoint import saver as saver_module
from mixgrpo.config import EngineConfig
from mixgrpo.engines import Engine, Network
from mixgrpo.engines.data_parallel import DataParallel
from mixgrpo.engines.distributed import Process, process_group
from mixgrpo.engines.ema import Ema
from mixgrpo.engines.fsdp import FullySharded

SIZES = (7, 5, 3)  # that no number of processes divides
CPU = torch.device("cpu")


def adamw(parameters: list[nn.Parameter]) -> tuple[Optimizer, LRScheduler]:
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    return optimizer, LambdaLR(optimizer, lambda step: 1 / (step + 1))


class Training:
    """A small network, sharded if there are other processes, with an average."""

    def __init__(self, process: Process) -> None:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(*SIZES[:2]), nn.Linear(*SIZES[1:]))
        self.engine: Engine = DataParallel(module, CPU, adamw)
        if process.world_size > 1:
            network = Network(module, list(module), torch.float32)
            self.engine = FullySharded(network, EngineConfig("fsdp"), CPU, adamw)
        self.ema = Ema(self.engine.shards, 0.9, self.engine.refresh)

    def step(self) -> None:
        inputs = torch.arange(2.0 * SIZES[0]).reshape(2, -1).sin()
        with self.engine.accumulate(last=True):
            self.engine.backward(self.engine.module(inputs).square().sum())
        self.engine.step()
        self.ema.update()

    def save(self, saver: Saver, position: Position) -> None:
        with self.ema.swapped():
            average = saver.copy({"ema": self.engine.weights()})
        saver.save({**average, **self.engine.state()}, position)

    def restore(self, shards: Shards, group: Any) -> None:
        self.engine.restore(lambda state: shards.read(state, group))
        with self.ema.swapped():
            self.engine.load_weights(lambda weights: shards.read({"ema": weights}, group))

    def whole(self) -> dict[str, Any]:
        """Everything, in memory of its own."""
        with self.ema.swapped():
            average = whole(self.engine.weights())
        return {**whole(self.engine.state()), "ema": average}


def _train_and_save(root: str, expected: str, asynchronous: bool) -> None:
    with process_group(1) as process:
        training = Training(process)
        for _ in range(3):
            training.step()
        saver = Saver(process, Path(root), 0, asynchronous)
        then = training.whole()
        training.save(saver, Position(3, 3, {}))
        training.step()  # what is saved must not move along
        now = training.whole()
        saver.wait()
        if process.rank == 0:
            assert not same(now["model"], then["model"])
            torch.save(then, expected)


def _restore(root: str, expected: str) -> None:
    with process_group(1) as process:
        training = Training(process)
        saver = Saver(process, Path(root), 0, False)
        saved = choose(process, Path(root), "latest")
        training.restore(Shards(saved.path), saver.group)
        assert saved.position.iteration == 3
        found = training.whole()
        if process.rank == 0:
            assert same(found, torch.load(expected))
            assert found["optimizer"]["param_groups"][0]["lr"] == 0.1 / 4


@pytest.mark.parametrize(
    ("wrote", "reads", "asynchronous"), [(2, 1, True), (2, 3, False), (1, 2, True)]
)
def test_what_some_processes_saved_others_continue(tmp_path, wrote, reads, asynchronous):
    root, expected = tmp_path / "checkpoints", tmp_path / "expected.pt"
    together(wrote, _train_and_save, str(root), str(expected), asynchronous)
    files = {file.name for file in latest(root).glob("*.distcp")}
    assert {f"model_{rank:05d}.distcp" for rank in range(wrote)} <= files
    together(reads, _restore, str(root), str(expected))


def test_before_the_first_step_the_optimizer_is_as_good_as_new(tmp_path):
    first, again = Training(ALONE), Training(ALONE)
    saver = Saver(ALONE, tmp_path, 0, False)
    first.save(saver, Position(0, 0, {}))
    again.restore(Shards(saver.wait()), None)
    untouched = Training(ALONE)
    for training in (first, again, untouched):
        training.step()
    assert same(first.whole(), untouched.whole())
    assert same(again.whole(), untouched.whole())


# ---- what one process alone holds


def _save_own(root: str) -> None:
    with process_group(1) as process:
        state = {
            "model": {f"of_{process.rank}": torch.full([2], float(process.rank))},
            "optimizer": {f"of_{process.rank}": {"step": torch.tensor(5.0 + process.rank)}},
            "schedule": {"last_epoch": 4},
        }
        Saver(process, Path(root), 0, True).save(state, Position(1, 0, {}))
        Saver(process, Path(root), 0, False).save(state, Position(2, 0, {}))


def _read_the_others(root: str) -> None:
    with process_group(1) as process:
        saver, other = Saver(process, Path(root), 0, False), 1 - process.rank
        state = {"model": {f"of_{other}": torch.zeros(2)}}
        Shards(latest(Path(root))).read(state, saver.group)
        assert state["model"][f"of_{other}"].tolist() == [other, other]


def test_a_tensor_of_one_process_alone_is_anyones_to_read(tmp_path):
    together(2, _save_own, str(tmp_path))
    together(2, _read_the_others, str(tmp_path))
    found = Shards(latest(tmp_path)).whole("optimizer")
    assert same(found, {"of_0.step": torch.tensor(5.0), "of_1.step": torch.tensor(6.0)})


# ---- one of two processes fails


def _fail_on_one(root: str, said: str) -> None:
    with process_group(1) as process:
        saver = Saver(process, Path(root), 0, False)
        saver.save({"model": {"a": torch.ones(3)}}, Position(1, 0, {}))
        fsync = os.fsync

        def full(handle: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        for asynchronous in (False, True):
            saver = Saver(process, Path(root), 0, asynchronous)
            mine = {"model": {f"of_{process.rank}": torch.ones(3)}}
            os.fsync = full if process.rank == 1 else fsync
            with pytest.raises(CheckpointError) as caught:
                saver.save(mine, Position(2, 0, {}))
                saver.wait()
            os.fsync = fsync
            Path(f"{said}_{process.rank}_{asynchronous}").write_text(str(caught.value))
            dist.barrier()
            assert not list(Path(root).glob("partial_*"))
            dist.barrier()
        saver.save(mine, Position(3, 0, {}))
        saver.wait()


def test_a_disk_that_is_full_for_one_process_is_one_error_on_all(tmp_path):
    root = tmp_path / "checkpoints"
    together(2, _fail_on_one, str(root), str(tmp_path / "said"))
    messages = {file.read_text() for file in tmp_path.glob("said_*")}
    assert len(messages) == 1
    (message,) = messages
    assert "rank 1: [Errno 28] No space left on device" in message
    assert f"the newest complete checkpoint is {root / 'iteration_00000001'}" in message
    assert latest(root).name == "iteration_00000003"


def _on_disks_of_their_own(root: str) -> None:
    """As where the shared disk is missing on one host: it does not see what the first makes."""
    saver_module.SEEN_WITHIN = 0.1
    with process_group(1) as process:
        own = Path(root) / str(process.rank)
        if process.rank == 0:
            Saver(ALONE, own, 0, False).save({"model": {"a": torch.ones(3)}}, Position(1, 0, {}))
        dist.barrier()
        with pytest.raises(CheckpointError, match=r"process 1 finds None: run\.folder must be on"):
            choose(process, own, "latest")
        saver, seen = Saver(process, Path(root) / "0", 0, False), mock.Mock(return_value=False)
        with (
            mock.patch("pathlib.Path.exists", seen) if process.rank == 1 else nullcontext(),
            pytest.raises(CheckpointError, match=r"process 1 does not see .*--run\.folder"),
        ):
            saver.save({"model": {"a": torch.ones(3)}}, Position(2, 0, {}))


def test_a_folder_that_is_not_shared_is_told_of_before_anything_is_written(tmp_path):
    together(2, _on_disks_of_their_own, str(tmp_path))
    assert [path.name for path in sorted((tmp_path / "0").iterdir())] == [
        "iteration_00000001", "latest"
    ]  # fmt: skip
    assert not (tmp_path / "1").exists()


def _choose_damaged(root: str) -> None:
    with process_group(1) as process, pytest.raises(Damaged, match=r"model_00001\.distcp"):
        choose(process, Path(root), "latest")


def test_damage_that_one_process_finds_is_an_error_on_all(tmp_path):
    together(2, _save_own, str(tmp_path))
    (latest(tmp_path) / "model_00001.distcp").write_bytes(b"no tensors")
    together(2, _choose_damaged, str(tmp_path))


# ---- one of two processes is killed


def _die_while_saving(root: str, asynchronous: bool, where: str) -> None:
    with process_group(1) as process:
        saver = Saver(process, Path(root), 0, asynchronous)
        saver.save({"model": {"a": torch.ones(3)}}, Position(1, 0, {}))
        saver.wait()
        owner, name, victim = {
            "writing": (os, "fsync", 1),
            "before the rename": (checkpoint_folder, "publish", 0),
            "before latest is moved": (checkpoint_folder, "_point", 0),
        }[where]
        if process.rank == victim:
            import mixgrpo.checkpoint.saver as saving

            def die(*given: Any) -> None:
                os.kill(os.getpid(), signal.SIGKILL)

            setattr(owner, name, die)
            if name == "publish":
                saving.publish = die
        with pytest.raises((RuntimeError, CheckpointError)):
            saver.save({"model": {f"of_{process.rank}": torch.ones(3)}}, Position(2, 0, {}))
            saver.wait()
            dist.barrier()


@pytest.mark.parametrize(
    ("where", "asynchronous"),
    [("writing", True), ("before the rename", False), ("before latest is moved", True)],
)
def test_a_process_killed_while_all_save_leaves_the_checkpoint_before(
    tmp_path, where, asynchronous
):
    processes = started(2, _die_while_saving, str(tmp_path), asynchronous, where)
    for process in processes:
        process.join(600)
    codes = sorted(process.exitcode for process in processes)
    assert codes == [-signal.SIGKILL, 0]
    assert latest(tmp_path).name == "iteration_00000001"
    assert choose(ALONE, tmp_path, "latest").position.iteration == 1
    saver = Saver(ALONE, tmp_path, 1, False)
    saver.save({"model": {"a": torch.ones(3)}}, Position(2, 0, {}))
    assert saver.wait() == latest(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [saver.wait().name]
