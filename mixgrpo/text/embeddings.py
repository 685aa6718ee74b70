"""Stored text embeddings: a folder of shards and their index.

``shard_00000.safetensors`` holds the embeddings of n prompts: ``tokens`` [n, L, C_text] and, where
the model has them, ``pooled`` [n, C_pooled] and ``lengths`` [n], the tokens of each prompt that are
not padding. ``index.json`` records the encoder, every shard's prompts, and the checksums of
finished shards. Until it is added to the index, a finished shard's record is a file next to the
shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mixgrpo.files.disk import write_text_whole, write_whole
from mixgrpo.files.json_files import read_json
from mixgrpo.files.messages import in_one_line
from mixgrpo.files.regular import MIB
from mixgrpo.types import TextEmbedding

MOST = 2048 * MIB  # size of an index, which lists all prompts
Encoder = dict[str, str | int]  # property that affects embeddings -> its digest or value


@dataclass(frozen=True)
class Record:
    """What is known about a finished shard.

    Attributes:
        size: size of the file in bytes.
        checksum: BLAKE2b digest of the file.
        digests: BLAKE2b digest of each prompt's values, so that single prompts can be verified.
        lengths: number of tokens of each prompt before truncation.
    """

    size: int
    checksum: str
    digests: list[str]
    lengths: list[int]


@dataclass(frozen=True)
class Shard:
    """The prompts of one file; the record is None until the shard is finished."""

    prompts: list[str]
    record: Record | None = None


@dataclass(frozen=True)
class Index:
    """All shards of a folder, in order, and the encoder that made them."""

    encoder: Encoder
    shards: list[Shard]

    def extended(self, prompts: Iterable[str], shard_size: int) -> Index:
        """The index with additional shards for the prompts that it does not contain, each once."""
        known = {prompt for shard in self.shards for prompt in shard.prompts}
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        parts = [new[start : start + shard_size] for start in range(0, len(new), shard_size)]
        return Index(self.encoder, [*self.shards, *map(Shard, parts)])


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:05d}.safetensors"


def _record_path(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:05d}.json"


def read_index(folder: Path) -> Index | None:
    """The folder's index; None if there is none.

    Raises:
        ValueError: the index cannot be read.
    """
    path = folder / "index.json"
    if not path.exists():
        return None
    try:
        found = read_json(path, MOST)
        shards = [
            Shard(shard["prompts"], shard["record"] and Record(**shard["record"]))
            for shard in found["shards"]
        ]
        return Index(dict(found["encoder"]), shards)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read as an index of embeddings ({error}); delete {folder} and make "
            "the embeddings again"
        ) from error


def write_index(folder: Path, index: Index) -> None:
    _write_json(folder / "index.json", asdict(index))


def _write_json(path: Path, content: object) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    write_text_whole(path, text)


def write_shard(folder: Path, number: int, text: TextEmbedding, lengths: list[int]) -> None:
    """Writes the embeddings of one shard's prompts, and its record.

    Raises:
        OSError: the shard cannot be written.
    """
    path = shard_path(folder, number)
    stored = {"tokens": text.tokens, "pooled": text.pooled, "lengths": text.lengths}
    tensors = {name: t.cpu().contiguous() for name, t in stored.items() if t is not None}
    _record_path(folder, number).unlink(missing_ok=True)
    data = save(tensors)  # not save_file, whose files only their owner can read
    write_whole(path, lambda partial: partial.write_bytes(data))
    digests = [_digest(text[row : row + 1]) for row in range(len(text))]
    record = Record(len(data), _new_digest(data).hexdigest(), digests, lengths)
    _write_json(_record_path(folder, number), asdict(record))


def finished_record(folder: Path, number: int, shard: Shard) -> Record | None:
    """The record next to a shard, or else the index's; None if the file does not match it."""
    beside, path = _record_path(folder, number), shard_path(folder, number)
    record = _read_record(beside, shard) or shard.record
    whole = record is not None and path.exists() and path.stat().st_size == record.size
    return record if record and whole and _checksum(path) == record.checksum else None


def take_records(folder: Path, index: Index) -> Index:
    """Moves the records next to the shards into the index."""
    beside = {number: _record_path(folder, number) for number in range(len(index.shards))}
    shards = [
        Shard(shard.prompts, _read_record(beside[number], shard) or shard.record)
        for number, shard in enumerate(index.shards)
    ]
    complete = Index(index.encoder, shards)
    if complete != index:
        write_index(folder, complete)
    for path in beside.values():
        path.unlink(missing_ok=True)
    return complete


def _read_record(path: Path, shard: Shard) -> Record | None:
    """The record in a file; None if there is none, or it is damaged, so that it is made again."""
    try:
        record = Record(**read_json(path))
        count = len(record.digests), len(record.lengths)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return record if count == (len(shard.prompts), len(shard.prompts)) else None


def read_row(folder: Path, number: int, shard: Shard, row: int) -> TextEmbedding:
    """Reads and verifies a single prompt of a finished shard; N = 1.

    Raises:
        ValueError: the file is missing or damaged.
    """
    path = shard_path(folder, number)
    assert shard.record is not None
    try:
        with safe_open(path, "pt") as opened:
            names = [*opened.keys()]
            found = {name: opened.get_slice(name)[row : row + 1].clone() for name in names}
            text = _without_padding(TextEmbedding(**found))
    except (SafetensorError, OSError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({in_one_line(error)})") from error
    if _digest(text) != shard.record.digests[row]:
        raise ValueError(
            f"{path} is damaged: the embedding of {shard.prompts[row]!r} differs from what was "
            "stored"
        )
    return text


def _without_padding(text: TextEmbedding) -> TextEmbedding:
    """The embedding of one prompt, cut to its length."""
    return TextEmbedding(text.tokens[:, : int(text.true_lengths)], text.pooled)


def _digest(text: TextEmbedding) -> str:
    """Digest of the values of one prompt."""
    digest, bare = _new_digest(), _without_padding(text)
    for tensor in (bare.tokens, bare.pooled):
        if tensor is not None:
            values = tensor[0].cpu().contiguous().view(torch.uint8)
            digest.update(values.numpy().data)
    return digest.hexdigest()


def _new_digest(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=16)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _new_digest).hexdigest()
