"""``python -m mixgrpo words``: builds, draws and measures the world of words."""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mixgrpo.commands.command_line import OptionParser, complain, home_path, whole_number

if TYPE_CHECKING:  # torch is not needed for --help
    from torch import Tensor

FOLDER = Path("data/words")
IN_GRID = 6


def run(arguments: Sequence[str]) -> int:
    """Carries out the task that the first word names; returns the exit code."""
    try:
        return carry_out(_parser().parse_args(arguments))
    except ValueError as error:
        return complain(error)


def carry_out(chosen: argparse.Namespace) -> int:
    """Builds, draws or measures; returns the exit code."""
    return {"build": _build, "render": _render, "measure": _measure}[chosen.task](chosen)


def _parser() -> OptionParser:
    from mixgrpo.words.build import PARTS

    parser = OptionParser("words", "Builds, draws and measures the world of words.")
    parser.add_argument(
        "task",
        choices=("build", "render", "measure"),
        help="build: captions and checkpoints, with fixed seeds; render: example pictures as the "
        "model should draw them; measure: what the model draws, and how much of it is right",
    )
    parser.add_argument(
        "--folder",
        type=home_path,
        default=FOLDER,
        help="folder of the world, or in which to build it (default: %(default)s)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(PARTS),
        default=list(PARTS),
        help="build: parts to build (default: all)",
    )
    parser.add_argument(
        "--guidance",
        nargs="+",
        type=float,
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


def _build(chosen: argparse.Namespace) -> int:
    from mixgrpo.words.build import PARTS

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name, build in PARTS.items():
        if name in chosen.only:
            start = time.perf_counter()
            build(chosen.folder)
            print(f"{name}: {time.perf_counter() - start:.0f} s")
    return 0


def _render(chosen: argparse.Namespace) -> int:
    from mixgrpo.words import signs

    drawn = signs.draw(signs.split(test=True), chosen.count, random.Random(0))
    captions = [sign.caption for sign in drawn]
    _report(chosen, {"rendered": _rendered(captions)}, captions)
    return 0


def _measure(chosen: argparse.Namespace) -> int:
    from mixgrpo.words import measure

    prompts = chosen.folder / "prompts_test.txt"
    captions = prompts.read_text(encoding="utf-8").splitlines()[: chosen.count]
    pipeline = measure.load(chosen.folder / "qwen_image")
    pictures = {
        f"guidance {guidance:g}": measure.draw_signs(pipeline, captions, guidance)
        for guidance in chosen.guidance
    }
    _report(chosen, {"rendered": _rendered(captions), **pictures}, captions)
    return 0


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
        sheet.save(chosen.picture)
