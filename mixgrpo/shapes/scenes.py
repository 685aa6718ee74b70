"""Scenes of one or two coloured shapes, and their captions; every caption parses back."""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = ("gray", "white", "black")
RELATIONS = ("left of", "right of", "above", "below")

# One in eight of all captions is held out for testing and never rendered for training.
TEST_SHARE = 8


@dataclass(frozen=True)
class Thing:
    """One shape of one colour."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One thing, or two with ``things[0] relation things[1]``, before a plain background."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str

    @property
    def caption(self) -> str:
        body = str(self.things[0])
        if self.relation is not None:
            body = f"{body} {self.relation} {self.things[1]}"
        return f"{body} on a {self.background} background"


def parse(caption: str) -> Scene:
    """The scene that a caption describes.

    Raises:
        ValueError: if it is not a caption of this world.
    """
    scene = _CAPTIONS.get(" ".join(caption.lower().split()))
    if scene is None:
        raise ValueError(
            f"not a Shapes caption: {caption!r}; captions read like "
            "'a red circle left of a blue square on a gray background'"
        )
    return scene


def all_scenes() -> list[Scene]:
    """Every scene, in a fixed order: 72 of one thing, 6,624 of two different things."""
    things = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    single = [Scene((thing,), None, b) for thing in things for b in BACKGROUNDS]
    pairs = itertools.permutations(things, 2)
    double = [Scene(p, r, b) for p in pairs for r in RELATIONS for b in BACKGROUNDS]
    return single + double


def is_test(scene: Scene) -> bool:
    """Whether a scene is held out; decided by its caption alone, so it never changes."""
    digest = hashlib.sha256(scene.caption.encode()).digest()
    return digest[0] % TEST_SHARE == 0


def split(test: bool) -> list[Scene]:
    """All training or all test scenes, in a fixed order. The two are disjoint."""
    return [scene for scene in all_scenes() if is_test(scene) == test]


def draw(scenes: list[Scene], count: int, rng: random.Random) -> list[Scene]:
    """``count`` scenes with replacement, half of them of one thing."""
    single = [scene for scene in scenes if len(scene.things) == 1]
    double = [scene for scene in scenes if len(scene.things) == 2]
    return [rng.choice(single if rng.random() < 0.5 else double) for _ in range(count)]


LOOKS = ("colour", "shape", "background")
FACTS = (*LOOKS, "relation", "exchange")


def alter(scene: Scene, rng: random.Random, kinds: tuple[str, ...] = FACTS) -> Scene:
    """The scene with one fact changed: a colour, a shape, the background, the relation, or the
    two things' colours exchanged. Never the same scene, never two equal things."""
    if scene.relation is None:
        kinds = tuple(kind for kind in kinds if kind in LOOKS)
    while True:
        changed = _alter_once(scene, rng, rng.choice(kinds))
        if changed != scene and len(set(changed.things)) == len(changed.things):
            return changed


def _alter_once(scene: Scene, rng: random.Random, kind: str) -> Scene:
    things = list(scene.things)
    which = rng.randrange(len(things))
    relation, background = scene.relation, scene.background
    if kind == "colour":
        things[which] = Thing(rng.choice(COLOURS), things[which].shape)
    elif kind == "shape":
        things[which] = Thing(things[which].colour, rng.choice(SHAPES))
    elif kind == "background":
        background = rng.choice(BACKGROUNDS)
    elif kind == "relation":
        relation = rng.choice(RELATIONS)
    else:
        first, second = things
        things = [Thing(second.colour, first.shape), Thing(first.colour, second.shape)]
    return Scene(tuple(things), relation, background)


_CAPTIONS = {scene.caption: scene for scene in all_scenes()}
VOCABULARY = tuple(sorted({word for caption in _CAPTIONS for word in caption.split()}))
