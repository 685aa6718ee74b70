"""Knobs reach what they are for: a knob that is read but not used changes nothing and fails here.

Every value is another one than the knob's default and than those of the other tests' runs.
"""

from __future__ import annotations

import json
import pkgutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_world import QUICK, checkpoint_folder, records, train_here

from mixgrpo import assembly
from mixgrpo.checkpoint import open_saved
from mixgrpo.config import Config
from mixgrpo.engines.optimizer import make_optimizer
from mixgrpo.maths.schedule import Spacing, dynamic_shift, make_sigmas
from mixgrpo.types import Window

KNOBS = {
    "run__iterations": 3,
    "run__patience": 1234,
    "sampling__micro_batch": 5,
    "sampling__decode_batch": 3,
    "scoring__micro_batch": 2,
    "scoring__max_failed": 0.75,
    "advantage__kind": "reward_sum",
    "advantage__clip": 0.7,
    "advantage__trim": 0.25,
    "ema__decay": 0.6,
    "ema__every": 2,
    "ema__placement": "cpu",
    "validation__every": 2,
    "validation__prompts": 2,
    "validation__steps": 3,
    "validation__seed": 99,
    "validation__pictures": 1,
    "validation__patience": 7,
    "checkpoint__every": 1,
    "checkpoint__keep": 1,
    "checkpoint__asynchronous": False,
}
WATCHED = {
    "watchdog": "mixgrpo.trainer.Watchdog",
    "rollout": "mixgrpo.trainer.rollout",
    "advantages": "mixgrpo.trainer.group_advantages",
    "failures": "mixgrpo.trainer.check_failures",
    "stream": "mixgrpo.rewards.stream.score_and_tell",
    "score": "mixgrpo.run.validation.score",
    "ema": "mixgrpo.assembly.Ema",
    "noise": "mixgrpo.run.validation.Noise",
    "sample": "mixgrpo.run.validation.sample_ode",
    "hacking": "mixgrpo.run.validation.hacking_warning",
    "saver": "mixgrpo.run.saving.Saver",
    "decode": "mixgrpo.models.policy.DiffusersPolicy.decode",
}
Calls = dict[str, list[Any]]


@pytest.fixture(scope="module")
def calls(world, tmp_path_factory) -> tuple[Path, Calls]:
    """A short run's folder, and the arguments with which its parts were called."""
    folder = tmp_path_factory.mktemp("knobs") / "run"
    with ExitStack() as stack:
        seen = {
            name: stack.enter_context(
                mock.patch(place, autospec=True, side_effect=pkgutil.resolve_name(place))
            )
            for name, place in WATCHED.items()
        }
        train_here(world.config(folder, **{**QUICK, **KNOBS}))
    return folder, {name: watched.call_args_list for name, watched in seen.items()}


def test_the_average_is_updated_every_so_many_iterations(calls):
    """Iterations 1 to 3 with ema.every 2: once, after the second."""
    folder, seen = calls
    assert open_saved(checkpoint_folder(folder, 3)).position.ema_updates == 1
    ((_, decay, _, on_cpu), _) = seen["ema"][0]
    assert (decay, on_cpu) == (0.6, True)


def test_checkpoints(calls):
    folder, seen = calls
    kept = [path.name for path in (folder / "checkpoints").glob("iteration_*")]
    assert kept == ["iteration_00000003"]
    ((*_, keep, asynchronous), _) = seen["saver"][0]
    assert (keep, asynchronous) == (1, False)


def test_validations(calls):
    folder, seen = calls
    assert [r["iteration"] for r in records(folder) if "validation/redness" in r] == [0, 2, 3]
    for place in (folder / "pictures").iterdir():
        assert [path.name for path in place.glob("*.png")] == ["000.png"]
        assert len(json.loads((place / "scores.json").read_text())["prompts"]) == 1
    assert {call.kwargs["seed"] for call in seen["noise"]} == {99}
    assert {tuple(call.kwargs["prompts"]) for call in seen["noise"]} == {(0, 1)}
    for _, noise, _, sigmas, size in (call.args for call in seen["sample"]):
        assert torch.equal(sigmas, make_sigmas(3, 3.0))
        assert (len(noise), size) == (2, 5)
    assert {call.args[2] for call in seen["hacking"]} == {7}


def test_sampling_and_scoring(calls):
    _, seen = calls
    assert {call.args[4] for call in seen["rollout"]} == {5}
    assert max(len(call.args[1]) for call in seen["decode"]) == 3
    assert max(call.args[3] for call in seen["stream"]) == 2
    assert {call.args[3] for call in seen["score"]} == {2}
    assert {call.args[1] for call in seen["failures"]} == {0.75}
    assert {call.args[3:] for call in seen["advantages"]} == {("reward_sum", 0.7, 0.25)}
    assert seen["watchdog"][0].args[0] == 1234


# ---- parts that are made from knobs alone


def made(**knobs: Any) -> Config:
    config = Config()
    for path, value in knobs.items():
        section, name = path.split("__")
        setattr(getattr(config, section), name, value)
    return config


