"""The folder of generated images, and its manifest of settings and images."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mixgrpo.files.disk import PARTIAL, check_replaceable, write_whole
from mixgrpo.files.json_files import read_json
from mixgrpo.files.regular import open_regular
from mixgrpo.inference.config import InferenceConfig
from mixgrpo.run.pictures import to_pil
from mixgrpo.text.prompt_files import PromptList

VERSION = 1
MANIFEST = "manifest.json"
# These do not affect the images; paths are compared by the contents of their files.
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
    """One image: its prompt's position in the file, and its index among the prompt's samples."""

    index: int
    sample: int

    @property
    def name(self) -> str:
        return f"{self.index:05d}_{self.sample:02d}.png"


class PictureFolder:
    """Images of some prompts, all generated with the same settings.

    Attributes:
        path: the folder.
        settings: dotted path -> value; everything that affects the images, and more.
        prompts: the prompts, in the file's order.
        pictures: every image that the folder will hold, a prompt's samples next to each other.
    """

    def __init__(
        self, config: InferenceConfig, settings: dict[str, Any], prompts: PromptList
    ) -> None:
        self.path = Path(config.folder)
        self.settings = settings
        self.prompts = prompts
        self.pictures = [Picture(i, s) for i in range(len(prompts)) for s in range(config.samples)]

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST

    def check(self) -> None:
        """Raises ValueError if the folder holds images that other settings generated, or
        something that is not a regular file in the place of one that is to be written."""
        check_replaceable(self.manifest)
        for picture in self.pictures:
            check_replaceable(self.path / picture.name)
        images = (f for f in self.path.glob("*.png") if not f.name.startswith(PARTIAL))
        found = min(images, default=None)
        if found is None:
            return
        if not self.manifest.exists():
            raise ValueError(
                f"{self.path} holds images, such as {found.name}, but no {MANIFEST} with their "
                "settings; choose another --folder"
            )
        try:
            saved = read_json(self.manifest)["settings"]
            differing = list(_differences(saved, self.settings))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.manifest} is damaged; choose another --folder, or delete this folder"
            ) from error
        if differing:
            raise ValueError(
                f"{self.path} holds images generated with other settings: {'; '.join(differing)}; "
                "use the same settings to continue, or choose another --folder"
            )

    def is_there(self, picture: Picture) -> bool:
        """Whether its file exists and is complete; a damaged image is generated again."""
        try:
            with open_regular(self.path / picture.name) as file:
                begins = file.read(len(_PNG_BEGIN)) == _PNG_BEGIN
                size = file.seek(0, os.SEEK_END)
                file.seek(-min(len(_PNG_END), size), os.SEEK_END)
                return begins and file.read() == _PNG_END
        except FileNotFoundError:
            return False

    def save(self, picture: Picture, image: Tensor) -> None:
        """Writes an image [3, H, W] uint8 atomically."""
        png = io.BytesIO()
        to_pil(image).save(png, format="png")
        _write(self.path / picture.name, png.getvalue())

    def write_manifest(self) -> int:
        """Writes the settings and the list of existing images; returns their number."""
        self.path.mkdir(parents=True, exist_ok=True)
        images = [self._entry(picture) for picture in self.pictures if self.is_there(picture)]
        content = {"version": VERSION, "settings": self.settings, "images": images}
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        _write(self.manifest, text.encode("utf-8", errors="backslashreplace"))
        return len(images)

    def _entry(self, picture: Picture) -> dict[str, Any]:
        index = picture.index
        entry = {
            "index": index,
            "sample": picture.sample,
            "prompt": self.prompts.texts[index],
            "file": picture.name,
        }
        metadata = self.prompts.metadata[index]
        return {**entry, "metadata": metadata} if metadata else entry


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    for key in sorted({*saved, *now} - {*_FREE}):
        if saved.get(key) == now.get(key):
            continue
        if key in _CONTENTS:
            path = _CONTENTS[key]
            yield f"{path} was {saved.get(path)!r}, is {now.get(path)!r} with other contents"
        else:
            yield f"{key} was {saved.get(key)!r}, is {now.get(key)!r}"


def _write(path: Path, content: bytes) -> None:
    try:
        write_whole(path, lambda partial: partial.write_bytes(content))
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error.strerror}); free some disk space, then run the "
            "same command to continue"
        ) from error
