"""The members that family.py compares: the recipes, the ablations, and the knobs they override."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixgrpo.commands.train import parse
from mixgrpo.config import Config

REFERENCE = "mixgrpo"
RECIPES = {
    "mixgrpo": "MixGRPO",
    "mixgrpo_flash": "MixGRPO-Flash",
    "mixgrpo_flash_star": "MixGRPO-Flash*",
    "mixgrpo_cps": "MixGRPO, CPS",
    "dancegrpo": "DanceGRPO",
    "flowgrpo": "Flow-GRPO",
    "flowgrpo_fast": "Flow-GRPO-Fast",
    "grpo_guard": "GRPO-Guard",
}
# The whole range of steps that can be stochastic, for ablations of how the window moves.
FREE = "free_progressive"
# Of the key comparisons, which get more seeds than the others before anything else does.
KEY = ("mixgrpo", "independent_noise", "dancegrpo")


@dataclass(frozen=True)
class Settings:
    """The settings that all members have in common.

    Attributes:
        iterations: iterations of every run of the first table.
        prompts: prompts per iteration.
        learning_rate: learning rate of every recipe, so that only the method differs.
        captions: captions of the validation: the test captions, repeated with new noise if needed.
        seeds: seeds of the recipes and of independent noise.
        key_seeds: additional seeds of the key comparisons.
        ablation_seeds: seeds of the ablations.
    """

    iterations: int = 18
    prompts: int = 6
    learning_rate: float = 1.5e-4
    captions: int = 384
    seeds: tuple[int, ...] = (1, 2, 3)
    key_seeds: tuple[int, ...] = (4, 5)
    ablation_seeds: tuple[int, ...] = (1, 2, 3)


@dataclass(frozen=True)
class Member:
    """One way to train.

    Attributes:
        name: name of its folder and in the results.
        label: label in tables.
        group: the table it belongs to.
        recipe: its recipe, scripts/recipes/shapes_*.yaml.
        reference: the member it is compared with.
        knobs: overrides, by dotted name.
        timed: whether it is also trained for as long as MixGRPO takes.
    """

    name: str
    label: str
    group: str
    recipe: str = REFERENCE
    reference: str = REFERENCE
    knobs: Mapping[str, Any] = field(default_factory=dict)
    timed: bool = False


def members(iterations: int) -> list[Member]:
    """All members, for runs of this many iterations. README.md lists what is held equal."""
    recipes = [
        Member(name, label, "recipes", recipe=name, timed=True) for name, label in RECIPES.items()
    ]
    return [*recipes, _independent(), *_windows(), *_moves(iterations), *_tails()]


def _independent() -> Member:
    knobs = {"sampling.shared_noise": False}
    return Member("independent_noise", "independent noise", "noise", knobs=knobs, timed=True)


def _windows() -> list[Member]:
    # All start at steps 0 and 1 for equally many iterations, as the reference (size 4) does.
    return [
        Member(
            name=f"window_{size}",
            label=f"window {size}",
            group="window",
            knobs={"window.size": size, "window.envelope": [0, size + 1]},
        )
        for size in (1, 2, 6)
    ]


def _moves(iterations: int) -> list[Member]:
    """Windows of 4 steps on the whole range: with 10 steps they start at 0 to 5."""
    free: dict[str, Any] = {"window.envelope": None, "window.start": 0}

    def pace(windows: float) -> dict[str, int]:
        return {"window.iters_per_window": share(iterations, windows)}

    progressive = Member(FREE, "progressive", "strategy", knobs={**free, **pace(6)})
    # The paper's k = 0.1 beyond start 13 (of 20) would be k = 0.25 beyond 3 (of 5) here, which in
    # so few iterations is the progressive schedule; exp_decay is sharper.
    strategies: dict[str, dict[str, Any]] = {
        "random": {},
        "decay": {
            "window.max_iters": max(1, round(iterations / 3.6)),
            "window.min_iters": max(1, round(iterations / 18)),
        },
        "exp_decay": {
            **pace(3.3),
            "window.decay_rate": 0.5,
            "window.decay_threshold": 1,
        },
        "frozen": {},
    }
    others = [
        Member(f"free_{name}", name, "strategy", reference=FREE,
               knobs={**free, "window.strategy": name, **knobs})
        for name, knobs in strategies.items()
    ]  # fmt: skip
    stride = Member("stride_2", "stride 2", "stride", reference=FREE,
                    knobs={**free, **pace(6), "window.stride": 2})  # fmt: skip
    slower = Member("windows_3", "3 windows", "pace", reference=FREE, knobs={**free, **pace(3)})
    return [progressive, *others, stride, slower]


def _tails() -> list[Member]:
    flash = {"recipe": "mixgrpo_flash", "reference": "mixgrpo_flash"}
    orders = [
        Member(f"order_{order}", f"order {order}", "tail", knobs={"tail.order": order}, **flash)
        for order in (1, 3)
    ]
    ratios = [
        Member(f"ratio_{ratio}", f"ratio {ratio}", "tail", knobs={"tail.ratio": ratio}, **flash)
        for ratio in (0.2, 0.7)
    ]
    # There must be steps before the window that can be compressed: three become one.
    late = {"window.envelope": None, "window.strategy": "frozen", "window.start": 3}
    prefix = {"prefix.solver": "dpm", "prefix.ratio": 0.4}
    plain = Member("late", "window at step 3", "prefix", "mixgrpo_flash", "late", late)
    fast = Member("fast_prefix", "shortened before it", "prefix", "mixgrpo_flash", "late",
                  {**late, **prefix})  # fmt: skip
    return [*orders, *ratios, plain, fast]


def share(iterations: int, windows: float) -> int:
    """Iterations per window, for at most this many windows in a run."""
    return math.ceil(iterations / windows)


# --- configurations -------------------------------------------------------------------------------


def configuration(
    member: Member, settings: Settings, seed: int, folder: Path, captions: Path
) -> Config:
    """The run's configuration; windows move at the recipe's pace, scaled to the run's length."""
    recipe = copy.deepcopy(_recipe(member.recipe))
    pace = recipe.window.iters_per_window * settings.iterations / recipe.run.iterations
    overrides = {
        "run.folder": str(folder),
        "run.iterations": settings.iterations,
        "run.seed": seed,
        "run.resume": True,
        "run.threads": 1,
        "batch.prompts": settings.prompts,
        "update.learning_rate": settings.learning_rate,
        "window.iters_per_window": max(1, round(pace)),
        "ema.decay": 0.0,
        "validation.every": 0,
        "validation.before": False,
        "validation.prompts_file": str(captions),
        "validation.prompts": 0,
        "validation.pictures": 0,
        "checkpoint.every": 10,
        "checkpoint.keep": 1,
        "log.wandb": "disabled",
        "log.progress": False,
        **member.knobs,
    }
    for knob, value in overrides.items():
        set_knob(recipe, knob, value)
    return recipe


@functools.cache
def _recipe(name: str) -> Config:
    return parse(["--recipe", f"shapes_{name}"])


def set_knob(config: Config, knob: str, value: Any) -> None:
    """Sets a knob by its dotted name. Raises ValueError if there is none of that name."""
    *sections, name = knob.split(".")
    place: Any = config
    for section in sections:
        place = getattr(place, section, None)
    if not hasattr(place, name):
        raise ValueError(f"there is no knob {knob}")
    setattr(place, name, value)
