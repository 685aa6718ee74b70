"""The exact judge: which word, ground, ink and font a picture shows, read from its pixels.

The picture is compared with everything that the renderer can draw. The reader of the ``ocr`` reward
plays no part in it, so the judge distinguishes learning to write from learning to please that
reader. Its verdicts are metrics with the interface of a reward (``mixgrpo.rewards``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mixgrpo.words.renderer import HEIGHT, PALETTE, SHIFTS, SLOT, WIDTH, letter_masks, slot_start
from mixgrpo.words.signs import FONTS, GROUNDS, INKS, LETTERS, Sign, parse

# Euclidean distance in RGB; the closest pair of grounds is 0.42 apart.
SAME_GROUND = 0.2
# A letter is read if its drawing differs from the picture by less than half of what an empty slot
# differs from the drawing, in squares.
LEAST_FIT = 0.5
UNREAD = "-"


@dataclass(frozen=True)
class Reading:
    """What a picture shows.

    Attributes:
        word: its three letters; ``UNREAD`` in place of one that fits no letter well enough.
        ground: its colour, None if it is not one of this world's.
        ink: the letters' colour, None if no letter was read.
        font: the letters' font, None if no letter was read.
    """

    word: str
    ground: str | None
    ink: str | None
    font: str | None


def word_right(images: Tensor, texts: Sequence[str]) -> Tensor:
    """[B] 1.0 if the picture shows exactly the caption's word, otherwise 0.0."""
    return _verdicts(images, texts, lambda sign, seen: float(seen.word == sign.word))


def look_right(images: Tensor, texts: Sequence[str]) -> Tensor:
    """[B] the fraction of ground, ink and font that the picture gets right."""
    return _verdicts(images, texts, lambda sign, seen: sum(_facts(sign, seen)[3:]) / 3)


def facts_right(images: Tensor, texts: Sequence[str]) -> Tensor:
    """[B] the fraction of the caption's facts that hold in the picture.

    Facts: each of the three letters, the ground, the ink, the font. Images are [B, 3, 32, 64] in
    [0, 1]; texts must be captions of this world.
    """
    return _verdicts(images, texts, lambda sign, seen: sum(_facts(sign, seen)) / 6)


def all_right(images: Tensor, texts: Sequence[str]) -> Tensor:
    """[B] 1.0 if all six facts of the caption hold in the picture, otherwise 0.0."""
    return _verdicts(images, texts, lambda sign, seen: float(all(_facts(sign, seen))))


def _verdicts(
    images: Tensor, texts: Sequence[str], verdict: Callable[[Sign, Reading], float]
) -> Tensor:
    found = [
        verdict(parse(text), read(image))
        for image, text in zip(images.float().cpu(), texts, strict=True)
    ]
    return torch.tensor(found, dtype=torch.float32, device=images.device)


def _facts(sign: Sign, seen: Reading) -> list[bool]:
    letters = [a == b for a, b in zip(sign.word, seen.word, strict=True)]
    return [*letters, sign.ground == seen.ground, sign.ink == seen.ink, sign.font == seen.font]


def read(image: Tensor) -> Reading:
    """Reads one picture [3, 32, 64] in [0, 1]."""
    return _read(image.float().contiguous().numpy().tobytes())


@functools.lru_cache(maxsize=1024)  # the verdicts of a validation read the same images
def _read(image: bytes) -> Reading:
    pixels = torch.from_numpy(np.frombuffer(image, np.float32).copy()).view(3, HEIGHT, WIDTH)
    border = torch.cat([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], 1)
    ground = border.median(1).values  # no letter reaches the border
    differences, contrasts = (
        torch.stack(each)
        for each in zip(*(_compare(pixels, ground, name) for name in INKS), strict=True)
    )
    # The ink and the shift of the drawings that differ least from the picture.
    ink, shift = divmod(int(differences.amin((3, 4)).sum(2).argmin()), len(SHIFTS))
    here = differences[ink, shift]  # [3 slots, 2 fonts, letters]
    word = "".join(_letter(slot, contrasts[ink]) for slot in here)
    font = FONTS[int(here.amin(2).sum(0).argmin())]
    empty = word == UNREAD * len(here)
    return Reading(word, _ground(ground), None if empty else INKS[ink], None if empty else font)


def _compare(pixels: Tensor, ground: Tensor, ink: str) -> tuple[Tensor, Tensor]:
    """Compares the slots of a picture at each shift with each letter's drawing in this ink.

    Returns the squared differences [15 shifts, 3 slots, 2 fonts, letters] and the drawings' own
    squared contrast to the ground [2 fonts, letters], by which an empty slot differs from them.
    """
    toward = torch.tensor(PALETTE[ink]) - ground
    beyond = pixels - ground[:, None, None]
    along = (beyond * toward[:, None, None]).sum(0)
    both = torch.stack([along, beyond.square().sum(0)])
    windows = torch.stack(
        [
            torch.stack([both.roll((-down, -right), (1, 2))[:, :, at : at + SLOT] for at in STARTS])
            for down, right in SHIFTS
        ]
    )  # [15, 3, 2, 32, 20]
    masks = letter_masks()
    contrast = toward.square().sum().clamp(min=1e-6) * masks.square().sum((2, 3))
    common = torch.einsum("swyx,flyx->swfl", windows[:, :, 0], masks)
    energy = windows[:, :, 1].sum((2, 3))[:, :, None, None]
    return energy - 2 * common + contrast, contrast


def _letter(differences: Tensor, contrasts: Tensor) -> str:
    """The letter whose drawing differs least from one slot; both are [2 fonts, letters]."""
    font, letter = divmod(int(differences.argmin()), len(LETTERS))
    fit = 1 - differences[font, letter] / contrasts[font, letter]
    return LETTERS[letter] if fit >= LEAST_FIT else UNREAD


STARTS = tuple(slot_start(slot) for slot in range(3))


def _ground(colour: Tensor) -> str | None:
    distances = {name: float((colour - torch.tensor(PALETTE[name])).norm()) for name in GROUNDS}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] < SAME_GROUND else None
