"""Reads prompt files, and selects the prompts of each iteration."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mixgrpo.noise import key_seed


def read_prompts(path: str, knob: str) -> list[str]:
    """The prompts of a UTF-8 text file, one per line; blank lines are skipped, duplicates kept.

    Args:
        knob: the dotted name of the setting that holds ``path``, for the messages.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not UTF-8, or contains no prompts.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"{knob} is {path!r}, which is not a file; set --{knob} to a text file of prompts"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{knob} is {path!r}, which is not UTF-8 (line {line}); save it as UTF-8"
        ) from error
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(
            f"{knob} is {path!r}, which contains no prompts; write one prompt per line"
        )
    return prompts


@dataclass(frozen=True)
class PromptBatch:
    """One process's prompts of one iteration.

    Attributes:
        texts: P prompts.
        positions: their positions in the global batch, which determine their noise.
    """

    texts: list[str]
    positions: list[int]


@dataclass(frozen=True)
class PromptBatches:
    """The prompts of every iteration: epochs over the file, each in a different order.

    A pure function of (seed, iteration); each process takes a consecutive part of the global batch.
    """

    prompts: Sequence[str]
    per_iteration: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def at(self, iteration: int) -> PromptBatch:
        count = self.per_iteration // self.world_size
        positions = [self.rank * count + i for i in range(count)]
        texts = [self._draw(iteration * self.per_iteration + position) for position in positions]
        return PromptBatch(texts, positions)

    def _draw(self, index: int) -> str:
        epoch, place = divmod(index, len(self.prompts))
        return self.prompts[_order(self.seed, epoch, len(self.prompts))[place]]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(key_seed(seed, epoch))
    return torch.randperm(count, generator=generator).tolist()
