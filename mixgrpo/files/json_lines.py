"""Files with a record of JSON on each line, to which a program appends while it runs."""

from __future__ import annotations

import io
import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from mixgrpo.files.regular import MIB, read_regular

_BEGIN = b'{"iteration"'
_BOM = b"\xef\xbb\xbf"
_LARGEST = sys.float_info.max
MOST = 256 * MIB  # size of a file, with which some 100,000 records fit


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file's lines; lines that are none are left out.

    There are none if there is no file. Raises OSError and ValueError as ``read_records`` does.
    """
    lines = read_regular(path, MOST).splitlines() if path.exists() else []
    return [found for found in map(_object, lines) if found is not None]


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        given = json.loads(text.decode(), parse_constant=lambda name: None)  # NaN is null
    except (ValueError, RecursionError):
        return None
    return given if isinstance(given, dict) else None


class Records(NamedTuple):
    """What a ``metrics.jsonl`` holds.

    Attributes:
        records: the records in the file's order. Each has an ``iteration``, an integer that is not
            negative; its other values are finite numbers or None.
        damaged: numbers of the lines, from 1, that are not exactly one record.
        lines: number of lines.
        torn: whether the last line is a record that was not written to its end; it is not among
            the damaged ones.
    """

    records: list[dict[str, Any]]
    damaged: list[int]
    lines: int
    torn: bool


def read_records(path: Path) -> Records:
    """Reads the records of a ``metrics.jsonl``; there are none if there is no file.

    A line that is not a record is left out, and nothing else: a write that a power failure cut off
    may leave zeros, or half a record with the next one behind it on the same line.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular file, or larger than ``MOST`` bytes.
    """
    found = Records([], [], 0, torn=False)
    if not path.exists():
        return found
    line, number = b"", 0
    for number, line in enumerate(io.BytesIO(read_regular(path, MOST)), 1):
        records, is_whole = _records_of(line.removeprefix(_BOM) if number == 1 else line)
        found.records.extend(records)
        if not is_whole:
            found.damaged.append(number)
    torn = found.damaged[-1:] == [number] and _is_torn(line)
    return Records(found.records, found.damaged[: -1 if torn else None], number, torn)


def _records_of(line: bytes) -> tuple[list[dict[str, Any]], bool]:
    """The records on a line, and whether they are all that it holds."""
    line = line.strip()
    if not line:
        return [], True
    record, is_whole = _record(line)
    if record is not None:
        return [record], is_whole
    begins = [match.start() for match in re.finditer(re.escape(_BEGIN), line)]
    pieces = [line[start:stop].strip(b" \t\0") for start, stop in pairwise([*begins, len(line)])]
    return [record for record, _ in map(_record, pieces) if record is not None], False


def _record(text: bytes) -> tuple[dict[str, Any] | None, bool]:
    """The record, or None if this is none; and whether the text holds nothing else."""
    given = _object(text)
    if given is None:
        return None, False
    record = {key: value for key, value in given.items() if value is None or _is_number(value)}
    if not isinstance(record.get("iteration"), int) or record["iteration"] < 0:
        return None, False
    return record, len(record) == len(given)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and -_LARGEST <= value <= _LARGEST  # type: ignore[operator]


def _is_torn(line: bytes) -> bool:
    return not line.endswith(b"\n") and line[: len(_BEGIN)] == _BEGIN[: len(line)]
