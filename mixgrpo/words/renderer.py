"""Renders signs as antialiased pictures of 64 x 32 pixels.

Each letter is drawn in the middle of its own slot, and all letters of a sign are moved together by
whole pixels, so that the judge can compare a picture with everything that can be drawn.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mixgrpo.words.signs import FONTS, LETTERS, Sign

HEIGHT, WIDTH = 32, 64
SLOT = 20  # pixels between the middles of two letters
SHIFTS = tuple(itertools.product((-2, -1, 0, 1, 2), (-1, 0, 1)))  # down and right, in pixels
PALETTE = {
    "red": (0.75, 0.10, 0.12),
    "green": (0.05, 0.45, 0.16),
    "blue": (0.12, 0.20, 0.75),
    "gray": (0.28, 0.28, 0.28),
    "white": (1.0, 1.0, 1.0),
    "yellow": (1.0, 0.85, 0.10),
}

_FILES = {"sans": "DejaVuSans-Bold.ttf", "serif": "DejaVuSerif-Bold.ttf"}  # in matplotlib
_FINE = 8  # letters are drawn this much larger, then averaged
_POINTS = 26
_WIDEST = 19  # pixels; wider letters are made narrower
_BASELINE = 23


def render(sign: Sign, rng: random.Random) -> Tensor:
    """The picture [3, 32, 64] in [0, 1] of a sign, at a random shift."""
    return paint(ink_of(sign.word, sign.font, rng.choice(SHIFTS)), sign)


def paint(ink: Tensor, sign: Sign) -> Tensor:
    """Coverage [32, 64] in [0, 1] -> [3, 32, 64] in the sign's colours."""
    ground, colour = (
        torch.tensor(PALETTE[name])[:, None, None] for name in (sign.ground, sign.ink)
    )
    return ground + ink * (colour - ground)


def ink_of(word: str, font: str, shift: tuple[int, int]) -> Tensor:
    """How much of each pixel [32, 64] the letters of a word cover, 0 to 1."""
    masks = letter_masks()[FONTS.index(font)]
    ink = torch.zeros(HEIGHT, WIDTH)
    for slot, letter in enumerate(word):
        at = slot_start(slot)
        ink[:, at : at + SLOT] = masks[LETTERS.index(letter)]
    return ink.roll(shift, (0, 1))  # nothing is drawn as near to the border as letters move


def slot_start(slot: int) -> int:
    """The first column of slot 0, 1 or 2 of an unmoved sign."""
    return WIDTH // 2 - SLOT // 2 + (slot - 1) * SLOT


@functools.cache
def letter_masks() -> Tensor:
    """The coverage of every letter in its slot [2 fonts, 19 letters, 32, 20]."""
    return torch.stack(
        [torch.stack([_letter_mask(letter, font) for letter in LETTERS]) for font in FONTS]
    )


def _letter_mask(letter: str, font: str) -> Tensor:
    face = _face(font)
    left, _, right, _ = map(int, face.getbbox(letter, anchor="ls"))
    fine = Image.new("L", (right - left, HEIGHT * _FINE))
    ImageDraw.Draw(fine).text((-left, _BASELINE * _FINE), letter, fill=255, font=face, anchor="ls")
    width = min(right - left, _WIDEST * _FINE)
    canvas = Image.new("L", (SLOT * _FINE, HEIGHT * _FINE))
    narrowed = fine.resize((width, fine.height), Image.Resampling.BOX)
    canvas.paste(narrowed, ((canvas.width - width) // 2, 0))
    pixels = torch.from_numpy(np.array(canvas, dtype=np.float32) / 255)
    return pixels.reshape(HEIGHT, _FINE, SLOT, _FINE).mean((1, 3))


@functools.cache
def _face(font: str) -> ImageFont.FreeTypeFont:
    found = importlib.util.find_spec("matplotlib")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the fonts of the signs are in matplotlib", name="matplotlib")
    path = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / _FILES[font]
    return ImageFont.truetype(str(path), _POINTS * _FINE, layout_engine=ImageFont.Layout.BASIC)
