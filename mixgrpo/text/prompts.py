"""Reads prompt files, and selects the prompts of each iteration."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from mixgrpo.files.regular import MIB, read_regular
from mixgrpo.noise import key_seed
from mixgrpo.text.prompt_files import PromptList, parse
from mixgrpo.types import Metadata

LARGEST = 512 * MIB


def read_prompts(path: str, knob: str) -> PromptList:
    """The prompts of a UTF-8 file: plain text with one per line, or JSONL with a key ``prompt``.

    Blank lines are skipped, duplicates kept. In JSONL, the other keys are a prompt's metadata.

    Args:
        knob: the dotted name of the setting that holds ``path``, for the messages.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: it cannot be read.
        ValueError: it is not a regular file, too large, of another format, damaged, or contains no
            prompts.
    """
    remedy = f"set --{knob} to a file of prompts, plain text or JSONL"
    try:
        if not Path(path).exists() or Path(path).is_dir():
            raise FileNotFoundError(f"{knob} is {path!r}, which is not a file; {remedy}")
        content = read_regular(Path(path), LARGEST)
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{knob} is {path!r}, which cannot be read ({error}); {remedy}") from error
    try:
        return parse(content, path)
    except ValueError as error:
        raise ValueError(f"{knob} is {path!r}, {error}") from error


@dataclass(frozen=True)
class PromptBatch:
    """One process's prompts of one iteration.

    Attributes:
        texts: P prompts.
        metadata: their metadata, P dicts.
        positions: their positions in the global batch, which determine their noise.
    """

    texts: list[str]
    metadata: list[Metadata]
    positions: list[int]


@dataclass(frozen=True)
class PromptBatches:
    """The prompts of every iteration: epochs over the file, each in a different order.

    A pure function of (seed, iteration); each process takes a consecutive part of the global batch.
    """

    prompts: PromptList
    per_iteration: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def at(self, iteration: int) -> PromptBatch:
        count = self.per_iteration // self.world_size
        positions = [self.rank * count + i for i in range(count)]
        places = [self._draw(iteration * self.per_iteration + position) for position in positions]
        texts = [self.prompts.texts[place] for place in places]
        return PromptBatch(texts, [self.prompts.metadata[place] for place in places], positions)

    def _draw(self, index: int) -> int:
        """The place in the file of the prompt that is drawn after ``index`` others."""
        epoch, place = divmod(index, len(self.prompts))
        return _order(self.seed, epoch, len(self.prompts))[place]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(key_seed(seed, epoch))
    return torch.randperm(count, generator=generator).tolist()
