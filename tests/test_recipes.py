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
from small_qwen import qwen_pipeline
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
THEIRS = "qwen_image_mixgrpo_ocr"  # verl-omni's; its neighbours are below

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
    "qwen_image_mixgrpo": (
        "flux_mixgrpo",
        {
            "model.family": "qwen_image",
            "model.path": "data/models/Qwen-Image",
            "model.train": "lora",
            "model.lora_init": "gaussian",
            "model.height": 512,
            "model.width": 512,
            "model.text_length": 256,
            "guidance.scale": 4.0,
            "text.placement": "offload",
            "engine.reduce": "once",
            "sampling.shift": 0.0,
            "update.learning_rate": 3e-4,
        },
    ),
    "qwen_image_mixgrpo_ocr_long": (
        "qwen_image_mixgrpo_ocr",
        {
            "sampling.steps": 50,
            "window.strategy": "progressive",
            "window.size": 4,
            "window.stride": 4,
            "window.iters_per_window": 12,
            "window.envelope": None,
            "window.seed": None,
        },
    ),
    "words_mixgrpo_ocr": (
        "qwen_image_mixgrpo_ocr",
        {
            "model.path": "data/words/qwen_image",
            "model.lora_rank": 16,
            "model.lora_alpha": 32,
            "model.compute_dtype": "float32",
            "model.height": 32,
            "model.width": 64,
            "model.text_length": 32,
            "model.gradient_checkpointing": False,
            "text.placement": "device",
            "engine.kind": "auto",
            "engine.gather": "once",
            "sampling.micro_batch": 96,
            "sampling.decode_batch": 96,
            "batch.prompts_file": "data/words/prompts.txt",
            "batch.prompts": 8,
            "batch.samples": 12,
            "rewards.text.kind": "ocr",
            "rewards.text.model": None,
            "rewards.text.options.task": None,
            "rewards.text.options.urls": None,
            "rewards.text.options.concurrency": None,
            "rewards.text.options.detect": False,
            **dict.fromkeys(f"rewards.rapidocr.{knob}" for knob in ("kind", "weight", "options")),
            **{
                f"rewards.{verdict}.{knob}": value
                for verdict in ("word_right", "look_right", "all_right")
                for knob, value in (
                    ("kind", f"mixgrpo.words.judge:{verdict}"),
                    ("weight", 0.0),
                    ("options", {}),
                )
            },
            "scoring.micro_batch": 48,
            "update.micro_batch": 96,
            "update.learning_rate": 1e-3,
            "checkpoint.every": 50,
            "validation.every": 50,
            "validation.before": True,
            "validation.prompts_file": "data/words/prompts_test.txt",
            "validation.steps": 10,
            "validation.seed": 617,
            "validation.pictures": 16,
            "checkpoint.keep": 2,
        },
    ),
}


@functools.cache
def read(name: str) -> Config:
    return parse(["--recipe", name])


def recipe(name: str) -> Config:
    return copy.deepcopy(read(name))


def test_every_method_has_a_recipe_for_both_worlds() -> None:
    wanted = {f"{world}_{method}" for world in ("flux", "shapes") for method in METHODS}
    there = {path.stem for path in RECIPES.glob("*.yaml")}
    assert wanted <= there
    assert there == DIFFERENCES.keys() | {"flux_mixgrpo", "shapes_mixgrpo"} | {THEIRS}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_recipe_differs_from_its_neighbour_in_the_method_alone(name: str) -> None:
    neighbour, expected = DIFFERENCES[name]
    before, after = flatten(recipe(neighbour)), flatten(recipe(name))
    keys = before.keys() | after.keys()  # options and rewards that a recipe lacks are None
    found = {key: after.get(key) for key in keys if after.get(key) != before.get(key)}
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
def small_models(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """model.family -> a FLUX folder with one block of each kind, a Qwen-Image folder with two."""
    folder = tmp_path_factory.mktemp("small")
    pipeline = world.policy().pipeline
    pipeline.transformer = small_transformer()
    for family, each in (("auto", pipeline), ("qwen_image", qwen_pipeline())):
        each.save_pretrained(folder / family)
    return {family: folder / family for family in ("auto", "qwen_image")}


def dry(world: World, model: Path, folder: Path, prompts: int) -> dict[str, Any]:
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
        "batch.prompts": prompts,
        "validation.prompts_file": str(world.validation_prompts),
        "validation.prompts": 1,
        "log.wandb": "disabled",
        "log.progress": False,
    }


@pytest.mark.parametrize("name", [*FLUX, "qwen_image_mixgrpo", THEIRS])
def test_recipes_run(world: World, small_models: dict[str, Path], folder: Path, name: str) -> None:
    """Two iterations at 32x32 pixels, of a prompt, or of one for each optimizer step where these
    take whole groups; steps, samples and all else as published."""
    config = recipe(name)
    prompts = config.update.optimizer_steps if config.update.split == "groups" else 1
    overridden = dry(world, small_models[config.model.family], folder, prompts)
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


# ---- verl-omni's keys, as scripts/README.md maps them

