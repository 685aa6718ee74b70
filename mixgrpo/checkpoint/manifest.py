"""``state.json``: where a run was, by which settings, and what the files beside it must hold.

torch.distributed.checkpoint notices a file that is cut short at best; a flipped bit becomes a
weight. So every file's digest is taken while it is written, and compared before it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mixgrpo.checkpoint.folder import CheckpointError
from mixgrpo.files.disk import flush

MANIFEST = "state.json"
_VERSION = 2
_CHUNK = 1 << 22
_READERS = 4  # files that are read at once; a disk array gives one reader but a part of its speed


class Damaged(CheckpointError):
    """A checkpoint is not what was saved; the message names the file."""


@dataclass(frozen=True)
class Position:
    """Where a run is.

    Attributes:
        iteration: iterations that are done.
        ema_updates: updates that the average of the weights has had; 0 if none is kept.
        config: the run's configuration, dotted path -> value.
        kl_weight: of the KL to the reference, which may have been adapted.
    """

    iteration: int
    ema_updates: int
    config: dict[str, Any]
    kl_weight: float = 0.0


@dataclass(frozen=True)
class FileDigest:
    """What tells a file's contents: its length in bytes, and BLAKE2b over all of it."""

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
    """128 bits: accidents, not attackers, are to be told."""
    return hashlib.blake2b(digest_size=16)


def write_manifest(folder: Path, position: Position, files: Mapping[str, FileDigest]) -> None:
    """Writes and flushes ``state.json``; it must be the last file of a checkpoint."""
    content = {
        "version": _VERSION,
        **asdict(position),
        "files": {name: asdict(files[name]) for name in sorted(files)},
    }
    text = json.dumps({**content, "digest": _digest_of(content)}, indent=1)
    (folder / MANIFEST).write_text(text + "\n")
    flush(folder / MANIFEST)
    flush(folder)


def open_saved(path: Path) -> Saved:
    """Reads ``state.json``, and nothing else.

    Raises:
        Damaged: it is damaged or missing.
        CheckpointError: it is another version's.
    """
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if content.get("version") != _VERSION:
            raise CheckpointError(
                f"checkpoint {path} was written by another version of mixgrpo, and only that one "
                "reads it; train into another --run.folder"
            )
        if content.pop("digest") != _digest_of(content):
            raise Damaged(f"checkpoint {path} is damaged: {MANIFEST} was altered")
        files = {name: FileDigest(**digest) for name, digest in content["files"].items()}
        position = Position(**{field.name: content[field.name] for field in fields(Position)})
    except FileNotFoundError as error:
        raise Damaged(f"checkpoint {path} is damaged: {MANIFEST} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(
            f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({_first_line(error)})"
        ) from error
    return Saved(path, position, files)


def verify(saved: Saved, names: Iterable[str]) -> None:
    """Compares these files' sizes; then reads them whole and compares their digests.

    Raises:
        Damaged: naming the first that is not what was saved.
    """
    wanted = list(names)
    for name in wanted:
        _check_size(saved.path / name, saved.files[name].size)
    with ThreadPoolExecutor(_READERS) as readers:  # hashing lets other threads run
        found = readers.map(lambda name: _digest_of_file(saved.path / name), wanted)
        for name, digest in zip(wanted, found, strict=True):
            if digest != saved.files[name].blake2b:
                raise Damaged(
                    f"checkpoint {saved.path} is damaged: {name} is not what was saved (other "
                    "contents of the same size)"
                )


def _check_size(file: Path, size: int) -> None:
    try:
        found = os.path.getsize(file)
    except OSError as error:
        raise Damaged(f"checkpoint {file.parent} is damaged: {file.name} is missing") from error
    if found != size:
        raise Damaged(
            f"checkpoint {file.parent} is damaged: {file.name} has {found} bytes, {size} were saved"
        )


def _digest_of(content: Mapping[str, Any]) -> str:
    digest = new_digest()
    digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()


def _digest_of_file(file: Path) -> str:
    digest = new_digest()
    try:
        with file.open("rb", buffering=0) as opened:
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise Damaged(
            f"checkpoint {file.parent} is damaged: {file.name} cannot be read "
            f"({_first_line(error)})"
        ) from error
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
