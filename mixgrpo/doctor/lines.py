"""The lines that checks report: ok, warning or error, with the command that fixes the problem."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_WIDTH = 100
_INDENT = " " * 21
SETUP = "bash env_setup.sh"


@dataclass(frozen=True)
class Line:
    """One finding.

    Attributes:
        level: whether a run can start (ok), may fail (warning), or will fail (error).
        subject: what was checked, in one word.
        text: what was found.
        remedy: the command or setting that fixes it; empty where there is nothing to fix.
    """

    level: Literal["ok", "warning", "error"]
    subject: str
    text: str
    remedy: str = ""


def ok(subject: str, text: str) -> Line:
    return Line("ok", subject, text)


def warning(subject: str, text: str, remedy: str) -> Line:
    return Line("warning", subject, text, remedy)


def error(subject: str, text: str, remedy: str) -> Line:
    return Line("error", subject, text, remedy)


def render(lines: Iterable[Line]) -> str:
    """Formats lines for a terminal of 100 columns; a table within a text keeps its line breaks."""
    return "\n".join(_rendered(line) for line in lines)


def _rendered(line: Line) -> str:
    first, *more = line.text.split("\n")
    paragraphs = [f"{line.level:<8} {line.subject:<11} {first}", *(_INDENT + row for row in more)]
    if line.remedy:
        paragraphs.append(f"{_INDENT}-> {line.remedy}")
    return "\n".join(map(_wrapped, paragraphs))


def _wrapped(paragraph: str) -> str:
    # Commands and paths are not broken, so that they can be copied.
    return textwrap.fill(
        paragraph,
        _WIDTH,
        subsequent_indent=_INDENT,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
        replace_whitespace=False,
    )


def exit_code(lines: Iterable[Line]) -> int:
    """1 if there is an error; warnings do not count."""
    return int(any(line.level == "error" for line in lines))


def size(count: float) -> str:
    """Formats a number of bytes for reading."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def fetching(path: str | Path, otherwise: str) -> str:
    """The command that downloads ``path`` if it is a known download, else ``otherwise``."""
    from mixgrpo.downloads.items import ITEMS

    for name, item in ITEMS.items():
        places = [Path(source.folder) for source in item.sources] if not item.finish else []
        wanted = Path(path)
        if any(wanted == place or place in wanted.parents for place in places) or str(path) in (
            item.brings
        ):
            return shlex.join(["bash", "scripts/download_models.sh", name])
    return otherwise
