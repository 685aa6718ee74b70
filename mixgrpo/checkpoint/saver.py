"""Saves checkpoints, synchronously or while training continues."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor

from mixgrpo.checkpoint.folder import (
    CheckpointError,
    final_path,
    latest,
    make_partial,
    newest_first,
    publish,
)
from mixgrpo.checkpoint.manifest import Position
from mixgrpo.checkpoint.shards import ShardWriter, first_failure
from mixgrpo.engines.distributed import Process, gather_objects, new_group
from mixgrpo.files.messages import in_one_line

T = TypeVar("T")
SEEN_WITHIN = 30.0  # seconds within which every host must see a new file on the shared disk


class _Copies(BlockingAsyncStager):
    """Copies of a state on the CPU, in pinned memory for fast copies if there is a GPU.

    Pinning is slow, so the memory is reused for the next save as long as the state's structure and
    shapes are the same. It is not pinned where that would take too much of the host's memory.
    """

    def __init__(self) -> None:
        super().__init__(cache_staged_state_dict=torch.cuda.is_available())
        self._form: Any = None

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        form = _form_of(state_dict)
        if form != self._form:
            self._form, self.state_dict_cache = form, None
            self.cache_staged_state_dict = torch.cuda.is_available() and _may_pin(state_dict)
        copied: dict[str, Any] = super().stage(state_dict)
        return copied


def _may_pin(state: Any) -> bool:
    """Whether pinned copies of this state, in every process of the host, take at most half of its
    memory. Pinned memory comes in powers of two, and so may be twice the state."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2 * _bytes_of(state) * here <= memory / 2


def _bytes_of(state: Any) -> int:
    if isinstance(state, dict):
        return sum(map(_bytes_of, state.values()))
    if isinstance(state, DTensor):
        return state.to_local().nbytes
    return state.nbytes if isinstance(state, Tensor) else 0


def _form_of(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _form_of(value) for key, value in state.items()}
    return getattr(state, "shape", None)


@dataclass(frozen=True)
class _Pending:
    """A save in progress, whose files may already be written."""

    partial: Path
    iteration: int
    written: Future[Any]


class Saver:
    """Writes a run's checkpoints; every method must be called by all processes.

    An asynchronous save copies the state to the CPU and writes it in a thread. The files become a
    checkpoint in ``poll`` or ``wait``, which also raise errors of the writing.

    Attributes:
        group: process group for communication in parallel with training; None with one process.
    """

    def __init__(self, process: Process, root: Path, keep: int, asynchronous: bool) -> None:
        self.process = process
        self.root = root
        self.keep = keep
        self.asynchronous = asynchronous
        self.group = new_group(process)
        self._copies, self._own = _Copies(), _Copies()
        self._pending: _Pending | None = None
        self._newest: tuple[int, Path] | None = None

    def save(self, state: dict[str, Any], position: Position) -> None:
        """Writes the state, or starts writing it; waits first for a save in progress.

        Args:
            state: nested dict whose first keys are the parts; tensors by their full names, sharded
                ones as DTensors. Values that several processes hold under one name must be equal.

        Raises:
            CheckpointError: on every process; earlier checkpoints are untouched.
        """
        self.wait()
        partial = self._on_first(lambda: make_partial(self.root, position.iteration), None)
        self.check_shared(partial, partial)
        writer = ShardWriter(partial, position, staged=self.asynchronous)
        self._pending = _Pending(partial, position.iteration, self._start(state, writer))
        if not self.asynchronous:
            self.wait()

    @property
    def under_way(self) -> bool:
        """Whether a save has started but not finished."""
        return self._pending is not None

    def poll(self) -> None:
        """Finishes the save in progress if every process has written its part."""
        pending = self._pending
        if pending and all(gather_objects(self.process, pending.written.done())):
            self.wait()

    def wait(self) -> Path | None:
        """Finishes the save in progress; returns the newest checkpoint that this run has saved."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            wait([pending.written])
            self._publish(pending)
        return self._newest[1] if self._newest else None

    def has(self, iteration: int) -> bool:
        """Whether the newest save, finished or not, is that of this iteration."""
        if self._pending is not None:
            return self._pending.iteration == iteration
        return self._newest is not None and self._newest[0] == iteration

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy on the CPU of what ``state`` holds now, to pass to the next ``save``."""
        return self._own.stage(state)

    def _start(self, state: dict[str, Any], writer: ShardWriter) -> Future[Any]:
        if self.asynchronous:
            begun = dcp.async_save(
                state,
                storage_writer=writer,
                async_stager=self._copies,
                process_group=self.group,
                no_dist=self.group is None,
            )
            assert isinstance(begun, Future)
            return begun
        done: Future[Any] = Future()
        try:
            done.set_result(
                dcp.save(
                    state,
                    storage_writer=writer,
                    process_group=self.group,
                    no_dist=self.group is None,
                )
            )
        except CheckpointException as error:
            done.set_exception(error)
        return done

    def _publish(self, pending: _Pending) -> None:
        error = pending.written.exception()
        if isinstance(error, CheckpointException):
            self._give_up(pending.partial, first_failure(error), error)
        if error is not None:  # not a write failure: another process has exited
            raise error
        self._on_first(lambda: publish(pending.partial, self.keep), pending.partial)
        self._newest = (pending.iteration, final_path(pending.partial))

    def _on_first(self, do: Callable[[], T], partial: Path | None) -> T:
        """Calls ``do`` on the first process; returns its result, or raises its failure, on all."""
        result, failure = None, ""
        if self.process.rank == 0:
            try:
                result = do()
            except OSError as error:
                failure = in_one_line(error)
        result, failure = gather_objects(self.process, (result, failure))[0]
        if failure:
            self._give_up(partial, failure, None)
        return result  # type: ignore[return-value]

    def check_shared(self, path: Path, partial: Path | None = None) -> None:
        """Checks that every process sees the path that the first one created. Otherwise every host
        would write to its own disk, and no checkpoint would be complete.

        Args:
            partial: folder to remove if a process does not see the path.

        Raises:
            CheckpointError: on every process.
        """
        deadline = monotonic() + SEEN_WITHIN
        while not (is_seen := path.exists()) and monotonic() < deadline:
            sleep(0.1)  # network file systems show new files with a delay
        blind = [
            rank for rank, seen in enumerate(gather_objects(self.process, is_seen)) if not seen
        ]
        if blind:
            self._give_up(
                partial,
                f"process {blind[0]} does not see {path}",
                None,
                "set --run.folder to a file system that all hosts share",
            )

    def _give_up(
        self,
        partial: Path | None,
        reason: str,
        cause: BaseException | None,
        remedy: str = "free some disk space",
    ) -> NoReturn:
        if partial is not None and self.process.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        try:
            newest = latest(self.root)
        except CheckpointError:  # the one that is being given up may have lost its pointer
            newest = next(iter(newest_first(self.root)), None)
        left = f"the newest complete checkpoint is {newest}" if newest else "none was saved before"
        what = final_path(partial) if partial else f"in {self.root}"
        raise CheckpointError(
            f"checkpoint {what} could not be written ({reason}); {left}; {remedy}, then "
            "continue with --run.resume true"
        ) from cause
