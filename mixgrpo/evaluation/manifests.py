"""Manifests, which list the images of each prompt, as written by the sample command."""

from __future__ import annotations

import hashlib
import io
import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from mixgrpo.files.named_paths import check_distinct_names, split_name
from mixgrpo.types import Metadata

VERSION = 1
_FIELDS = {"index": int, "sample": int, "prompt": str, "file": str}

# (index, sample) of an image in a manifest: position of its prompt, and number within the prompt.
Key = tuple[int, int]


@dataclass(frozen=True)
class Picture:
    """One image of a manifest.

    Attributes:
        index: position of its prompt among the prompts.
        sample: number of the image among those of its prompt.
        prompt: the prompt.
        file: path of the image, which need not exist.
        metadata: what the prompt file says about the prompt beside its text.
    """

    index: int
    sample: int
    prompt: str
    file: Path
    metadata: Metadata = field(default_factory=dict, hash=False)

    @property
    def key(self) -> Key:
        return self.index, self.sample


@dataclass(frozen=True)
class Manifest:
    """The images of one model, by prompt and sample.

    Attributes:
        name: its name in comparisons.
        path: its file.
        settings: the settings with which the images were sampled.
        pictures: at least one image; sorted, with unique (index, sample) and one prompt per index.
    """

    name: str
    path: Path
    settings: dict[str, Any]
    pictures: tuple[Picture, ...]


def read_manifests(arguments: Sequence[str]) -> list[Manifest]:
    """Reads the manifests of a command line, each ``PATH`` or ``NAME=PATH`` of a folder or file.

    Raises:
        FileNotFoundError: if a manifest does not exist.
        ValueError: if a file is not a manifest, two manifests have the same name, or they have
            different prompts for the same index.
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
                    f"{manifest.name}; only images of the same prompts can be compared: sample "
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
    except ValueError as error:  # includes UnicodeDecodeError
        raise ValueError(f"{file} is not valid JSON ({error}); sample the images again") from error
    if not isinstance(content, dict) or "images" not in content:
        raise ValueError(
            f"{file} is not a manifest, which must hold an object with `version` and `images`"
        )
    if content.get("version") != VERSION:
        raise ValueError(
            f"{file} has version {content.get('version')!r}, but only version {VERSION} is "
            "supported; sample the images again with this version of mixgrpo"
        )
    if not isinstance(content["images"], list) or not content["images"]:
        raise ValueError(f"{file} lists no images; sample them again")
    return content


def _picture(file: Path, place: int, entry: Any) -> Picture:
    entry = entry if isinstance(entry, dict) else {}
    for name, kind in _FIELDS.items():
        value = entry.get(name)
        # type() instead of isinstance(), because bool is a subclass of int.
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            what = "an integer of at least 0" if kind is int else "a string"
            raise ValueError(f"{file}: `{name}` of images[{place}] must be {what}, got {value!r}")
    metadata = entry.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(
            f"{file}: `metadata` of images[{place}] must be an object, got {reprlib.repr(metadata)}"
        )
    path = file.parent / entry["file"]
    return Picture(entry["index"], entry["sample"], entry["prompt"], path, metadata)


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
    """The result of reading an image file.

    Attributes:
        digest: digest of its contents.
        size: width and height in pixels.
        fault: why the file cannot be read; empty if it can be.
    """

    digest: str = ""
    size: tuple[int, int] = (0, 0)
    fault: str = ""


def look(file: Path) -> Seen:
    """Reads and decodes a whole image file; errors are returned as a fault, not raised."""
    try:
        content = file.read_bytes()
        picture = decode(content)
    except FileNotFoundError:
        return Seen(fault="there is no such file")
    except Image.UnidentifiedImageError:
        return Seen(fault="it is not an image")
    except Exception as error:  # decoders raise many kinds of errors on damaged files
        return Seen(fault=f"it cannot be read ({' '.join(str(error).split())})")
    return Seen(hashlib.sha256(content).hexdigest(), picture.size)


def read_picture(file: Path) -> Tensor:
    """[3, H, W] float32 in [0, 1]."""
    return pil_to_tensor(decode(file.read_bytes())).float() / 255


def decode(content: bytes) -> Image.Image:
    """Decodes these bytes to an RGB image, without transparency."""
    return Image.open(io.BytesIO(content)).convert("RGB")
