"""Encodes prompts in advance, in any number of processes; can be resumed."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from mixgrpo.checks import ENCODING_BOUNDS, check_bounds
from mixgrpo.config import ModelConfig, PreprocessConfig, flatten
from mixgrpo.engines.distributed import Process, process_group
from mixgrpo.files.disk import PARTIAL, existing, own_folder
from mixgrpo.models import TextEncoder
from mixgrpo.models.registry import family_of
from mixgrpo.models.text import TextEncoders
from mixgrpo.text.embeddings import (
    Encoder,
    Index,
    finished_record,
    read_index,
    shard_path,
    take_records,
    write_index,
    write_shard,
)
from mixgrpo.text.negative import encoded_texts
from mixgrpo.text.prompt_files import PromptList
from mixgrpo.text.prompts import read_prompts
from mixgrpo.types import TextEmbedding

GIB = 2**30


def preprocess(config: PreprocessConfig) -> None:
    """Encodes the files' prompts into the output folder; complete shards are kept.

    Raises:
        ValueError, FileNotFoundError: an error that the user can fix, before anything is loaded.
        OSError: a shard could not be written.
    """
    with process_group(config.threads) as process:
        check_bounds(flatten(config), ENCODING_BOUNDS)
        files = [read_prompts(path, "prompts_files") for path in config.prompts_files]
        model = _model(config)
        prompts = _to_encode(files, config, model)
        folder = Path(config.output)
        with process.first(own_folder(config.output, "output")):
            before = _read_before(folder, TextEncoders.identify(model))
            index = before.extended(prompts, config.shard_size)
            _check_space(folder, index, TextEncoders.bytes_per_prompt(model))
            if process.rank == 0:
                _prepare(folder, before, index)
            _wait(process)
            load = functools.cache(functools.partial(TextEncoders.load, model, process.device))
            _make_shards(folder, index, load, process, config.progress)
            _wait(process)
            if process.rank == 0:
                _tell(folder, take_records(folder, index), config.model.text_length)


def _model(config: PreprocessConfig) -> ModelConfig:
    return ModelConfig(
        family=config.model.family,
        path=config.model.path,
        text_length=config.model.text_length,
        compute_dtype=config.dtype,
    )


def _to_encode(
    files: Sequence[PromptList], config: PreprocessConfig, model: ModelConfig
) -> list[str]:
    """The prompts of all files, and the negative prompts where the family has guidance."""
    family, given = family_of(model), config.negative_prompt
    if family.negative is None:
        if given is None:
            return encoded_texts(files, None)
        raise ValueError(
            f"negative_prompt is {given!r}, but {family.title} has no classifier-free guidance; "
            "leave --negative_prompt out"
        )
    default = family.negative if given is None else given
    return [*encoded_texts(files, default), default]  # also where every prompt has its own


def _read_before(folder: Path, encoder: Encoder) -> Index:
    """The folder's existing index, or an empty one.

    Raises:
        ValueError: the folder holds embeddings of another encoder, or shards without an index.
    """
    index, has_shards = read_index(folder), any(folder.glob("shard_*"))
    if not has_shards and (index is None or index.encoder != encoder):
        return Index(encoder, [])
    if index is None:
        raise ValueError(
            f"output is {str(folder)!r}, which holds shards but no index.json that lists their "
            "prompts; delete them, or choose another --output"
        )
    differing = [key for key, value in encoder.items() if index.encoder.get(key) != value]
    if differing:
        raise ValueError(
            f"output is {str(folder)!r}, which holds embeddings made with another "
            f"{', another '.join(differing)}; delete it, or choose another --output"
        )
    return index


def _check_space(folder: Path, index: Index, bytes_per_prompt: int) -> None:
    missing = [
        len(shard.prompts)
        for number, shard in enumerate(index.shards)
        if not shard_path(folder, number).exists()
    ]
    needed = sum(missing) * bytes_per_prompt
    free = shutil.disk_usage(existing(folder)).free
    if needed > free:
        raise ValueError(
            f"output is {str(folder)!r}: the embeddings of {sum(missing)} prompts take "
            f"{needed / GIB:.1f} GiB, but only {free / GIB:.1f} GiB are free there; free some disk "
            "space, or choose another --output"
        )


def _prepare(folder: Path, before: Index, index: Index) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(f"{PARTIAL}*"):
        abandoned.unlink()
    if index != before or not before.shards:
        write_index(folder, index)


def _wait(process: Process) -> None:
    if process.world_size > 1:
        dist.barrier()


def _make_shards(
    folder: Path,
    index: Index,
    load: Callable[[], TextEncoder],
    process: Process,
    progress: bool,
) -> None:
    """Writes every world_size-th shard, unless it is already complete."""
    mine = range(process.rank, len(index.shards), process.world_size)
    bar = tqdm(
        total=sum(len(index.shards[number].prompts) for number in mine),
        unit="prompt",
        desc="encoding" if process.world_size == 1 else f"encoding, 1/{process.world_size} of all",
        disable=not progress or process.rank != 0,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
    )
    with bar:
        for number in mine:
            shard = index.shards[number]
            if finished_record(folder, number, shard) is not None:
                bar.update(len(shard.prompts))
                continue
            _make_shard(folder, number, shard.prompts, load(), bar)


def _make_shard(
    folder: Path, number: int, prompts: list[str], encoder: TextEncoder, bar: tqdm
) -> None:
    each = []
    for prompt in prompts:
        each.append(encoder.encode([prompt]).to(torch.device("cpu")))
        bar.update()
    text = TextEmbedding.join(each)
    try:
        write_shard(folder, number, text, encoder.lengths(prompts))
    except OSError as error:
        raise OSError(
            f"{shard_path(folder, number)} could not be written ({error}); free some disk space, "
            "then run the same command again (finished shards are kept)"
        ) from error


def _tell(folder: Path, index: Index, text_length: int) -> None:
    records = [shard.record for shard in index.shards if shard.record]
    lengths = [length for record in records for length in record.lengths]
    size = sum(record.size for record in records) / GIB
    truncated = sum(length > text_length for length in lengths)
    if truncated:
        print(
            f"warning: {truncated} of {len(lengths)} prompts exceed the text encoder's maximum "
            "length and are truncated"
        )
    print(
        f"{len(lengths)} prompts in {len(records)} shards, {size:.3f} GiB, in {folder}; "
        f"train with --text.mode embeddings --text.embeddings {folder}"
    )
