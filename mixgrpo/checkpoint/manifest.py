"""``state.json``: a run's position and settings, and the digests of the checkpoint's files.

torch.distributed.checkpoint detects truncated files at best; a flipped bit silently changes a
weight. Each file's digest is therefore computed while it is written and verified before it is read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mixgrpo.checkpoint.folder import CheckpointError
from mixgrpo.files.disk import flush
from mixgrpo.files.messages import in_one_line
from mixgrpo.files.pointer import is_plain_name
from mixgrpo.files.regular import MIB, check_regular, open_regular, read_regular

MANIFEST = "state.json"
_VERSION = 2
_MOST = 64 * MIB  # ten thousand files take one
_CHUNK = 1 << 22
_READERS = 4  # files read in parallel; a single reader does not saturate a disk array


class Damaged(CheckpointError):
    """A checkpoint differs from what was saved; the message names the file."""


@dataclass(frozen=True)
class Position:
    """A run's position.

    Attributes:
        iteration: number of completed iterations.
        ema_updates: number of updates of the weights' moving average; 0 if none is kept.
        config: the run's configuration, dotted path -> value.
        kl_weight: current weight of the KL divergence from the reference, which may be adaptive.
    """

    iteration: int
    ema_updates: int
    config: dict[str, Any]
    kl_weight: float = 0.0


@dataclass(frozen=True)
class FileDigest:
    """Identifies a file's contents: its size in bytes, and the BLAKE2b digest of all of it."""

    size: int
    blake2b: str


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk: its folder, its position, and its files' digests by their names."""

    path: Path
    position: Position
    files: Mapping[str, FileDigest]

    def files_of(self, part: str) -> list[str]:
        """The names of the files that hold a part of the state, and of the index."""
        return sorted(n for n in self.files if n.startswith((f"{part}_", ".")))


def new_digest() -> hashlib.blake2b:
    """128 bits suffice, since digests detect accidents, not attacks."""
    return hashlib.blake2b(digest_size=16)


def write_manifest(folder: Path, position: Position, files: Mapping[str, FileDigest]) -> None:
    """Writes and flushes ``state.json``; it must be the last file of a checkpoint."""
    content = {
        "version": _VERSION,
        **asdict(position),
        "files": {name: asdict(files[name]) for name in sorted(files)},
    }
    text = json.dumps({**content, "digest": _digest_of(content)}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    flush(folder / MANIFEST)
    flush(folder)


def open_saved(path: Path) -> Saved:
    """Reads only ``state.json``.

    Raises:
        Damaged: it is damaged or missing.
        CheckpointError: another version of mixgrpo wrote it.
    """
    try:
        content = json.loads(read_regular(path / MANIFEST, _MOST))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        if content.get("version") != _VERSION:
            raise CheckpointError(
                f"checkpoint {path} was written by another version of mixgrpo, and only that "
                "version can read it; train in another --run.folder"
            )
        if content.pop("digest") != _digest_of(content):
            raise Damaged(f"checkpoint {path} is damaged: {MANIFEST} was altered")
        files = {name: FileDigest(**digest) for name, digest in content["files"].items()}
        position = Position(**{field.name: content[field.name] for field in fields(Position)})
        _check_types(position, files)
    except FileNotFoundError as error:
        raise Damaged(f"checkpoint {path} is damaged: {MANIFEST} is missing") from error
    except (*(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError),) as error:
        raise Damaged(
            f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({in_one_line(error)})"
        ) from error
    return Saved(path, position, files)


def _check_types(position: Position, files: Mapping[str, FileDigest]) -> None:
    """Raises ValueError for what no run saves, such as a file outside the checkpoint's folder."""
    counts = [position.iteration, position.ema_updates, *(file.size for file in files.values())]
    if any(type(count) is not int or count < 0 for count in counts):
        raise ValueError("it holds an impossible number")
    if type(position.kl_weight) not in (int, float) or not math.isfinite(position.kl_weight):
        raise ValueError("kl_weight is not a number")
    if not isinstance(position.config, dict):
        raise ValueError("config is not an object")
    if not all(map(is_plain_name, files)):
        raise ValueError("it names a file outside its folder")


def verify(saved: Saved, names: Iterable[str]) -> None:
    """Compares the sizes of these files, then reads them completely and compares their digests.

    Raises:
        Damaged: a file differs from what was saved; the message names the first one.
    """
    wanted = list(names)
    for name in wanted:
        _check_size(saved.path / name, saved.files[name].size)
    with ThreadPoolExecutor(_READERS) as readers:  # hashing releases the GIL
        found = readers.map(lambda name: _digest_of_file(saved.path / name), wanted)
        for name, digest in zip(wanted, found, strict=True):
            if digest != saved.files[name].blake2b:
                raise Damaged(
                    f"checkpoint {saved.path} is damaged: {name} differs from what was saved (same "
                    "size, different contents)"
                )


def _check_size(file: Path, size: int) -> None:
    try:
        check_regular(file)
        found = file.stat().st_size
    except OSError as error:
        raise Damaged(f"checkpoint {file.parent} is damaged: {file.name} is missing") from error
    except ValueError as error:
        raise Damaged(f"checkpoint {file.parent} is damaged: {error}") from error
    if found != size:
        raise Damaged(
            f"checkpoint {file.parent} is damaged: {file.name} has {found} bytes, but {size} were "
            "saved"
        )


def _digest_of(content: Mapping[str, Any]) -> str:
    digest = new_digest()
    digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()


def _digest_of_file(file: Path) -> str:
    digest = new_digest()
    try:
        with open_regular(file) as opened:
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)
    except (OSError, ValueError) as error:
        raise Damaged(
            f"checkpoint {file.parent} is damaged: {file.name} cannot be read "
            f"({in_one_line(error)})"
        ) from error
    return digest.hexdigest()
