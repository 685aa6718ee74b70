"""Stored embeddings that replace the text encoders."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mixgrpo.config import Config
from mixgrpo.text.embeddings import Encoder, Index, read_index, read_row, shard_path
from mixgrpo.types import TextEmbedding


class StoredText:
    """See ``mixgrpo.models.Text``. Reads only the embeddings of the requested prompts.

    Args:
        folder: folder that ``python -m mixgrpo preprocess`` wrote.
        index: its index, with all shards finished.
        device: device on which embeddings are returned.
        remedy: the command that creates the embeddings again, for messages.
    """

    def __init__(self, folder: Path, index: Index, device: torch.device, remedy: str) -> None:
        self.folder = folder
        self.index = index
        self.device = device
        self.remedy = remedy
        self.places = {
            prompt: (number, row)
            for number, shard in enumerate(index.shards)
            for row, prompt in enumerate(shard.prompts)
        }

    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        text = TextEmbedding.join([self._read(*self.places[prompt]) for prompt in prompts])
        return text.moved(self._to_device)

    def _read(self, number: int, row: int) -> TextEmbedding:
        try:
            return read_row(self.folder, number, self.index.shards[number], row)
        except ValueError as error:
            raise ValueError(f"{error}; create it again with: {self.remedy}") from error

    def _to_device(self, values: Tensor) -> Tensor:
        if self.device.type == "cuda":
            values = values.pin_memory()  # copies from unpinned memory would block the host
        return values.to(self.device, non_blocking=True)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        limit = int(self.index.encoder["text_length"])
        return sum(self._length(*self.places[prompt]) > limit for prompt in prompts)

    def _length(self, number: int, row: int) -> int:
        record = self.index.shards[number].record
        assert record is not None
        return record.lengths[row]

    def check_shards(self, prompts: Sequence[str]) -> None:
        """Raises ValueError if a shard that these prompts need is missing or truncated."""
        for number in sorted({self.places[prompt][0] for prompt in prompts}):
            path, record = shard_path(self.folder, number), self.index.shards[number].record
            assert record is not None
            size = path.stat().st_size if path.exists() else 0
            if size != record.size:
                raise ValueError(
                    f"{path} has {size} bytes instead of {record.size}; create it again with: "
                    f"{self.remedy}"
                )


def open_stored(
    config: Config, encoder: Encoder, prompts: Sequence[str], device: torch.device
) -> StoredText:
    """The embeddings in ``text.embeddings``, checked against the model and the prompts.

    Args:
        encoder: the properties of the run's own model that affect embeddings.
        prompts: all prompts that the run will need.

    Raises:
        FileNotFoundError: the folder contains no embeddings.
        ValueError: the embeddings come from another encoder, are unfinished or damaged, or lack
            prompts.
    """
    folder, remedy = Path(config.text.embeddings), preprocess_command(config)
    index = read_index(folder)
    if index is None:
        raise FileNotFoundError(
            f"text.embeddings is {str(folder)!r}, which contains no index.json; create it with: "
            f"{remedy}"
        )
    _check_encoder(folder, index.encoder, encoder)
    unfinished = sum(shard.record is None for shard in index.shards)
    if unfinished:
        raise ValueError(
            f"text.embeddings is {str(folder)!r}, where {unfinished} of {len(index.shards)} shards "
            f"are not finished; finish them with: {remedy}"
        )
    stored = StoredText(folder, index, device, remedy)
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in stored.places]
    if missing:
        raise ValueError(
            f"text.embeddings is {str(folder)!r}, which lacks {len(missing)} of "
            f"{len(set(prompts))} training and validation prompts, the first of them "
            f"{missing[0]!r}; add them with: {remedy}"
        )
    stored.check_shards(prompts)
    return stored


def _check_encoder(folder: Path, theirs: Encoder, ours: Encoder) -> None:
    differing = [
        f"{key} ({theirs.get(key)} there, {value} here)"
        for key, value in ours.items()
        if theirs.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"text.embeddings is {str(folder)!r}, whose embeddings were made with another "
            f"{', another '.join(differing)}; set --model.path, --model.text_length and "
            "--model.compute_dtype (there: --dtype) to the values that they were made with, or "
            "create new embeddings with `python -m mixgrpo preprocess` in another --output"
        )


def preprocess_command(config: Config) -> str:
    """The command that creates the embeddings that a run needs."""
    files = dict.fromkeys([config.batch.prompts_file, config.validation.prompts_file])
    words = ["python", "-m", "mixgrpo", "preprocess", "--model.path", config.model.path]
    words += ["--model.text_length", str(config.model.text_length)]
    words += ["--dtype", config.model.compute_dtype, "--prompts_files", *files]
    if config.guidance.negative_prompt is not None:
        words += ["--negative_prompt", config.guidance.negative_prompt]
    return shlex.join([*words, "--output", config.text.embeddings])
