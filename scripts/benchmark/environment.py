"""The environment of a benchmark, which is printed with its results."""

from __future__ import annotations

import argparse
import contextlib
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from mixgrpo.files.disk import check_replaceable

ROOT = Path(__file__).resolve().parents[2]


def output_file(text: str) -> Path:
    """The type of an option that names a file to write, which is checked before the measurements.

    Raises argparse.ArgumentTypeError if there is something else than a regular file.
    """
    path = Path(text)
    try:
        check_replaceable(path)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def environment(device: torch.device) -> dict[str, str]:
    """Hardware, versions, git revision, command."""
    hardware = _cpu_name()
    if device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)}; {hardware}"
    return {
        "hardware": f"{hardware}, {torch.get_num_threads()} threads",
        "software": f"torch {torch.__version__}, Python {platform.python_version()}",
        "revision": _git_revision(),
        "command": shlex.join(["python", *sys.argv]),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _git_revision() -> str:
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
