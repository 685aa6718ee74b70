"""The exact judge: reads shapes, colours and places from pixels; reward models do not train on it.

Its two verdicts are metrics with the interface of a reward (``mixgrpo.rewards``): the fraction of a
caption's facts that the image gets right, and whether all of them are right.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from mixgrpo.shapes.renderer import PALETTE, SIZE, coverage
from mixgrpo.shapes.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, parse

# Thresholds on colours are Euclidean distances in RGB; the palette's closest pair is 0.5 apart.
SAME_COLOUR = 0.24
NOT_BACKGROUND = 0.22
LEAST_AREA = 40
LEAST_OVERLAP = 0.75
LEAST_PURITY = 0.8


@dataclass(frozen=True)
class Found:
    """A thing found in an image; its colour or shape is None if none matches well enough."""

    colour: str | None
    shape: str | None
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    """The content of an image; background is None if its colour is not one of this world's."""

    background: str | None
    found: tuple[Found, ...]


def all_right(images: Tensor, texts: Sequence[str]) -> Tensor:
    """[B] 1.0 if every fact of the caption holds and nothing else is drawn, otherwise 0.0."""
    return (facts_right(images, texts) == 1).float()


def facts_right(images: Tensor, texts: Sequence[str]) -> Tensor:
    """[B] the fraction of the caption's facts that hold in the image.

    Facts: the number of things, the background, each thing's colour and shape, their relation.
    Images are [B, 3, 64, 64] in [0, 1]; texts must be captions of this world.
    """
    shares = [
        _share(parse(text), read(image))
        for image, text in zip(images.float().cpu(), texts, strict=True)
    ]
    return torch.tensor(shares, dtype=torch.float32, device=images.device)


def _share(scene: Scene, reading: Reading) -> float:
    things = scene.things
    right = int(len(reading.found) == len(things)) + int(reading.background == scene.background)
    best = 0
    # Described and found things are paired so that the most facts hold.
    for chosen in itertools.permutations(reading.found, min(len(things), len(reading.found))):
        fits = sum(
            int(thing.colour == found.colour) + int(thing.shape == found.shape)
            for thing, found in zip(things, chosen, strict=False)
        )
        if scene.relation is not None and len(chosen) == 2:
            fits += int(_holds(scene.relation, chosen[0], chosen[1]))
        best = max(best, fits)
    facts = 2 + 2 * len(things) + int(scene.relation is not None)
    return (right + best) / facts


def _holds(relation: str, first: Found, second: Found) -> bool:
    """Whether the relation holds along its axis, which must also be the pair's main axis."""
    dx, dy = second.x - first.x, second.y - first.y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    forward = along > 0 if relation in ("left of", "above") else along < 0
    return forward and abs(along) > abs(across)


def read(image: Tensor) -> Reading:
    """Reads one image [3, 64, 64] in [0, 1]."""
    return _read(image.float().contiguous().numpy().tobytes())


@functools.lru_cache(maxsize=256)  # both verdicts of a validation read the same images
def _read(image: bytes) -> Reading:
    pixels = np.frombuffer(image, np.float32).reshape(3, SIZE, SIZE).transpose(1, 2, 0)
    pixels = pixels.astype(np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    mask = np.linalg.norm(pixels - ground, axis=-1) > NOT_BACKGROUND
    parts, count = ndimage.label(mask)
    found = [
        _found(pixels, part)
        for part in (parts == index for index in range(1, count + 1))
        if part.sum() >= LEAST_AREA
    ]
    return Reading(_nearest(ground, BACKGROUNDS), tuple(found[:4]))


def _found(pixels: np.ndarray, part: np.ndarray) -> Found:
    rows, columns = np.nonzero(part)
    # The rim blends with the background, so the colour is read inside it.
    inner = ndimage.binary_erosion(part, iterations=2)
    inside = pixels[inner if inner.sum() >= 9 else part]
    colour = _nearest(np.median(inside, axis=0), COLOURS)
    if colour is not None:
        pure = np.linalg.norm(inside - np.array(PALETTE[colour]), axis=-1) < SAME_COLOUR
        colour = colour if pure.mean() >= LEAST_PURITY else None
    return Found(colour, _shape(part), float(columns.mean()) + 0.5, float(rows.mean()) + 0.5)


def _nearest(colour: np.ndarray, names: Sequence[str]) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.array(PALETTE[name]))) for name in names}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] < SAME_COLOUR else None


def _shape(part: np.ndarray) -> str | None:
    """The shape that overlaps the part most when drawn with the same area at the best place."""
    rows, columns = np.nonzero(part)
    x, y = float(columns.mean()) + 0.5, float(rows.mean()) + 0.5
    overlaps = {}
    for shape in SHAPES:
        radius = float(np.sqrt(part.sum() / _UNIT_AREA[shape]))
        # The scene's centre is not the centroid of a triangle cut by the antialiased rim, so
        # a pixel of play is allowed.
        overlaps[shape] = max(
            _overlap(part, coverage(shape, x + dx, y + dy, radius).numpy() > 0.5)
            for dx, dy in itertools.product((-0.7, 0.0, 0.7), repeat=2)
        )
    shape = max(overlaps, key=overlaps.__getitem__)
    return shape if overlaps[shape] >= LEAST_OVERLAP else None


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / max((first | second).sum(), 1))


# Area of each shape at radius 1.
_UNIT_AREA = {shape: float(coverage(shape, 32, 32, 15).sum()) / 15**2 for shape in SHAPES}