TO_OURS = {
    "sde_type": "sampling.transition",
    "sample_strategy": "window.strategy",
    "sde_window_range": "window.envelope",
    "sde_window_size": "window.size",
    "iters_per_group": "window.iters_per_window",
    "sde_window_seed": "window.seed",
    "noise_level": "sampling.eta",
    "num_inference_steps": "sampling.steps",
    "true_cfg_scale": "guidance.scale",
    "pipeline.height": "model.height",
    "max_sequence_length": "model.text_length",
    "model_dtype": "model.compute_dtype",
    "lora_rank": "model.lora_rank",
    "lora_alpha": "model.lora_alpha",
    "lora_init_weights": "model.lora_init",
    "target_modules": "model.lora_targets",
    "train_files": "batch.prompts_file",
    "val_files": "validation.prompts_file",
    "train_batch_size": "batch.prompts",
    "rollout.n": "batch.samples",
    "ppo_mini_batch_size": "update.optimizer_steps",
    "ppo_micro_batch_size_per_gpu": "update.micro_batch",
    "optim.lr": "update.learning_rate",
    "optim.weight_decay": "update.weight_decay",
    "optim.betas": "update.betas",
    "lr_warmup_steps": "update.warmup",
    "clip_grad": "update.max_grad_norm",
    "clip_ratio": "update.clip",
    "adv_clip_max": "advantage.clip",
    "global_std": "advantage.kind",
    "kl_loss_coef": "update.kl",
    "reward_model.model_path": "rewards.text.model",
    "total_training_steps": "run.iterations",
    "save_freq": "checkpoint.every",
    "max_actor_ckpt_to_keep": "checkpoint.keep",
    "test_freq": "validation.every",
    "val_before_train": "validation.before",
    "val_max_samples": "validation.prompts",
    "log_val_generations": "validation.pictures",
}
# The values of its run_qwen_image_ocr_lora_mixgrpo.sh and of its defaults, in ours.
PUBLISHED = {
    "sde_type": "flow_sde",
    "sample_strategy": "random",
    "sde_window_range": [0, 5],
    "sde_window_size": 2,
    "sde_window_seed": 42,
    "noise_level": 1.2,
    "num_inference_steps": 10,
    "true_cfg_scale": 4.0,
    "pipeline.height": 512,
    "max_sequence_length": 256,
    "model_dtype": "bfloat16",
    "lora_rank": 64,
    "lora_alpha": 128,
    "lora_init_weights": "gaussian",
    "target_modules": "all",
    "train_batch_size": 32,
    "rollout.n": 16,
    "ppo_mini_batch_size": 2,  # 16 of 32 prompts each
    "ppo_micro_batch_size_per_gpu": 16,
    "optim.lr": 3e-4,
    "optim.weight_decay": 1e-4,
    "optim.betas": [0.9, 0.999],
    "lr_warmup_steps": 0,
    "clip_grad": 1.0,
    "clip_ratio": 1e-4,
    "adv_clip_max": 5.0,
    "global_std": "global_std",
    "kl_loss_coef": 0.0,
    "reward_model.model_path": "Qwen/Qwen3-VL-8B-Instruct",
    "total_training_steps": 150,
    "save_freq": 30,
    "max_actor_ckpt_to_keep": 0,
    "test_freq": 30,
    "val_before_train": False,
    "val_max_samples": 0,
    "log_val_generations": 8,
}


def test_the_recipe_for_text_rendering_has_verl_omnis_values() -> None:
    config = recipe(THEIRS)
    check(config, 4)
    found = flatten(config)
    assert {key: found[TO_OURS[key]] for key in PUBLISHED} == PUBLISHED
    ours = {
        "batch.prompts_file",
        "validation.prompts_file",
    }  # its data set is not in the repository
    unused = {"window.iters_per_window"}
    assert {TO_OURS[key] for key in TO_OURS.keys() - PUBLISHED.keys()} == ours | unused
    for knob, value in {
        "model.family": "qwen_image",
        "model.train": "lora",
        "model.width": 512,
        "sampling.shift": 0.0,
        "sampling.log_ratio": "normal",
        "sampling.shared_noise": False,
        "window.convention": "verl_omni",
        "guidance.update_scale": None,
        "guidance.unconditional_gradient": True,
        "guidance.negative_prompt": None,
        "update.split": "groups",
        "rewards.text.options.task": "transcribe",
        "validation.steps": 50,
        "validation.seed": 42,
    }.items():
        assert found[knob] == value, knob
    assert {name for name, reward in config.rewards.items() if reward.weight} == {"text"}


def test_the_long_variant_trains_every_step() -> None:
    config = recipe("qwen_image_mixgrpo_ocr_long")
    check(config, 4)
    windows = make_windows(config)
    starts = [windows.at(i).start for i in range(config.run.iterations)]
    assert list(dict.fromkeys(starts)) == [*range(0, 45, 4), 45]
    assert windows.at(149).stop == 49  # the last of the 50 steps is never stochastic


@pytest.mark.parametrize(
    ("name", "processes"), [("qwen_image_mixgrpo", 32), ("words_mixgrpo_ocr", 2)]
)
def test_the_other_recipes_for_qwen_image_can_be_divided(name: str, processes: int) -> None:
    check(recipe(name), processes)


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
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `([\w.]+)`", readme, re.MULTILINE))
    assert TO_OURS.items() <= rows.items()
    assert set(TO_OURS.values()) <= flatten(recipe(THEIRS)).keys()


def test_the_readme_names_every_recipe() -> None:
    readme = (RECIPES.parent / "README.md").read_text()
    others = [path.stem for path in RECIPES.glob("*.yaml") if path.stem.startswith(("q", "w"))]
    assert len(others) == 4
    assert all(f"\n| `{name}` |" in readme for name in (*METHODS, *others))
