"""The parts of the program, in the order of their worth."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A module of this package that is run in a process of its own.

    Attributes:
        name: name of the module and of the part in the results.
        about: what it shows, in a few words.
        seconds: time limit on a GPU.
        least: with less time than this left, it is not started; 0 for a part that needs no GPU and
            is run in any case.
    """

    name: str
    about: str
    seconds: float
    least: float

    @property
    def module(self) -> str:
        return f"{__package__}.{self.name}"


PARTS = (
    Part("machine", "rates of matrix products and copies: the ceilings", 40, 10),
    Part("right", "tests: the GPU computes what the CPU computes", 110, 30),
    Part("lora", "iterations at FLUX.1-dev's size, LoRA", 270, 40),
    Part("full", "iterations at FLUX.1-dev's size, all weights trained", 100, 40),
    Part("evaluation", "attention backends, batch sizes, where the time goes", 70, 30),
    Part("rewards", "rewards at their published sizes", 80, 30),
    Part("outside", "cheaper evaluations outside the window, float8 among them", 130, 110),
    Part("shapes", "the family on the Shapes world", 120, 40),
    Part("plan", "the plan's memory and seconds against the measured ones", 30, 0),
)
