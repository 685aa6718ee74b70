"""The family's recipes: what they differ in, their published values, and that they run."""

from __future__ import annotations

import copy
import functools
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_flux_dev import PARAMETERS, flux_dev, small_transformer, trained
from tiny_world import World, train_here, training_records

from mixgrpo.assembly import make_plan, make_windows
from mixgrpo.checks import check
from mixgrpo.commands.train import parse
from mixgrpo.config import RECIPES, Config, RewardConfig, flatten
from mixgrpo.maths.emphasis import trained_steps
from mixgrpo.maths.schedule import step_at
from mixgrpo.maths.transitions import make_transition
from mixgrpo.maths.window import WindowSchedule

METHODS = (
    "mixgrpo", "mixgrpo_flash", "mixgrpo_flash_star", "mixgrpo_cps", "dancegrpo", "flowgrpo",
    "flowgrpo_fast", "grpo_guard",
)  # fmt: skip
FLUX = [f"flux_{method}" for method in METHODS]

# Recipe -> its neighbour, and every knob that differs from it.
FLASH = {"tail.solver": "dpm"}
FAST = {
    "sampling.transition": "cps",
    "sampling.eta": 0.8,
    "sampling.log_ratio": "unscaled",
    "sampling.shared_noise": True,
    "window.strategy": "random",
    "window.size": 3,
    "window.envelope": [0, 3],
}
GUARD = {"sampling.log_ratio": "guard", "update.step_weight": "inverse_dt"}
DIFFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "flux_mixgrpo_flash": (
        "flux_mixgrpo",
        {**FLASH, "tail.ratio": 0.4, "window.iters_per_window": 20},
    ),
    "flux_mixgrpo_flash_star": (
        "flux_mixgrpo",
        {**FLASH, "tail.ratio": 0.2, "window.strategy": "frozen"},
    ),
    "flux_mixgrpo_cps": ("flux_mixgrpo", {"sampling.transition": "cps"}),
    "flux_dancegrpo": (
        "flux_mixgrpo",
        {
            "sampling.transition": "dance_sde",
            "sampling.eta": 0.3,
            "window.strategy": "all",
            "update.step_fraction": 0.6,
            "update.optimizer_steps": 3,
        },
    ),
    "flux_flowgrpo": (
        "flux_mixgrpo",
        {
            "model.train": "lora",
            "model.height": 512,
            "model.width": 512,
            "sampling.steps": 6,
            "sampling.shift": 0.0,
            "sampling.eta": 0.9,
            "sampling.shared_noise": False,
            "window.strategy": "all",
            "batch.prompts": 48,
            "batch.samples": 24,
            "advantage.kind": "global_std",
            "update.optimizer_steps": 2,
            "update.learning_rate": 3e-4,
            "ema.decay": 0.9,
            "ema.every": 4,
            "validation.steps": 28,
        },
    ),
    "flux_flowgrpo_fast": ("flux_flowgrpo", {**FAST, "update.clip": 1e-5}),
    "flux_grpo_guard": ("flux_flowgrpo", {**GUARD, "update.clip": 2e-6}),
    "shapes_mixgrpo_flash": (
        "shapes_mixgrpo",
        {**FLASH, "tail.ratio": 0.4, "window.iters_per_window": 36},
    ),
    "shapes_mixgrpo_flash_star": (
        "shapes_mixgrpo",
        {
            **FLASH,
            "tail.ratio": 0.2,
            "window.strategy": "frozen",
            "window.iters_per_window": 25,  # these two are the defaults, and not used
            "window.envelope": None,
        },
    ),
    "shapes_mixgrpo_cps": ("shapes_mixgrpo", {"sampling.transition": "cps"}),
    "shapes_dancegrpo": (
        "shapes_mixgrpo",
        {
            "sampling.transition": "dance_sde",
            "sampling.eta": 0.3,
            "window.strategy": "all",
            "window.iters_per_window": 25,
            "window.envelope": None,
            "update.step_fraction": 0.6,
            "update.clip": 6e-4,
        },
    ),
    "shapes_flowgrpo": (
        "shapes_mixgrpo",
        {
            "sampling.shared_noise": False,
            "window.strategy": "all",
            "window.iters_per_window": 25,
            "window.envelope": None,
            "advantage.kind": "global_std",
            "update.kl": 0.04,
        },
    ),
    "shapes_flowgrpo_fast": ("shapes_flowgrpo", {**FAST, "update.kl": 0.0, "update.clip": 8e-5}),
    "shapes_grpo_guard": ("shapes_flowgrpo", {**GUARD, "update.kl": 0.0, "update.clip": 4.5e-5}),
}


@functools.cache
def read(name: str) -> Config:
    return parse(["--recipe", name])


def recipe(name: str) -> Config:
    return copy.deepcopy(read(name))


