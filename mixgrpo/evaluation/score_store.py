"""The file of all scores, from which an evaluation reuses those that are already known.

A score depends on the contents of the image, on its prompt, and on the options, weights and code of
the reward. Scores are stored in columns, one for each combination of options, weights and code. The
latter two count by their contents: dates tell nothing, and whoever edits what a reward imports, or
copies other weights to the same place, must not be shown scores of before.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixgrpo.config import RewardConfig
from mixgrpo.files.disk import write_text_whole
from mixgrpo.files.fingerprint import digest_contents, files_in, fingerprint
from mixgrpo.files.json_files import read_json
from mixgrpo.files.named_paths import find_path
from mixgrpo.files.regular import MIB
from mixgrpo.files.sources import identify
from mixgrpo.rewards.registry import KNOWN

VERSION = 1
MOST = 2048 * MIB  # size of the file, with which some million scores fit
MOST_READ = 2**36  # bytes of a folder of weights
READING = "mixgrpo.evaluation.pictures"  # the module that turns files into the rewards' input
# Which the rewards also use by way of the packages that they import.
LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "transformers", "tokenizers", "timm")


@dataclass
class Store:
    """Scores by column and image, and the file in which they are stored.

    Attributes:
        path: the file, which need not exist yet.
        columns: column -> key of an image -> finite score.
    """

    path: Path
    columns: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Store:
        """Loads the file, or makes an empty store if there is none.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file does not hold scores.
        """
        if not path.exists():
            return cls(path)
        remedy = "move it away, or choose another --output"
        try:
            content = read_json(path, MOST)
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from error
        columns: Any = content.get("columns") if isinstance(content, dict) else None
        if not _are_scores(columns) or content.get("version") != VERSION:
            raise ValueError(f"{path} does not hold scores of version {VERSION}; {remedy}")
        return cls(path, columns)

    def knows(self, column: str, key: str) -> bool:
        return key in self.columns.get(column, {})

    def get(self, column: str, key: str) -> float:
        """The score; NaN if it is not known."""
        return self.columns.get(column, {}).get(key, math.nan)

    def add(self, found: Mapping[tuple[str, str], float]) -> None:
        """Stores scores by (column, key), except failed ones (NaN), which will be retried."""
        for (column, key), value in found.items():
            if not math.isnan(value):
                self.columns.setdefault(column, {})[key] = value

    def save(self, rewards: Mapping[str, Any], images: Sequence[Mapping[str, Any]]) -> None:
        """Writes the file atomically.

        Args:
            rewards: reward's name -> its column and what that depends on.
            images: a row for every image, for human readers; it is not read back.
        """
        content = {"version": VERSION, "rewards": rewards, "images": images}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**content, "columns": self.columns}, indent=1, allow_nan=False)
        write_text_whole(self.path, text)


def _are_scores(columns: Any) -> bool:
    return isinstance(columns, dict) and all(
        isinstance(column, dict) and all(type(value) in (int, float) for value in column.values())
        for column in columns.values()
    )


def digest(*parts: str | bytes) -> str:
    """32 hexadecimal digits of SHA-256; the length of each part is hashed with it."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "big"))
        state.update(data)
    return state.hexdigest()[:32]


def identity(knobs: RewardConfig) -> dict[str, Any]:
    """Everything that a reward's scores depend on, as JSON; this excludes its weight among rewards.

    - ``code``: the sources that compute them (see ``mixgrpo.files.sources``), from the reward's
      module and from the reading of images, and the versions of libraries.
    - ``files``: SHA-256 of every file and folder that the model, the checkpoint or an option names.
      They are read completely: weights of which one small layer was trained differ from the others
      in a part that samples of a large file may miss. Only folders of more than ``MOST_READ`` bytes
      are sampled.

    The device is not part of it; scores of a GPU and of a CPU differ by rounding.
    """
    module = KNOWN.get(knobs.kind, knobs.kind).partition(":")[0]
    named = dict.fromkeys(_strings([knobs.model, knobs.checkpoint, knobs.options]))
    paths = {text: path for text in named if (path := find_path(text)) and not _surrounds(path)}
    return {
        "kind": knobs.kind,
        "model": knobs.model,
        "checkpoint": knobs.checkpoint,
        "options": _plain(knobs.options),
        "code": {**identify([module, READING]), **_versions()},
        "files": {text: _contents(path) for text, path in paths.items()},
    }


def column(reward: Mapping[str, Any]) -> str:
    """The column of a reward of this identity."""
    return digest(json.dumps(reward, sort_keys=True))


def _strings(value: Any) -> Iterator[str]:
    """All strings in nested lists and the values of mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(each)


def _plain(value: Any) -> Any:
    """The value of an option as JSON holds it: what JSON lacks, such as infinity, as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return value if isinstance(value, str | int | float | None) and is_finite else repr(value)


def _surrounds(path: Path) -> bool:
    """Whether it is a folder around the current one or around the user's own, such as "." or "/".

    Such a string is no folder of weights, and reading all that is in there would not end.
    """
    inner = (Path.cwd(), Path(os.path.expanduser("~")).resolve())
    return any(path.resolve() in (folder, *folder.parents) for folder in inner)


def _contents(path: Path) -> str:
    if path.is_dir() and sum(file.stat().st_size for file in files_in(path)) > MOST_READ:
        return f"sampled {fingerprint(path)}"
    return digest_contents(path)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}
