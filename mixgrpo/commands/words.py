"""``python -m mixgrpo words``: builds, draws and measures the world of words."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from mixgrpo.commands.command_line import (
    OptionParser,
    carry_out,
    complain,
    home_path,
    whole_number,
)
from mixgrpo.commands.worlds import LEFT, add_folder, add_parts, build
from mixgrpo.files.disk import check_replaceable, write_whole
from mixgrpo.files.messages import shortened

if TYPE_CHECKING:  # torch is not needed for --help
    from torch import Tensor

IN_GRID = 6
_LARGEST_SCALE = 1000


def run(arguments: Sequence[str]) -> int:
    """Carries out the task that the first word names; returns the exit code."""
    try:
        chosen = _parser().parse_args(arguments)
        _check(chosen)
    except ValueError as error:
        return complain(error)
    task, left = _TASKS[chosen.task]
    return carry_out(partial(task, chosen), (ValueError, OSError), left)


def _check(chosen: argparse.Namespace) -> None:
    """Raises ValueError, before hours of work: the picture cannot be written."""
    if chosen.picture is not None:
        if chosen.picture.suffix != ".png":
            raise ValueError(f"--picture is {str(chosen.picture)!r}; name a .png file")
        check_replaceable(chosen.picture)


def _parser() -> OptionParser:
    from mixgrpo.words.build import PARTS

    parser = OptionParser("words", "Builds, draws and measures the world of words.")
    parser.add_argument(
        "task",
        choices=list(_TASKS),
        help="build: captions and checkpoints, with fixed seeds; render: example pictures as the "
        "model should draw them; measure: what the model draws, and how much of it is right",
    )
    add_folder(parser, "data/words")
    add_parts(parser, PARTS)
    parser.add_argument(
        "--guidance",
        nargs="+",
        type=_scale,
        default=[1.0, 2.0, 4.0],
        help="measure: scales of classifier-free guidance; 1 is without (default: 1 2 4)",
    )
    parser.add_argument(
        "--count",
        type=whole_number(1, 4096),
        default=256,
        help="measure, render: how many captions of held-out words (default: %(default)s)",
    )
    parser.add_argument(
        "--picture",
        type=home_path,
        help="measure, render: PNG file for a grid of the first six pictures",
    )
    return parser


def _scale(text: str) -> float:
    """A type of options: scales of guidance."""
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not 1 <= scale <= _LARGEST_SCALE:
        raise argparse.ArgumentTypeError(
            f"is {shortened(text)!r}; it must be a number from 1 to {_LARGEST_SCALE}"
        )
    return scale


def _build(chosen: argparse.Namespace) -> None:
    from mixgrpo.words.build import PARTS

    build(chosen, PARTS)


def _render(chosen: argparse.Namespace) -> None:
    from mixgrpo.words import signs

    drawn = signs.draw(signs.split(test=True), chosen.count, random.Random(0))
    captions = [sign.caption for sign in drawn]
    _report(chosen, {"rendered": _rendered(captions)}, captions)


def _measure(chosen: argparse.Namespace) -> None:
    from mixgrpo.models.folder import check_folder
    from mixgrpo.models.registry import find_family
    from mixgrpo.words import measure

    prompts, model = chosen.folder / "prompts_test.txt", chosen.folder / "qwen_image"
    for needed in (prompts, model / "model_index.json"):
        if not needed.is_file():
            raise ValueError(
                f"--folder is {str(chosen.folder)!r}, but {str(needed)!r} does not exist; build it "
                "with `python -m mixgrpo words build`, or choose another --folder"
            )
    try:
        captions = prompts.read_text(encoding="utf-8").splitlines()[: chosen.count]
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompts} is not UTF-8 text; build it again") from error
    if not captions:
        raise ValueError(f"{prompts} is empty; build it again")
    pictures = {"rendered": _rendered(captions)}
    check_folder(find_family("qwen_image"), model)
    pipeline = measure.load(model)
    for guidance in chosen.guidance:
        pictures[f"guidance {guidance:g}"] = measure.draw_signs(pipeline, captions, guidance)
    _report(chosen, pictures, captions)


def _rendered(captions: Sequence[str]) -> Tensor:
    """What the captions describe [N, 3, 32, 64]."""
    import torch

    from mixgrpo.words import renderer, signs

    rng = random.Random(0)
    return torch.stack([renderer.render(signs.parse(caption), rng) for caption in captions])


def _report(
    chosen: argparse.Namespace, pictures: dict[str, Tensor], captions: Sequence[str]
) -> None:
    """Prints what is right in each set of pictures, and saves the first ones if asked to."""
    from mixgrpo.words import measure

    for title, drawn in pictures.items():
        found = measure.measure(drawn, captions)
        print(title, *(f"{name} {share:.3f}" for name, share in found.items()), sep="  ")
    if chosen.picture is not None:
        first = {title: drawn[:IN_GRID] for title, drawn in pictures.items()}
        sheet = measure.grid(list(first.values()), list(first), captions[:IN_GRID])
        chosen.picture.parent.mkdir(parents=True, exist_ok=True)
        write_whole(chosen.picture, sheet.save)


# What each task does, and what is told after Ctrl-C.
_TASKS: dict[str, tuple[Callable[[argparse.Namespace], None], str]] = {
    "build": (_build, LEFT),
    "render": (_render, "nothing was changed"),
    "measure": (_measure, "nothing was changed"),
}