@pytest.mark.parametrize("knobs", [{}, {"update__optimizer": "adamw_8bit"}])
def test_the_optimizer(knobs):
    knobs |= {
        "update__learning_rate": 0.3,
        "update__betas": (0.5, 0.6),
        "update__weight_decay": 0.7,
        "update__warmup": 4,
    }
    optimizer, schedule = make_optimizer(made(**knobs), [torch.nn.Parameter(torch.ones(2))])
    (group,) = optimizer.param_groups
    assert (group["initial_lr"], tuple(group["betas"])) == (0.3, (0.5, 0.6))
    assert group["weight_decay"] == 0.7
    rates = []
    for _ in range(5):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.075, 0.15, 0.225, 0.3, 0.3])


def test_the_plan_of_an_iteration():
    config = made(
        sampling__steps=20,
        sampling__shift=2.5,
        sampling__transition="cps",
        sampling__eta=0.9,
        tail__solver="dpm",
        tail__order=3,
        tail__variant="heun",
        tail__ratio=0.5,
        prefix__solver="dpm",
        prefix__order=1,
        prefix__variant="heun",
        prefix__ratio=0.25,
    )
    with (
        mock.patch("mixgrpo.assembly.make_transition") as transition,
        mock.patch("mixgrpo.assembly.flash_sigmas", wraps=assembly.flash_sigmas) as sigmas,
        mock.patch("mixgrpo.assembly.make_solver") as solver,
    ):
        window = Window(8, 12)
        plan = assembly.make_plan(config, window)
        plan.solver()
        plan.prefix()
    transition.assert_called_once_with("cps", 0.9)
    sigmas.assert_called_once_with(20, Spacing(2.5), window, 0.5, 0.25)
    tail, prefix = (call.args for call in solver.call_args_list)
    assert (tail[0], *tail[2:]) == ("dpm", 3, "heun")
    assert (prefix[0], *prefix[2:]) == ("dpm", 1, "heun")
    assert plan.window == Window(2, 6)


def test_the_shift_depends_on_the_image_if_the_knob_is_zero():
    config = made(sampling__shift=0.0, model__height=512, model__width=256)
    assert assembly.spacing_for(config, 4) == Spacing(dynamic_shift(32 * 16))


def test_the_objective():
    config = made(
        sampling__transition="dance_sde",
        sampling__eta=0.4,
        sampling__log_ratio="guard",
        update__clip=0.02,
        update__kl=0.03,
        update__kl_form="velocity",
    )
    names = ("make_transition", "make_log_ratio", "make_kl")
    with ExitStack() as stack:
        seen = {n: stack.enter_context(mock.patch(f"mixgrpo.assembly.{n}")) for n in names}
        objective = assembly.make_objective(config, None)
    seen["make_transition"].assert_called_once_with("dance_sde", 0.4)
    seen["make_log_ratio"].assert_called_once_with("guard")
    seen["make_kl"].assert_called_once_with("velocity")
    assert (objective.clip, objective.kl) == (0.02, 0.03)


def test_the_windows():
    knobs = {"stride": 2, "iters_per_window": 3, "at_end": "wrap", "size": 3, "start": 1}
    config = made(**{f"window__{name}": value for name, value in knobs.items()})
    config.window.envelope = (1, 8)
    starts = [assembly.make_windows(config).at(i).start for i in range(12)]
    assert starts == [1, 1, 1, 3, 3, 3, 5, 5, 5, 1, 1, 1]
    by_seed = made(window__strategy="random", window__seed=5, run__seed=1)
    same = made(window__strategy="random", run__seed=5)
    other = made(window__strategy="random", run__seed=1)
    drawn = [
        [assembly.make_windows(config).at(i).start for i in range(60)]
        for config in (by_seed, same, other)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_exponential_decay():
    config = made(
        window__strategy="exp_decay",
        window__iters_per_window=10,
        window__decay_rate=0.5,
        window__decay_threshold=2,
    )
    starts = [assembly.make_windows(config).at(i).start for i in range(60)]
    usual = made(window__strategy="exp_decay", window__iters_per_window=10)
    assert [starts.count(start) for start in range(3)] == [10, 10, 10]
    assert starts.count(3) < 10
    assert [assembly.make_windows(usual).at(i).start for i in range(60)] != starts


def test_the_noise():
    batch = mock.Mock(positions=[4, 7])
    for shared in (True, False):
        config = made(run__seed=3, batch__samples=2, sampling__shared_noise=shared)
        noise = assembly.make_noise(config, (4, 8), torch.device("cpu"), batch, 6)
        assert (noise.seed, noise.iteration, noise.prompts) == (3, 6, [4, 7])
        assert (noise.samples, noise.shared) == (2, shared)


def test_the_adapters(world):
    knobs = {"model__train": "lora", "model__lora_rank": 2, "model__lora_init": "gaussian"}
    named = world.policy(**knobs).module.named_parameters()
    drawn = torch.cat([weight.flatten() for name, weight in named if ".lora_A." in name])
    assert drawn.std().item() == pytest.approx(1 / 2, rel=0.02)
