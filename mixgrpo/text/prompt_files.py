"""The two formats of prompt files: plain text with a prompt on each line, and JSONL."""

from __future__ import annotations

import json
import math
import re
import reprlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixgrpo.text.other_formats import (
    EXAMPLE,
    decoded,
    refuse_documents,
    refuse_suffix,
    refuse_tables,
)
from mixgrpo.types import Metadata

Lines = Sequence[tuple[int, str]]  # number in the file, and text without surrounding white space

NEGATIVE = "negative_prompt"  # the key of a prompt's negative prompt, for guidance
LONGEST = 100_000  # characters of a prompt; text encoders read a few thousand
DEEPEST = 50  # objects and arrays within each other


@dataclass(frozen=True)
class PromptList:
    """Prompts in the order of their file.

    Attributes:
        texts: N prompts.
        metadata: what else the file says about each of them, N dicts, which are never changed.
        format: "plain text" or "JSONL".
    """

    texts: Sequence[str]
    metadata: Sequence[Metadata]
    format: str = "plain text"

    @staticmethod
    def plain(texts: Sequence[str]) -> PromptList:
        """Prompts without metadata."""
        return PromptList(texts, [{} for _ in texts])

    def __len__(self) -> int:
        return len(self.texts)

    def first(self, count: int) -> PromptList:
        """The first ``count`` prompts, or all of them if it is 0."""
        stop = count or None
        return PromptList(self.texts[:stop], self.metadata[:stop], self.format)


def parse(content: bytes, path: str) -> PromptList:
    """The prompts in the contents of a file.

    Args:
        path: the file's path; its suffix is a part of the evidence.

    Raises:
        ValueError: with a relative clause about the file ("which is not UTF-8; save it as ...").
    """
    text = decoded(content, path).replace("\r\n", "\n").replace("\r", "\n")
    stripped = ((n, _stripped(line)) for n, line in enumerate(text.split("\n"), 1))
    lines = [(number, line) for number, line in stripped if _is_visible(line)]
    if not lines:
        raise ValueError("which contains no prompts; write one prompt per line")
    suffix = Path(path).suffix.lower()
    refuse_documents([line for _, line in lines], path)
    if suffix in (".jsonl", ".ndjson") or _is_jsonl(lines):
        return _read_jsonl(lines)
    refuse_tables(text, path)
    refuse_suffix(suffix, path)
    for number, line in lines:
        _check_length(number, line)
    return PromptList.plain([_cleaned(line) for _, line in lines])


# ---- lines

_INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}  # categories of Unicode


def _stripped(line: str) -> str:
    """Also without the byte order mark of a file that was joined to the one before it."""
    return line.strip().strip("\ufeff\u200b\u2060").strip()


def _cleaned(prompt: str) -> str:
    return _stripped(prompt.replace("\ufeff", ""))


def _is_visible(text: str) -> bool:
    return any(unicodedata.category(character) not in _INVISIBLE for character in text)


def _check_length(number: int, prompt: str) -> None:
    if len(prompt) > LONGEST:
        raise ValueError(
            f"whose line {number} is a prompt of {len(prompt):,} characters, of which at most "
            f"{LONGEST:,} are accepted; write one prompt per line"
        )


# ---- JSONL

# A line of JSON, or of Python's way to print a dict, that names a prompt, complete or not.
_NAMES_PROMPT = re.compile(r"""[\[{].*["']prompt["']\s*:|["']prompt["']\s*:\s*["']""")


def _is_jsonl(lines: Lines) -> bool:
    """Whether the first line or most of the lines are JSON objects, or any names a prompt in one.

    Lines that are damaged count as well, so that they are reported instead of trained on.
    """
    if any(_NAMES_PROMPT.match(line) for _, line in lines):
        return True
    if _is_json(lines[0][1], "{"):
        return True
    return 2 * sum(_is_json(line, "{[") for _, line in lines) > len(lines)


def _is_json(line: str, begins: str) -> bool:
    try:
        return line[0] in begins and json.loads(line) is not None
    except (ValueError, RecursionError):
        return False


def _read_jsonl(lines: Lines) -> PromptList:
    texts, metadata = [], []
    for number, line in lines:
        try:
            text, others = _read_entry(_read_object(line))
        except ValueError as error:
            raise ValueError(f"which is read as JSONL, but line {number} {error}") from error
        _check_length(number, text)
        texts.append(text)
        metadata.append(others)
    return PromptList(texts, metadata, "JSONL")


def _read_object(line: str) -> dict[str, Any]:
    """Raises ValueError with what to say after "line 3"."""
    try:
        value = _DECODER.decode(line)
        if not isinstance(value, dict):
            raise ValueError(f"is {_kind(value)}, not an object; {_WHOLE}")
        _check_value(value)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"is not a JSON object ({error.msg}: column {error.colno}); {_WHOLE}"
        ) from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    return value


_WHOLE = f"write one whole object on each line, such as {EXAMPLE}"
_TOO_DEEP = f"has more than {DEEPEST} objects and arrays within each other; make it flatter"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(
                f"has the key {reprlib.repr(key)} twice in one object; remove one of them"
            )
        found[key] = value
    return found


def _whole(digits: str) -> int:
    try:
        return int(digits)
    except ValueError as error:  # Python's limit, far above what any number needs
        raise ValueError(f"has a number of {len(digits):,} digits; write a smaller one") from error


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct, parse_int=_whole)


def _check_value(value: Any, depth: int = 0) -> None:
    """Refuses what could not be written to a manifest and read back as it is."""
    if depth > DEEPEST:
        raise ValueError(_TOO_DEEP)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                "has half of a surrogate pair in a string, which is no character; remove it"
            ) from error
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("has a number that is not finite, which JSON lacks; write null instead")
    elif isinstance(value, list | dict):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        for each in inner:
            _check_value(each, depth + 1)


def _read_entry(entry: dict[str, Any]) -> tuple[str, Metadata]:
    if "prompt" not in entry:
        keys = ", ".join(map(reprlib.repr, [*entry][:8])) + (", ..." if len(entry) > 8 else "")
        raise ValueError(
            f"has no key 'prompt' ({f'its keys are {keys}' if entry else 'it is empty'}); rename "
            "the key that holds the prompt to 'prompt'"
        )
    prompt = entry["prompt"]
    if not isinstance(prompt, str):
        raise ValueError(f"has {_kind(prompt)} as its prompt; write it as a string")
    if not _is_visible(prompt) or "\0" in prompt:
        raise ValueError(
            f"has the prompt {prompt[:80]!r}, which is empty or contains a NUL character; write "
            "the prompt, or remove the line"
        )
    negative = entry.get(NEGATIVE, "")
    if not isinstance(negative, str) or "\0" in negative:
        raise ValueError(
            f"has {_kind(negative)} as its {NEGATIVE}; write it as a string without NUL"
        )
    return _cleaned(prompt), {key: value for key, value in entry.items() if key != "prompt"}


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "true or false"}
    return kinds.get(type(value), "null" if value is None else "a number")
