"""Renders scenes as antialiased 64x64 images from signed distances."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from mixgrpo.shapes.scenes import Scene

SIZE = 64
PALETTE = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.16, 0.66, 0.24),
    "blue": (0.18, 0.30, 0.88),
    "yellow": (0.95, 0.82, 0.18),
    "purple": (0.60, 0.22, 0.72),
    "cyan": (0.22, 0.80, 0.86),
    "gray": (0.50, 0.50, 0.50),
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
}


def render(scene: Scene, rng: random.Random, play: float = 1.0) -> Tensor:
    """Renders an image [3, 64, 64] in [0, 1]; sizes and places are drawn from ``rng``.

    Args:
        play: how much they vary, from 0 (always the same) to 1.
    """
    return render_between(scene, scene, 0.0, rng, play)


def render_between(
    scene: Scene, other: Scene, share: float, rng: random.Random, play: float = 1.0
) -> Tensor:
    """Interpolates from ``scene`` (share 0) to ``other`` (share 1), at the places of ``scene``.

    Colours and signed distances are averaged: half-way from circle to square is a square with
    rounded corners, as an imperfect model would draw it.
    """

    def mixed(first: str, second: str) -> Tensor:
        ends = torch.tensor([PALETTE[first], PALETTE[second]])
        return torch.lerp(ends[0], ends[1], share)[:, None, None]

    image = mixed(scene.background, other.background).repeat(1, SIZE, SIZE)
    places = _places(scene, rng, play)
    for thing, goal, place in zip(scene.things, other.things, places, strict=True):
        covered = _covered(torch.lerp(_from(thing.shape, *place), _from(goal.shape, *place), share))
        image = image + covered * (mixed(thing.colour, goal.colour) - image)
    return image


def _places(scene: Scene, rng: random.Random, play: float) -> list[tuple[float, float, float]]:
    """Centre (x to the right, y downward) and radius in pixels for each thing."""

    def between(low: float, high: float) -> float:
        return (low + high) / 2 + play * (rng.uniform(low, high) - (low + high) / 2)

    middle = SIZE / 2
    if scene.relation is None:
        radius = between(10, 15)
        room = middle - radius - 2
        return [(middle + between(-room, room), middle + between(-room, room), radius)]
    first, second = between(9, 12), between(9, 12)
    ahead, behind = -between(14, 17), between(14, 17)
    aside = between(-6, 6), between(-6, 6)
    if scene.relation in ("right of", "below"):
        ahead, behind = behind, ahead
    if scene.relation in ("left of", "right of"):
        return [
            (middle + ahead, middle + aside[0], first),
            (middle + behind, middle + aside[1], second),
        ]
    return [
        (middle + aside[0], middle + ahead, first),
        (middle + aside[1], middle + behind, second),
    ]


def coverage(shape: str, x: float, y: float, radius: float) -> Tensor:
    """How much of each pixel [64, 64] the shape covers, 0 to 1."""
    return _covered(_from(shape, x, y, radius))


def _covered(distance: Tensor) -> Tensor:
    return (0.5 - distance).clamp(0, 1)


def _from(shape: str, x: float, y: float, radius: float) -> Tensor:
    """Signed distance [64, 64] in pixels of each pixel's centre from the shape, inside negative."""
    pixels = torch.arange(SIZE, dtype=torch.float32) + 0.5
    dx, dy = pixels[None, :] - x, pixels[:, None] - y
    return _DISTANCES[shape](dx, dy, radius)


def _circle(dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    return (dx.square() + dy.square()).sqrt() - radius


def _square(dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    return torch.maximum(dx.abs(), dy.abs()) - 0.88 * radius


def _triangle(dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    # Equilateral, point up; its three edges lie half a (slightly enlarged) radius off the centre.
    inner = 0.6 * radius
    slope = 3**0.5 / 2
    below = dy - inner
    left, right = -slope * dx - 0.5 * dy - inner, slope * dx - 0.5 * dy - inner
    return torch.maximum(below, torch.maximum(left, right))


def _cross(dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    arm = 0.33 * radius
    tall = torch.maximum(dx.abs() - arm, dy.abs() - radius)
    wide = torch.maximum(dx.abs() - radius, dy.abs() - arm)
    return torch.minimum(tall, wide)


_DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross}
