"""What the commands share that rebuild the small worlds."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from mixgrpo.commands.command_line import OptionParser, home_path
from mixgrpo.files.disk import own_folder

Parts = Mapping[str, Callable[[Path], None]]
"""What a world consists of, in the order in which it is built."""
LEFT = "what was built before is kept; build the rest with --only"
"""What is told after Ctrl-C."""


def add_parts(parser: OptionParser, parts: Parts) -> None:
    """Adds the option that chooses parts."""
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(parts),
        default=list(parts),
        help="parts to build (default: all)",
    )


def add_folder(parser: OptionParser, folder: str) -> None:
    """Adds the option for the world's folder."""
    parser.add_argument(
        "--folder",
        type=home_path,
        default=Path(folder),
        help="folder of the world, which is made if it does not exist (default: %(default)s)",
    )


def build(chosen: argparse.Namespace, parts: Parts) -> None:
    """Builds the chosen parts in their order, and prints how long each takes."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with own_folder(str(chosen.folder), "--folder"):
        for name in (name for name in parts if name in chosen.only):
            start = time.perf_counter()
            parts[name](chosen.folder)
            print(f"{name}: {time.perf_counter() - start:.0f} s")