def test_every_method_has_a_recipe_for_both_worlds() -> None:
    wanted = {f"{world}_{method}" for world in ("flux", "shapes") for method in METHODS}
    assert wanted <= {path.stem for path in RECIPES.glob("*.yaml")}
    assert wanted == DIFFERENCES.keys() | {"flux_mixgrpo", "shapes_mixgrpo"}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_recipe_differs_from_its_neighbour_in_the_method_alone(name: str) -> None:
    neighbour, expected = DIFFERENCES[name]
    before, after = flatten(recipe(neighbour)), flatten(recipe(name))
    assert before.keys() == after.keys()
    found = {key: value for key, value in after.items() if value != before[key]}
    assert found.pop("run.folder") == f"runs/{name}"
    assert found == expected


@pytest.mark.parametrize(
    ("name", "iterations_per_window", "evaluations", "trained"),
    [  # of an image by itself, as the papers count: the first window, and the last iteration's
        ("flux_mixgrpo", 25, (25, 25), 4),
        ("flux_mixgrpo_flash", 20, (12, 21), 4),
        ("flux_mixgrpo_flash_star", None, (8, 8), 4),
        ("flux_mixgrpo_cps", 25, (25, 25), 4),
        ("flux_dancegrpo", None, (25, 25), 14),
        ("flux_flowgrpo", None, (6, 6), 5),
        ("flux_flowgrpo_fast", None, (6, 6), 3),
        ("flux_grpo_guard", None, (6, 6), 5),
    ],
)
def test_evaluations_are_the_published_ones(name, iterations_per_window, evaluations, trained):
    config = recipe(name)
    windows = [make_windows(config).at(i) for i in (0, config.run.iterations - 1)]
    assert tuple(make_plan(config, window).steps for window in windows) == evaluations
    assert trained_steps(windows[0].size, config.update.step_fraction) == trained
    if iterations_per_window:
        starts = [make_windows(config).at(i).start for i in range(config.run.iterations)]
        assert starts.count(0) == iterations_per_window


def test_the_small_worlds_guarded_clip_range_is_the_plain_one_in_its_scale() -> None:
    """Its log-ratio is std times the plain one's; here is the mean std of the trained steps."""
    config = recipe("shapes_grpo_guard")
    plan = make_plan(config, make_windows(config).at(0))
    step = torch.zeros(plan.window.size, 1, 1)
    transition = make_transition(config.sampling.transition, config.sampling.eta)
    std = transition(step, step, step_at(plan.sigmas, torch.tensor(plan.window.steps))).std
    assert config.update.clip == pytest.approx(1e-4 * float(std.mean()), rel=0.02)


# ---- FLUX.1-dev's size, without its weights


@pytest.fixture(scope="module")
def policies() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("name", FLUX)
def test_flux_recipes_build_flux_dev(world: World, policies: dict[str, Any], name: str) -> None:
    """On the meta device; those that train the same share a model."""
    model = asdict(recipe(name).model)
    policy = policies.setdefault(str(model), None) or flux_dev(world, **model)
    policies[str(model)] = policy
    weights = trained(policy)
    count = sum(weight.numel() for weight in weights.values())
    if model["train"] == "full":
        assert count == PARAMETERS
        assert policy.latent_shape == (45 * 45, 64)
    else:
        # 12 adapted projections in a double block, 5 in a single one; see test_flux_dev.
        ends = (19 * 8 + 38 * 3) * 6144 + 19 * 4 * 15360 + 38 * (15360 + 18432)
        assert count == 64 * ends
        assert len(weights) == 2 * (19 * 12 + 38 * 5)
        assert policy.latent_shape == (32 * 32, 64)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


# ---- a dry run


