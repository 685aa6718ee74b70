"""Describes a host's installation: ``python -m mixgrpo.hosts.facts`` prints it as JSON.

The standard input names a folder and paths relative to it. Torch is not imported, so that this is
fast and works with an incomplete installation.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mixgrpo.files.fingerprint import fingerprint, fingerprint_files
from mixgrpo.files.revision import exact_revision

REQUIREMENTS = Path(__file__).parent.parent.parent / "requirements.txt"


@dataclass(frozen=True)
class Facts:
    """Properties that can differ between hosts.

    Attributes:
        python: version of Python.
        packages: required package -> installed version, or "none" if it is not installed.
        revision: the commit, with "-dirty" and a digest if there are uncommitted changes.
        files: path -> size in bytes and digest of a file or folder, or "missing".
        gpus: number and model of the GPUs.
        driver: version of the NVIDIA driver, or "none".
    """

    python: str
    packages: dict[str, str]
    revision: str
    files: dict[str, str]
    gpus: str
    driver: str


def gather(folder: Path, paths: list[str]) -> Facts:
    """This host's facts; ``paths`` are relative to ``folder``."""
    names = re.findall(
        r"^([\w.-]+)(?:\[.*\])?==", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE
    )
    cards = ask_nvidia("name")
    return Facts(
        python=platform.python_version(),
        packages={name: _version(name) for name in names},
        revision=exact_revision(),
        files={path: _describe(folder / path) for path in paths},
        gpus=f"{len(cards)} x {cards[0]}" if cards else "none",
        driver=next(iter(ask_nvidia("driver_version")), "none"),
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _describe(path: Path) -> str:
    if path.is_dir():
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return f"{size} bytes, {fingerprint(path)}"
    if path.is_file():
        return f"{path.stat().st_size} bytes, {fingerprint_files([path])}"
    return "missing"


def ask_nvidia(field: str) -> list[str]:
    """What nvidia-smi says of each GPU; nothing if it cannot be run."""
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split("\n")[:-1]


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(json.dumps(asdict(gather(Path(os.path.abspath(asked["folder"])), asked["paths"]))))
