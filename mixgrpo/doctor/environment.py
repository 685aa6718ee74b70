"""Checks of Python and the installed packages, using only the standard library."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mixgrpo.config import RECIPES, Config
from mixgrpo.doctor.lines import SETUP, Line, error, ok, warning

REQUIREMENTS = RECIPES.parent.parent / "requirements.txt"
PYTHONS = ((3, 11), (3, 12), (3, 13))
# Tools for developing the repository; no run needs them.
_TOOLS = ("pytest", "pytest-xdist", "ruff", "mypy")


def check_python(config: Config, processes: int) -> Iterator[Line]:
    found = ".".join(map(str, sys.version_info[:3]))
    if tuple(sys.version_info[:2]) in PYTHONS:
        yield ok("python", f"Python {found} ({sys.executable})")
    else:
        yield error("python", f"Python {found}; 3.11, 3.12 or 3.13 is needed", SETUP)


def check_packages(config: Config, processes: int) -> Iterator[Line]:
    if not REQUIREMENTS.is_file():
        yield warning("packages", f"{REQUIREMENTS} does not exist, so the pins are unknown",
                      "run the doctor from a clone of the repository")  # fmt: skip
        return
    pinned = read_pins(REQUIREMENTS)
    found = {name: _installed(name) for name in pinned}
    missing = [name for name, there in found.items() if there is None]
    differing = [
        f"{name} {there} instead of {pinned[name]}"
        for name, there in found.items()
        if there is not None and there.split("+")[0] != pinned[name]
    ]
    needed = [name for name in missing if name not in _TOOLS]
    if needed:
        yield error("packages", f"not installed: {', '.join(needed)}", SETUP)
    yield from _lesser_faults([name for name in missing if name in _TOOLS], differing)
    if not missing and not differing:
        yield ok("packages", f"all {len(pinned)} are installed as pinned in requirements.txt")


def _lesser_faults(tools: Sequence[str], differing: Sequence[str]) -> Iterator[Line]:
    if tools:
        yield warning("packages", f"not installed, used by the tests: {', '.join(tools)}", SETUP)
    if differing:
        text = f"versions differ from the tested ones: {', '.join(differing)}"
        yield warning("packages", text, SETUP)


def read_pins(path: Path) -> dict[str, str]:
    """Name -> version for every line ``name==version`` or ``name[extra]==version``."""
    pin = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?==([^\s;#]+)", re.MULTILINE)
    return dict(pin.findall(path.read_text(encoding="utf-8")))


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
