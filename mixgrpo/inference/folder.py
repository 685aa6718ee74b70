"""The folder of the pictures: which are there, by which settings, and the manifest that says so."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mixgrpo.inference.config import InferenceConfig
from mixgrpo.run.pictures import to_pil

VERSION = 1
MANIFEST = "manifest.json"
# These decide where and how fast, not what; paths are compared by what is there.
_FREE = (
    "folder",
    "micro_batch",
    "decode_batch",
    "threads",
    "progress",
    "revision",
    "model.path",
    "checkpoint",
    "prompts_file",
)
_CONTENTS = {
    "fingerprints.model": "model.path",
    "fingerprints.checkpoint": "checkpoint",
    "fingerprints.prompts": "prompts_file",
}


_PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"


@dataclass(frozen=True)
class Picture:
    """One picture: the position of its prompt in the file, and which of the prompt's samples."""

    index: int
    sample: int

    @property
    def name(self) -> str:
        return f"{self.index:05d}_{self.sample:02d}.png"


class PictureFolder:
    """Pictures of some prompts, all by the same settings.

    Attributes:
        path: the folder.
        settings: dotted path -> value; all that decides how the pictures look, and more.
        prompts: the prompts, in the file's order.
        pictures: every picture that will be there, a prompt's samples side by side.
    """

    def __init__(
        self, config: InferenceConfig, settings: dict[str, Any], prompts: Sequence[str]
    ) -> None:
        self.path = Path(config.folder)
        self.settings = settings
        self.prompts = prompts
        self.pictures = [Picture(i, s) for i in range(len(prompts)) for s in range(config.samples)]

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST

    def check(self) -> None:
        """Raises ValueError if the folder holds pictures by other settings."""
        found = min(self.path.glob("*.png"), default=None)
        if found is None:
            return
        if not self.manifest.exists():
            raise ValueError(
                f"{self.path} holds pictures, such as {found.name}, but no {MANIFEST} that "
                "tells how they were drawn; choose another --folder"
            )
        try:
            saved = json.loads(self.manifest.read_text(encoding="utf-8"))["settings"]
            differing = list(_differences(saved, self.settings))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.manifest} is damaged; choose another --folder, or delete this one"
            ) from error
        if differing:
            raise ValueError(
                f"{self.path} holds pictures by other settings: {'; '.join(differing)}; give the "
                "same ones to go on with them, or choose another --folder"
            )

    def is_there(self, picture: Picture) -> bool:
        """Whether its file is there and whole: a damaged one is drawn again."""
        try:
            with (self.path / picture.name).open("rb") as file:
                begins = file.read(len(_PNG_BEGIN)) == _PNG_BEGIN
                file.seek(-min(len(_PNG_END), os.path.getsize(file.name)), os.SEEK_END)
                return begins and file.read() == _PNG_END
        except FileNotFoundError:
            return False

    def save(self, picture: Picture, image: Tensor) -> None:
        """Writes an image [3, H, W] uint8, whole or not at all."""
        png = io.BytesIO()
        to_pil(image).save(png, format="png")
        _write_whole(self.path / picture.name, png.getvalue())

    def write_manifest(self) -> int:
        """Tells the settings and the pictures that are there; returns how many these are."""
        self.path.mkdir(parents=True, exist_ok=True)
        images = [
            {"index": p.index, "sample": p.sample, "prompt": self.prompts[p.index], "file": p.name}
            for p in self.pictures
            if self.is_there(p)
        ]
        content = {"version": VERSION, "settings": self.settings, "images": images}
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        _write_whole(self.manifest, text.encode())
        return len(images)


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    for key in sorted({*saved, *now} - {*_FREE}):
        if saved.get(key) == now.get(key):
            continue
        if key in _CONTENTS:
            path = _CONTENTS[key]
            yield f"{path} was {saved.get(path)!r}, is {now.get(path)!r} with other contents"
        else:
            yield f"{key} was {saved.get(key)!r}, is {now.get(key)!r}"


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error.strerror}); free some disk space, then the same "
            "command goes on"
        ) from error
    finally:
        partial.unlink(missing_ok=True)  # whatever broke in: a full disk, a signal
