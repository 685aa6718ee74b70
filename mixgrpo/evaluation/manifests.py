"""Manifests: which picture was made of which prompt, as the sample command writes them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from mixgrpo.files.named_paths import check_distinct_names, split_name

VERSION = 1
_FIELDS = {"index": int, "sample": int, "prompt": str, "file": str}

# A picture among those of a manifest: its prompt's place, and which of the prompt's pictures.
Key = tuple[int, int]


@dataclass(frozen=True)
class Picture:
    """One picture of a manifest.

    Attributes:
        index: the prompt's place among the prompts.
        sample: which of the prompt's pictures it is.
        prompt: the prompt.
        file: where it lies; it need not be there.
    """

    index: int
    sample: int
    prompt: str
    file: Path

    @property
    def key(self) -> Key:
        return self.index, self.sample


@dataclass(frozen=True)
class Manifest:
    """The pictures of one model, by prompt and sample.

    Attributes:
        name: by which it is compared with others.
        path: its file.
        settings: what it says of how the pictures were made.
        pictures: at least one, sorted, no (index, sample) twice, one prompt for each index.
    """

    name: str
    path: Path
    settings: dict[str, Any]
    pictures: tuple[Picture, ...]


def read_manifests(arguments: Sequence[str]) -> list[Manifest]:
    """The manifests that a command line names, each ``PATH`` or ``NAME=PATH``, of folder or file.

    Raises:
        FileNotFoundError: there is no such manifest.
        ValueError: one is none, two have one name, or they give one index different prompts.
    """
    manifests = [_read(argument) for argument in arguments]
    check_distinct_names((manifest.name, manifest.path) for manifest in manifests)
    _check_same_prompts(manifests)
    return manifests


def _check_same_prompts(manifests: Sequence[Manifest]) -> None:
    first: dict[int, tuple[str, str]] = {}
    for manifest in manifests:
        for picture in manifest.pictures:
            name, prompt = first.setdefault(picture.index, (manifest.name, picture.prompt))
            if prompt != picture.prompt:
                raise ValueError(
                    f"prompt {picture.index} is {prompt!r} in {name} and {picture.prompt!r} in "
                    f"{manifest.name}; only pictures of the same prompts can be compared: sample "
                    "both from the same prompts file"
                )


def _read(argument: str) -> Manifest:
    name, path = split_name(argument)
    file = path / "manifest.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no manifest {str(file)!r}; give the folder that `python -m mixgrpo sample` "
            "has written, or its manifest.json"
        )
    content = _content(file)
    pictures = [_picture(file, place, entry) for place, entry in enumerate(content["images"])]
    _check_distinct(file, pictures)
    return Manifest(
        name=name or file.resolve().parent.name,
        path=file,
        settings=content.get("settings") or {},
        pictures=tuple(sorted(pictures, key=lambda picture: picture.key)),
    )


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8 is one too
        raise ValueError(f"{file} is not JSON ({error}); sample the pictures again") from error
    if not isinstance(content, dict) or "images" not in content:
        raise ValueError(
            f"{file} is no manifest: it must hold an object with `version` and `images`"
        )
    if content.get("version") != VERSION:
        raise ValueError(
            f"{file} has version {content.get('version')!r}, known is {VERSION}; sample the "
            "pictures again with this version of mixgrpo"
        )
    if not isinstance(content["images"], list) or not content["images"]:
        raise ValueError(f"{file} lists no images; sample the pictures again")
    return content


def _picture(file: Path, place: int, entry: Any) -> Picture:
    entry = entry if isinstance(entry, dict) else {}
    for name, kind in _FIELDS.items():
        value = entry.get(name)
        # type() and not isinstance(): true and false are no numbers.
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            what = "a number from 0" if kind is int else "a text"
            raise ValueError(f"{file}: `{name}` of images[{place}] must be {what}, got {value!r}")
    return Picture(entry["index"], entry["sample"], entry["prompt"], file.parent / entry["file"])


def _check_distinct(file: Path, pictures: Sequence[Picture]) -> None:
    keys: set[Key] = set()
    files: set[Path] = set()
    prompts: dict[int, str] = {}
    for picture in pictures:
        if picture.key in keys:
            raise ValueError(f"{file} lists index {picture.index}, sample {picture.sample} twice")
        if picture.file in files:
            raise ValueError(f"{file} lists the file {picture.file.name!r} twice")
        if prompts.setdefault(picture.index, picture.prompt) != picture.prompt:
            raise ValueError(
                f"{file} gives index {picture.index} two prompts: {prompts[picture.index]!r} and "
                f"{picture.prompt!r}"
            )
        keys.add(picture.key)
        files.add(picture.file)


@dataclass(frozen=True)
class Seen:
    """What a picture's file holds.

    Attributes:
        digest: of its contents.
        size: width and height in pixels.
        fault: why it cannot be read; empty where it can.
    """

    digest: str = ""
    size: tuple[int, int] = (0, 0)
    fault: str = ""


def look(file: Path) -> Seen:
    """Reads a picture to its end; what is wrong with it is a part of the answer."""
    try:
        content = file.read_bytes()
        picture = decode(content)
    except FileNotFoundError:
        return Seen(fault="there is no such file")
    except Image.UnidentifiedImageError:
        return Seen(fault="it is no picture")
    except Exception as error:  # decoders stumble over damaged files in many ways
        return Seen(fault=f"it cannot be read ({' '.join(str(error).split())})")
    return Seen(hashlib.sha256(content).hexdigest(), picture.size)


def read_picture(file: Path) -> Tensor:
    """[3, H, W] float32 in [0, 1]."""
    return pil_to_tensor(decode(file.read_bytes())).float() / 255


def decode(content: bytes) -> Image.Image:
    """The picture in these bytes, without transparency."""
    return Image.open(io.BytesIO(content)).convert("RGB")
