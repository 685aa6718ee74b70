"""Stores the state's tensors with torch.distributed.checkpoint, with digests and without code.

Every process writes what it holds; tensors that all processes hold are divided among them, so that
each is written once. Reading fills given tensors from the parts of files that they need, so that
the number of processes and the sharding may differ from those at saving.
"""

from __future__ import annotations

import io
import os
import queue
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.futures import Future

from mixgrpo.checkpoint.folder import CheckpointError
from mixgrpo.checkpoint.index import bytes_of, read_index
from mixgrpo.checkpoint.manifest import FileDigest, Position, new_digest, write_manifest
from mixgrpo.files.messages import in_one_line
from mixgrpo.files.regular import check_regular

# Running a single process without torch.distributed is intended.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


class ShardWriter(dcp.FileSystemWriter):
    """Writes each part of the state, given by its first key, to a separate file.

    The weights can then be read and verified without the other parts.
    """

    def __init__(self, folder: Path, position: Position, staged: bool) -> None:
        """``staged``: the tensors are on the CPU, and the writing thread may have no GPU."""
        ahead = 0 if staged else 10_000_000
        super().__init__(folder, sync_files=False, per_thread_copy_ahead=ahead)
        self.position = position
        self.files = _DigestedFiles()
        self.fs = self.files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        """Writes this process's items; returns DCP's results and the files' digests."""
        parts: dict[str, list[Any]] = {}
        for item in plan.items:
            parts.setdefault(item.index.fqn.partition(".")[0], []).append(item)
        files: queue.Queue[Any] = queue.Queue()
        for part, items in parts.items():
            name = f"{part}_{self.rank or 0:05d}.distcp"
            files.put((Path(self.path) / name, name, items))
        try:
            results = self._write_data(planner, files).value()
        except RuntimeError as error:
            raise _disks_own(error) or error from error
        written: Future[Any] = Future()
        written.set_result((results, self.files.digests))
        return written

    def storage_meta(self) -> None:
        """Returns None, since the metadata would name a folder that is renamed later."""

    def finish(self, metadata: Metadata, results: list[Any]) -> None:
        """Called on rank 0 after all have written; writes the index, then the manifest."""
        super().finish(metadata, [written for written, _ in results])
        digests = dict(self.files.digests)  # with the index's
        for _, theirs in results:
            digests |= theirs
        write_manifest(Path(self.path), self.position, digests)


def _disks_own(error: BaseException | None) -> OSError | None:
    """The OSError behind an error: torch.save hides it when it cannot close its archive."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class _DigestedFiles(FileSystem):
    """Files that are flushed to the disk when they are closed, and whose digests are recorded."""

    def __init__(self) -> None:
        self.digests: dict[str, FileDigest] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb"
        with _DigestedFile(path) as stream:
            yield stream
        # The index is first written under a temporary name.
        name = Path(path).name.removesuffix(".tmp")
        self.digests[name] = FileDigest(stream.size, stream.digest.hexdigest())


class _DigestedFile(io.BufferedWriter):
    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(io.FileIO(path, "w"), 1 << 20)
        self.digest = new_digest()
        self.size = 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        written = super().write(data)
        self.size += written
        return written

    def close(self) -> None:
        if self.closed:
            return
        try:
            self.flush()
            os.fsync(self.fileno())
        finally:
            super().close()


class Shards:
    """Reads a checkpoint's tensors.

    Except for ``read`` with a ``group``, every method works in a single process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reader = _Reader(path)

    def read(self, state: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
        """Fills the tensors of a nested dict in place, and replaces its other leaves.

        Args:
            group: the processes that read together; None for a single process.

        Raises:
            CheckpointError: a value is missing, has another shape, or cannot be read.
        """
        try:
            dcp.load(
                state,
                storage_reader=self.reader,
                planner=_Planner(),
                process_group=group,
                no_dist=group is None,
            )
        except CheckpointException as error:
            # torch reports a fault of the index as a missing one.
            reason = self.reader.fault or first_failure(error)
            raise CheckpointError(
                f"checkpoint {self.path} cannot be read ({reason}); use another checkpoint"
            ) from error

    def shapes(self, part: str) -> dict[str, Tensor]:
        """Name -> tensor on the meta device; empty if the checkpoint has no such part.

        Raises:
            CheckpointError: the index is missing or damaged.
        """
        found = {}
        try:
            described = self.reader.read_metadata().state_dict_metadata
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {self.path} has no index that can be read ({error}); use another "
                "checkpoint"
            ) from error
        for key, tensor in described.items():
            if key.startswith(f"{part}.") and isinstance(tensor, TensorStorageMetadata):
                found[key.removeprefix(f"{part}.")] = torch.empty(
                    tensor.size, dtype=tensor.properties.dtype, device="meta"
                )
        there = bytes_of(self.path, f"{part}_")
        if sum(tensor.nbytes for tensor in found.values()) > there:
            raise CheckpointError(
                f"checkpoint {self.path} is damaged: its index describes more than the {there} "
                f"bytes of {part}; use another checkpoint"
            )
        return found

    def tensors(self, part: str, names: Iterable[str]) -> Iterator[Tensor]:
        """These tensors of a part on the CPU, read one by one."""
        shapes = self.shapes(part)
        for name in names:
            tensor = torch.empty_like(shapes[name], device="cpu")
            self.read({part: {name: tensor}})
            yield tensor

    def whole(self, part: str) -> dict[str, Tensor]:
        """All of a part's tensors, on the CPU."""
        tensors = {n: torch.empty_like(t, device="cpu") for n, t in self.shapes(part).items()}
        self.fill(part, tensors)
        return tensors

    def fill(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Copies the part's tensors into these, by their names, in their dtype."""
        self.read({part: dict(tensors)})


class _Reader(dcp.FileSystemReader):
    """Reads the index once, and tensors only from regular files.

    Attributes:
        fault: why the index could not be read.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fault: OSError | ValueError | None = None
        self._index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self.fault is not None:
            raise self.fault
        if self._index is None:
            try:
                self._index = read_index(Path(self.path))
            except (OSError, ValueError) as error:
                self.fault = error
                raise
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for name in {self.storage_data[item.storage_index].relative_path for item in plan.items}:
            check_regular(Path(self.path) / name)
        return super().read_data(plan, planner)


class _Planner(dcp.DefaultLoadPlanner):
    """Loads leaves that are not tensors as numbers, strings and lists of them, never as code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        content = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), content)
        content.seek(0)
        super().load_bytes(read_item, content)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan


def first_failure(error: CheckpointException) -> str:
    """The first failure of DCP in one line, with its rank."""
    rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
    text = in_one_line(cause)
    return text if len(error.failures) == 1 and rank == 0 else f"rank {rank}: {text}"
