"""``python -m mixgrpo shapes``: rebuilds the Shapes world's captions and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mixgrpo.commands.command_line import OptionParser, carry_out, complain
from mixgrpo.commands.worlds import LEFT, add_folder, add_parts, build


def run(arguments: Sequence[str]) -> int:
    """Builds the chosen parts in their order; returns the exit code."""
    from mixgrpo.shapes.build import PARTS

    parser = OptionParser(
        "shapes", "Rebuilds the captions and checkpoints of the Shapes world, with fixed seeds."
    )
    add_folder(parser, "data/shapes")
    add_parts(parser, PARTS)
    try:
        chosen = parser.parse_args(arguments)
    except ValueError as error:
        return complain(error)
    return carry_out(partial(build, chosen, PARTS), (ValueError, OSError), LEFT)
