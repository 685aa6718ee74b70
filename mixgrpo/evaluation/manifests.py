"""Manifests, which list the images of each prompt, as written by the sample command."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from mixgrpo.files.json_files import read_json
from mixgrpo.files.named_paths import check_distinct_names, split_name
from mixgrpo.types import Metadata

VERSION = 1
MOST_INDEX = 2**31 - 1
_AGAIN = "sample the images again"
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
        file: path of the image below the manifest's folder; there need not be one.
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
                    f"prompt {picture.index} is {_short(prompt)} in {name} and "
                    f"{_short(picture.prompt)} in {manifest.name}; only images of the same prompts "
                    "can be compared: sample both from the same prompts file"
                )


def _read(argument: str) -> Manifest:
    name, path = split_name(argument)
    # os.path, unlike Path, takes a name that is too long for one that does not exist.
    file = path / "manifest.json" if os.path.isdir(path) else path
    if not os.path.exists(file):
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
        settings=content.get("settings", {}),
        pictures=tuple(sorted(pictures, key=lambda picture: picture.key)),
    )


def _content(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except ValueError as error:
        raise ValueError(f"{error}; {_AGAIN}") from error
    if not isinstance(content, dict) or "images" not in content:
        raise ValueError(
            f"{file} is not a manifest, which must hold an object with `version` and `images`; "
            f"{_AGAIN}"
        )
    if content.get("version") != VERSION:
        raise ValueError(
            f"{file} has version {_short(content.get('version'))}, but only version {VERSION} is "
            f"supported; {_AGAIN} with this version of mixgrpo"
        )
    if not isinstance(content.get("settings", {}), dict):
        raise ValueError(f"{file}: `settings` must be an object; {_AGAIN}")
    if not isinstance(content["images"], list) or not content["images"]:
        raise ValueError(f"{file} lists no images; sample them again")
    return content


def _picture(file: Path, place: int, entry: Any) -> Picture:
    entry = entry if isinstance(entry, dict) else {}
    for name, kind in _FIELDS.items():
        value = entry.get(name)
        # type() instead of isinstance(), because bool is a subclass of int.
        if type(value) is not kind or (type(value) is int and not 0 <= value <= MOST_INDEX):
            what = f"an integer from 0 to {MOST_INDEX}" if kind is int else "a string"
            raise ValueError(
                f"{file}: `{name}` of images[{place}] must be {what}, got {_short(value)}; {_AGAIN}"
            )
    metadata = entry.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(
            f"{file}: `metadata` of images[{place}] must be an object, got {_short(metadata)}; "
            f"{_AGAIN}"
        )
    _check_prompt(file, place, entry["prompt"])
    inside = PurePath(entry["file"])
    if not inside.parts or inside.is_absolute() or ".." in inside.parts:
        raise ValueError(
            f"{file}: `file` of images[{place}] is {_short(entry['file'])}, which does not name a "
            "file inside the manifest's folder; put the image, or a link to it, there"
        )
    path = file.parent / inside
    return Picture(entry["index"], entry["sample"], entry["prompt"], path, metadata)


def _check_prompt(file: Path, place: int, prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{file}: `prompt` of images[{place}] has half of a surrogate pair, "
            f"{prompt[error.start]!a}, at position {error.start}; remove it"
        ) from error


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def _short(value: Any) -> str:
    """The value in quotes, in a length that fits into a message."""
    return _SHORT.repr(value)


def _check_distinct(file: Path, pictures: Sequence[Picture]) -> None:
    keys: set[Key] = set()
    files: set[Path] = set()
    prompts: dict[int, str] = {}
    for picture in pictures:
        if picture.key in keys:
            raise ValueError(
                f"{file} lists index {picture.index}, sample {picture.sample} twice; {_AGAIN}"
            )
        if picture.file in files:
            raise ValueError(f"{file} lists the file {picture.file.name!r} twice; {_AGAIN}")
        if prompts.setdefault(picture.index, picture.prompt) != picture.prompt:
            raise ValueError(
                f"{file} gives index {picture.index} two prompts, "
                f"{_short(prompts[picture.index])} and {_short(picture.prompt)}; {_AGAIN}"
            )
        keys.add(picture.key)
        files.add(picture.file)
