"""Finds the files that hold one model's weights: single files, shards, variants."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mixgrpo.files.forms import SAFETENSORS, form_of_folder, readable_form
from mixgrpo.files.json_files import read_json
from mixgrpo.files.regular import MIB

NAME = "diffusion_pytorch_model.safetensors"  # diffusers' name for a model's weights
_LARGEST_INDEX = 64 * MIB
_VARIANT = r"(?:\.(?P<{}>fp16|bf16|fp32|ema|non_ema|fp8\w*))?"
_WEIGHTS = re.compile(
    rf"(?P<stem>.+?){_VARIANT.format('variant')}(?P<shard>-(?P<number>\d+)-of-(?P<count>\d+))?"
    rf"{_VARIANT.format('late')}\.(?P<suffix>safetensors|bin|pt|pth|ckpt)"
)
_INDEX = re.compile(
    rf"(?P<stem>.+?)\.(?P<suffix>safetensors|bin)\.index{_VARIANT.format('variant')}\.json"
)
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # as libraries call them
# What accelerate, the Trainer and DeepSpeed write beside the weights. It is left out when a folder
# is searched, not when such a file is named.
_NO_WEIGHTS = re.compile(
    r"(optimizer|scheduler|scaler|sampler|training_args|rng_state|random_).*|.*mp_rank_\d.*"
)


class NoWeights(FileNotFoundError):
    """A folder without weight files."""


@dataclass
class WeightSet:
    """Files that belong together by their names.

    Attributes:
        stem: the name without variant, numbers and suffix.
        variant: fp16, bf16 and so on; usually empty.
        suffix: safetensors, bin, pt, pth or ckpt.
        index: the index of several files, if there is one.
        shards: number -> file, of several files.
        counts: how many files there should be, according to their names.
        whole: the file that holds all weights, if there is one.
    """

    stem: str
    variant: str
    suffix: str
    index: Path | None = None
    whole: Path | None = None
    shards: dict[int, Path] = field(default_factory=dict)
    counts: set[int] = field(default_factory=set)

    @property
    def first(self) -> Path:
        """The file that stands for the set in messages."""
        return self.index or self.whole or next(iter(self.shards.values()))

    @property
    def rank(self) -> tuple[int, int, int]:
        """The set with the lowest rank is the one to read."""
        known = _STEMS.index(self.stem) if self.stem in _STEMS else len(_STEMS)
        return (self.suffix != SAFETENSORS, bool(self.variant), known)

    def files(self) -> list[Path]:
        """Raises FileNotFoundError, ValueError: a file is missing, or the set is ambiguous."""
        if self.whole and (self.index or self.shards):
            other = (self.index or next(iter(self.shards.values()))).name
            raise ValueError(
                f"{self.whole.parent} holds both {self.whole.name} and {other}; remove the files "
                "that are not meant"
            )
        if self.whole:
            return [self.whole]
        if self.index:
            return _of_index(self.index)
        if len(self.counts) > 1:
            raise ValueError(
                f"{self.first.parent} holds files of several sets, of {sorted(self.counts)} files; "
                "remove those that are not meant"
            )
        for number in range(1, max(self.counts) + 1):
            if number not in self.shards:
                raise FileNotFoundError(
                    f"{self.first} is one of {max(self.counts)} files, of which number {number} "
                    "is missing; download it"
                )
        return [self.shards[number] for number in sorted(self.shards)]


def find_shards(path: Path) -> list[Path]:
    """The files that hold the weights of ``path``, which is a file, an index or a folder.

    Shards that are numbered in their names need no index.

    Raises:
        FileNotFoundError: there are none, or one of several files is missing.
        ValueError: the index is not valid, or it cannot be decided which files are meant.
    """
    if path.is_dir():
        return find_set(path).files()
    if not path.exists() and not path.is_symlink():
        raise FileNotFoundError(f"{path} contains no weights: it does not exist")
    if path.name.endswith(".json"):
        return _of_index(path)
    named = _WEIGHTS.fullmatch(path.name)
    if named and named["shard"] and path.exists():
        return _group([path, *path.parent.iterdir()])[_key(named)].files()
    return [path]


def without_variant(name: str) -> str:
    """A weight file's name as it is where only one variant is stored."""
    named = _WEIGHTS.fullmatch(name)
    return f"{named['stem']}{named['shard'] or ''}.{named['suffix']}" if named else name


def find_set(folder: Path) -> WeightSet:
    """The weights in a folder.

    Raises:
        NoWeights: there are none.
        ValueError: there are several, or they are in a form that cannot be read.
    """
    weights = (path for path in folder.iterdir() if not _NO_WEIGHTS.fullmatch(path.name))
    ranked = sorted(_group(weights).values(), key=lambda each: each.rank)
    if not ranked:
        form = form_of_folder(folder)
        if form is not None:
            raise ValueError(f"{folder} is {form.words}; {form.remedy}")
        raise NoWeights(f"{folder} contains no weights: there is neither {NAME} nor its index")
    if len(ranked) > 1 and ranked[0].rank == ranked[1].rank:
        names = ", ".join(sorted(each.first.name for each in ranked))
        raise ValueError(f"{folder} holds several sets of weights ({names}); give one of the files")
    return ranked[0]


def _group(paths: Iterable[Path]) -> dict[tuple[str, str, str], WeightSet]:
    sets: dict[tuple[str, str, str], WeightSet] = {}
    for path in sorted(set(paths)):
        index, named = _INDEX.fullmatch(path.name), _WEIGHTS.fullmatch(path.name)
        if path.is_dir() or not (index or named):
            continue
        found = index or named
        assert found is not None
        key = _key(found)
        each = sets.setdefault(key, WeightSet(*key))
        if index:
            each.index = path
        elif named and named["shard"]:
            each.shards[int(named["number"])] = path
            each.counts.add(int(named["count"]))
        else:
            each.whole = path
    return sets


def _key(found: re.Match[str]) -> tuple[str, str, str]:
    groups = defaultdict(str, found.groupdict(default=""))
    return groups["stem"], groups["variant"] or groups["late"], groups["suffix"]


def _of_index(index: Path) -> list[Path]:
    try:
        content = read_json(index, _LARGEST_INDEX)
        names = sorted(set(content["weight_map"].values()))
        files = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if not index.name.endswith(".index.json"):
            readable_form(index)  # says what it is
        raise ValueError(f"{index} is not an index of weights; download it again") from error
    for file in files:
        if not file.exists() and not file.is_symlink():
            raise FileNotFoundError(f"{index} names {file.name}, which does not exist; download it")
    return files
