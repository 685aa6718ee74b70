"""``python -m mixgrpo shapes``: rebuilds the Shapes world's captions and checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from mixgrpo.commands.command_line import OptionParser, carry_out, complain, home_path
from mixgrpo.files.disk import own_folder


def run(arguments: Sequence[str]) -> int:
    """Builds the chosen parts in their order; returns the exit code."""
    from mixgrpo.shapes.build import PARTS

    parser = OptionParser(
        "shapes", "Rebuilds the captions and checkpoints of the Shapes world, with fixed seeds."
    )
    parser.add_argument(
        "--folder",
        type=home_path,
        default=Path("data/shapes"),
        help="folder to write them to (default: %(default)s)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(PARTS),
        default=list(PARTS),
        help="parts to build (default: all)",
    )
    try:
        chosen = parser.parse_args(arguments)
    except ValueError as error:
        return complain(error)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    def build_all() -> None:
        with own_folder(str(chosen.folder), "--folder"):
            for name in (name for name in PARTS if name in chosen.only):
                start = time.perf_counter()
                PARTS[name](chosen.folder)
                print(f"{name}: {time.perf_counter() - start:.0f} s")

    left = "what was built before is kept; build the rest with --only"
    return carry_out(build_all, (ValueError, OSError), left)
