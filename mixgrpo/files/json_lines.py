"""Files with a record of JSON on each line, to which a program appends while it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mixgrpo.files.regular import MIB, read_regular

MOST = 1024 * MIB


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file, without a last line that is incomplete; none if there is no file.

    Raises ValueError if there is something else than a regular file.
    """
    records = []
    text = read_regular(path, MOST).decode(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return records
