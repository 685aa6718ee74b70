"""The file of all scores, from which an evaluation reuses those that are already known.

A score depends on the contents of the image, on its prompt, and on the options, weights and code of
the reward. Scores are stored in columns, one for each combination of options, weights and code.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixgrpo.config import RewardConfig
from mixgrpo.rewards.registry import KNOWN

VERSION = 1


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

        Raises ValueError if the file does not hold scores.
        """
        if not path.exists():
            return cls(path)
        remedy = "move it away, or choose another --output"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}); {remedy}") from error
        columns: Any = content.get("columns") if isinstance(content, dict) else None
        is_whole = isinstance(columns, dict) and all(isinstance(c, dict) for c in columns.values())
        if not is_whole or content.get("version") != VERSION:
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
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text(
            json.dumps({**content, "columns": self.columns}, indent=1, allow_nan=False)
        )
        os.replace(partial, self.path)


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

    Weight files are identified by path, size and modification time: reading gigabytes would take
    longer than scoring the images.
    """
    words = [knobs.model, knobs.checkpoint, *knobs.options.values()]
    paths = [Path(os.path.expanduser(word)) for word in words if isinstance(word, str) and word]
    return {
        "kind": knobs.kind,
        "model": knobs.model,
        "checkpoint": knobs.checkpoint,
        "options": knobs.options,
        "code": _code(knobs.kind),
        "files": [stamp for path in paths for stamp in _stamps(path)],
    }


def column(reward: Mapping[str, Any]) -> str:
    """The column of a reward of this identity."""
    return digest(json.dumps(reward, sort_keys=True))


def _code(kind: str) -> str | None:
    """Digest of the module that holds the reward; None if there is no such file."""
    module = KNOWN.get(kind, kind).partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None  # building the reward will raise the proper error
    if found is None or found.origin is None or not Path(found.origin).is_file():
        return None
    return digest(Path(found.origin).read_bytes())


def _stamps(path: Path) -> list[list[str | int]]:
    """[path, bytes, modification time in ns] of a file, or of every file in a folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