@pytest.fixture(scope="module")
def small_model(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX folder with one block of each kind."""
    folder = tmp_path_factory.mktemp("small") / "model"
    pipeline = world.policy().pipeline
    pipeline.transformer = small_transformer()
    pipeline.save_pretrained(folder)
    return folder


def dry(world: World, model: Path, folder: Path) -> dict[str, Any]:
    """All that a dry run changes beside the rewards' models.

    bfloat16 and micro-batches of three would take a CPU four times as long.
    """
    return {
        "run.folder": str(folder),
        "run.iterations": 2,
        "run.threads": 1,
        "model.path": str(model),
        "model.height": 32,
        "model.width": 32,
        "model.text_length": 16,
        "model.compute_dtype": "float32",
        "sampling.micro_batch": 24,
        "sampling.decode_batch": 24,
        "update.micro_batch": 24,
        "batch.prompts_file": str(world.prompts),
        "batch.prompts": 1,
        "validation.prompts_file": str(world.validation_prompts),
        "validation.prompts": 1,
        "log.wandb": "disabled",
        "log.progress": False,
    }


@pytest.mark.parametrize("name", FLUX)
def test_flux_recipes_run(world: World, small_model: Path, folder: Path, name: str) -> None:
    """Two iterations of a prompt at 32x32 pixels; steps, samples and all else as published."""
    config, overridden = recipe(name), dry(world, small_model, folder)
    for path, value in overridden.items():
        section, knob = path.split(".")
        setattr(getattr(config, section), knob, value)
    config.rewards = {
        reward: RewardConfig("tiny_world:redness", weight=knobs.weight)
        for reward, knobs in config.rewards.items()
    }
    before, after = flatten(recipe(name)), flatten(config)
    changed = {key for key in after if after[key] != before.get(key)}
    assert {key for key in changed if not key.startswith("rewards.")} <= overridden.keys()
    assert not any(key.endswith(".weight") for key in changed)
    check(config, 1)
    train_here(config)
    found = training_records(folder)
    assert [record["iteration"] for record in found] == [1, 2]
    assert all(record["update/grad_norm"] > 0 for record in found)
    assert all(record["update/ratio_error_on_policy"] < 1e-6 for record in found)


# ---- verl-omni's windows, as scripts/README.md maps them

TO_OURS = {
    "sde_type": "sampling.transition",
    "sample_strategy": "window.strategy",
    "sde_window_range": "window.envelope",
    "sde_window_size": "window.size",
    "iters_per_group": "window.iters_per_window",
    "sde_window_seed": "window.seed",
    "noise_level": "sampling.eta",
}


def windows_of(**theirs: Any) -> WindowSchedule:
    """Of verl-omni's keys, T = 10."""
    words = ["--sampling.steps", "10"]
    for key, value in theirs.items():
        words += [f"--{TO_OURS[key]}", str(value)]
    return make_windows(parse(words))


def test_random_windows_lie_in_the_range_and_are_the_same_on_every_rank() -> None:
    theirs = {"sample_strategy": "random", "sde_window_range": [0, 5], "sde_window_size": 2}
    schedule = windows_of(**theirs, sde_window_seed=42)
    drawn = [schedule.at(i) for i in range(200)]
    assert {window.start for window in drawn} == {0, 1, 2, 3}
    assert {window.size for window in drawn} == {2}
    # Each start 50 times, give or take four standard deviations of 6.1.
    assert all(abs(sum(w.start == s for w in drawn) - 50) < 25 for s in range(4))
    other_rank = windows_of(**theirs, sde_window_seed=42)  # backwards: no state, no order of calls
    assert [other_rank.at(i) for i in reversed(range(200))] == drawn[::-1]
    other_seed = windows_of(**theirs, sde_window_seed=43)
    assert [other_seed.at(i) for i in range(200)] != drawn


def test_the_windows_seed_is_the_runs_unless_given() -> None:
    words = ["--window.strategy", "random", "--run.seed"]

    def starts(*arguments: str) -> list[int]:
        windows = make_windows(parse([*words, *arguments]))
        return [windows.at(i).start for i in range(50)]

    assert starts("1") != starts("2")
    assert starts("1", "--window.seed", "42") == starts("2", "--window.seed", "42") == starts("42")


def test_progressive_windows_move_through_the_range_and_stay_at_its_end() -> None:
    theirs = {"sample_strategy": "progressive", "sde_window_size": 2, "iters_per_group": 3}
    schedule = windows_of(**theirs, sde_window_range=[0, 7])
    by_windows = replace(schedule, stride=schedule.size)  # as verl-omni moves
    assert [by_windows.at(i).start for i in range(14)] == [0] * 3 + [2] * 3 + [4] * 3 + [5] * 5
    assert [schedule.at(i).start for i in range(12)] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def test_a_seed_of_verl_omni_gives_its_windows() -> None:
    """Those of its recipe for text rendering: random.Random(42 + i).randint(0, 3), i = 1, 2, ..."""
    words = ["--sampling.steps", "10", "--window.convention", "verl_omni", "--window.size", "2"]
    words += ["--window.strategy", "random", "--window.envelope", "[0, 5]", "--window.seed", "42"]
    windows = make_windows(parse(words))
    assert [windows.at(i).start for i in range(10)] == [0, 3, 2, 0, 2, 2, 0, 3, 1, 2]


def test_the_readme_maps_every_key() -> None:
    readme = (RECIPES.parent / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `([\w.]+)`", readme, re.MULTILINE))
    assert TO_OURS.items() <= rows.items()
    assert set(TO_OURS.values()) <= flatten(Config()).keys()


def test_the_readme_names_every_recipe() -> None:
    readme = (RECIPES.parent / "README.md").read_text()
    assert all(f"\n| `{method}` |" in readme for method in METHODS)
