"""What is trained of a rollout, and how much it counts, on any number of processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import two_updates
from processes import together
from small import SHAPE, Counted, Recording, SmallNet, relative_error
from test_update import (
    drawn_advantages,
    knobs,
    objective,
    off_policy,
    plain_gradient,
    small_trajectory,
)
from tiny_world import (
    QUICK,
    World,
    checkpoint_folder,
    same,
    saved_tensors,
    train_here,
    training_records,
)
from torch import Tensor

from mixgrpo import checkpoint as checkpoints
from mixgrpo.config import AdvantageConfig, Config, UpdateConfig
from mixgrpo.methods.emphasis import Emphasis, emphasize, whole
from mixgrpo.methods.grpo import evaluations_for, evaluations_of_all, parts_of_groups, update
from mixgrpo.noise import drawn_steps
from mixgrpo.types import Trajectory, Window

# ---- drawn steps


def test_every_sample_draws_as_many_steps_of_its_own() -> None:
    drawn = drawn_steps(714, 3, prompts=40, samples=12, steps=24, count=14)
    assert drawn.shape == (480, 24)
    assert (drawn.sum(1) == 14).all()
    assert len({tuple(row) for row in drawn.tolist()}) == 480
    # Each step 480 * 14/24 = 280 times, give or take five standard deviations of 10.8.
    assert ((drawn.sum(0) - 280).abs() < 54).all()


def test_a_draw_depends_on_seed_iteration_prompt_and_sample_alone() -> None:
    drawn = drawn_steps(7, 2, prompts=2, samples=3, steps=9, count=5)
    more = drawn_steps(7, 2, prompts=4, samples=3, steps=9, count=5)
    assert torch.equal(more[:6], drawn)
    for other in (drawn_steps(8, 2, 2, 3, 9, 5), drawn_steps(7, 3, 2, 3, 9, 5)):
        assert not torch.equal(other, drawn)


# ---- the update


def emphasis_of(trajectory: Trajectory, trained: Tensor) -> Emphasis:
    return replace(whole(trajectory), trained=trained)


def masked_gradient(net: Any, trajectory: Trajectory, advantages: Tensor, mask: Tensor) -> Tensor:
    """From the formulas, a transition at a time: those in the mask, averaged over these."""
    total = torch.zeros(0)
    for k in range(trajectory.window.size):
        window = replace(trajectory.window, start=trajectory.window.start + k)
        one = replace(
            trajectory,
            window=replace(window, stop=window.start + 1),
            states=trajectory.states[:, k : k + 2],
            old_means=trajectory.old_means[:, k : k + 1],
        )
        rows = mask[:, k].nonzero()[:, 0].tolist()
        found = plain_gradient(net, net, one, advantages, rows) * len(trajectory) / mask.sum()
        total = found if not len(total) else total + found
    return total


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("micro_batch", [1, 4, 100])
def test_gradient_is_the_average_over_the_drawn_transitions(shared, micro_batch) -> None:
    net = SmallNet()
    trajectory = replace(small_trajectory(net, size=4), shared=shared)
    advantages, policy = drawn_advantages(8), off_policy(net)
    mask = drawn_steps(1, 0, prompts=2, samples=4, steps=4, count=2)
    engine = Recording(policy)
    update(
        engine,
        engine.module,
        trajectory,
        advantages,
        objective(),
        knobs(1, micro_batch),
        emphasis_of(trajectory, mask),
    )
    expected = masked_gradient(policy, trajectory, advantages, mask)
    assert relative_error(engine.gradients[0], expected) < 1e-4


def test_a_shared_first_step_is_evaluated_only_if_a_sample_trains_it() -> None:
    trajectory = small_trajectory(SmallNet(), prompts=2, samples=3, size=3)
    mask = torch.tensor(
        [[1, 1, 0], [1, 0, 1], [0, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 1]], dtype=torch.bool
    )
    needed = evaluations_for(trajectory, torch.arange(6), mask)
    assert len(needed) == (1 + 4) + 6
    assert needed.step.tolist() == [0, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2]
    served = zip(needed.row_sample.tolist(), needed.step[needed.row_evaluation].tolist())  # noqa: B905
    assert sorted(served) == [tuple(pair) for pair in mask.nonzero().tolist()]


def test_every_process_makes_as_many_evaluations() -> None:
    """Else the all-gathers of sharded weights would not match, and the run would hang."""
    trajectory = small_trajectory(SmallNet(), prompts=2, samples=6, size=4)
    unequal = 0
    for iteration in range(10):
        trained = drawn_steps(1, iteration, prompts=6, samples=6, steps=4, count=2).view(3, 12, 4)
        for samples in parts_of_groups(trajectory, 2):
            alone = [len(evaluations_for(trajectory, samples, mine)) for mine in trained]
            unequal += len(set(alone)) > 1
            together = evaluations_of_all(trajectory, samples, trained)
            assert [len(needed) for needed in together] == [max(alone)] * 3
            for needed, mine in zip(together, trained, strict=True):
                assert len(needed.row_sample) == int(mine[samples].sum())
    assert unequal > 5, "equal without padding: this test would show nothing"


def test_evaluations_that_serve_nothing_change_nothing() -> None:
    """One process of two: alone it makes fewer evaluations, its gradient is the same."""
    net = SmallNet()
    trajectory, advantages = small_trajectory(net, size=4), drawn_advantages(8)
    mine = drawn_steps(1, 0, prompts=2, samples=4, steps=4, count=2)
    mine[:, 0] = False
    mine[:, 1:3] = True
    mine[:, 3] = False  # no first step: all evaluations are for one sample
    theirs = mine.clone()
    theirs[::4, 0], theirs[::4, 1] = True, False
    found = []
    for both in (mine, torch.cat([mine, theirs[:, [1, 2, 3, 0]], mine])):
        counted, engine = Counted(net), Recording(net)
        given = emphasis_of(trajectory, both)
        update(engine, counted, trajectory, advantages, objective(), knobs(1, 1), given)
        found.append((counted.evaluations, engine.gradients[0]))
    (fewer, alone), (more, padded) = found
    assert fewer <= more
    assert relative_error(padded, alone) < 1e-6


def test_weights_multiply_the_losses() -> None:
    """Of samples and of steps: as many gradients of single transitions, weighted."""
    net = SmallNet()
    trajectory, advantages, policy = small_trajectory(net), drawn_advantages(8), off_policy(net)
    weights = torch.outer(torch.arange(8.0), torch.tensor([2.0, 0.0, 0.5]))
    engine = Recording(policy)
    given = replace(whole(trajectory), weights=weights)
    update(engine, engine.module, trajectory, advantages, objective(), knobs(1, 5), given)
    expected = torch.zeros_like(engine.gradients[0])
    for row, k in weights.nonzero().tolist():
        mask = torch.zeros(8, 3, dtype=torch.bool)
        mask[row, k] = True
        alone = masked_gradient(policy, trajectory, advantages, mask)
        expected += weights[row, k] * alone / 24
    assert relative_error(engine.gradients[0], expected) < 1e-4


# ---- from the configuration


def emphasized(
    config: Config, rank: int = 0, window: Window | None = None
) -> tuple[Trajectory, Tensor, Emphasis]:
    """Of two processes with a prompt of four samples each, T = 8, a window [1, 4)."""
    config.batch.prompts, config.batch.samples = 2, 4
    trajectory = small_trajectory(SmallNet(), prompts=1, samples=4)
    advantages = torch.tensor([0.5, -1.0, 2.0, -1.5, 0.0, 0.0, 0.0, 0.0])
    window = window or trajectory.window
    return emphasize(config, 0, window, trajectory, advantages, rank, world_size=2)


def test_by_default_everything_is_trained_alike() -> None:
    trajectory, advantages, emphasis = emphasized(Config())
    assert advantages.tolist() == [0.5, -1.0, 2.0, -1.5]
    assert emphasis.trained.shape == (8, 3)
    assert emphasis.trained.all()
    assert torch.equal(emphasis.weights, whole(trajectory).weights)


def test_best_of_hands_the_extremes_to_the_update() -> None:
    config = Config(advantage=AdvantageConfig(best_of=2, skip_equal=True))
    trajectory, advantages, emphasis = emphasized(config)
    every, _, _ = emphasized(Config())
    assert advantages.tolist() == [2.0, -1.5]
    assert torch.equal(trajectory.states, every.states[[2, 3]])
    assert torch.equal(trajectory.old_means, every.old_means[[2, 3]])
    assert trajectory.group.tolist() == [0, 0]
    assert emphasis.trained.shape == (4, 3)
    # One of two groups says something: it counts twice, the other one, on the other rank, nothing.
    assert emphasis.weights.tolist() == [[2.0] * 3] * 2
    _, advantages, emphasis = emphasized(config, rank=1)
    assert emphasis.weights.tolist() == [[0.0] * 3] * 2
    assert advantages.tolist() == [0.0, 0.0]


def test_step_weights_are_those_of_the_window() -> None:
    config = Config(update=UpdateConfig(step_weight=[float(i) for i in range(7)]))
    _, _, emphasis = emphasized(config)
    assert emphasis.weights.tolist() == [[1.0, 2.0, 3.0]] * 4
    _, _, emphasis = emphasized(config, window=Window(4, 7))  # three steps before it left out
    assert emphasis.weights.tolist() == [[4.0, 5.0, 6.0]] * 4


def test_the_draw_is_the_batches_on_every_process() -> None:
    config = Config(update=UpdateConfig(step_fraction=0.7))
    (_, _, here), (_, _, there) = emphasized(config, 0), emphasized(config, 1)
    assert torch.equal(here.trained, there.trained)
    assert torch.equal(here.trained, drawn_steps(config.run.seed, 0, 2, 4, 3, 2))


# ---- runs


def of_one_process(trajectory: Trajectory, rank: int, samples: int) -> Trajectory:
    """What the process of the ``rank``-th prompt sampled of a trajectory of several."""
    own = slice(rank * samples, (rank + 1) * samples)
    return replace(
        trajectory,
        states=trajectory.states[own],
        old_means=trajectory.old_means[own],
        final=trajectory.final[own],
        text=trajectory.text[rank : rank + 1],
        group=torch.zeros(samples, dtype=torch.int64),
    )


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Although alone they would make unequal numbers of evaluations, each a pass of its own.

    Every forward is a collective there, as with sharded weights: unequal numbers would not end.
    """
    net = two_updates.Net(SHAPE[1])
    trajectory = small_trajectory(net, prompts=2, samples=8, start=0, size=7)
    advantages = drawn_advantages(16)
    for rank in range(2):
        own = of_one_process(trajectory, rank, 8)
        torch.save((own, advantages), tmp_path / f"given_{rank}.pt")
    together(2, two_updates.main, tmp_path)
    found = [torch.load(tmp_path / f"updated_{rank}.pt") for rank in range(2)]
    (first, forwards), (second, others) = found
    expected, alone = two_updates.updated(trajectory, advantages)
    assert forwards == others
    assert alone < 2 * forwards, "without padding: this test would show nothing"
    for one, two, whole_batch in zip(first, second, expected, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, whole_batch, rtol=1e-5, atol=1e-7)
        assert not torch.equal(whole_batch, torch.full_like(whole_batch, 0.1))


def test_an_adapted_kl_weight_survives_resuming(world: World, tmp_path: Path) -> None:
    """Four iterations, and two and two resumed: the same weights of KL and policy, to the bit."""
    knobs = {**QUICK, "update__kl": 0.5, "update__kl_target": 1e-4, "checkpoint__every": 2}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train_here(world.config(straight, **{**knobs, "run__iterations": 4}))
    train_here(world.config(resumed, **{**knobs, "run__iterations": 2}))
    train_here(world.config(resumed, **{**knobs, "run__iterations": 4, "run__resume": True}))
    found = [[r["update/kl_weight"] for r in training_records(f)] for f in (straight, resumed)]
    assert found[0] == found[1]
    assert found[0][2] != 0.5, "nothing was adapted before the checkpoint"
    for one, two in zip(found[0], found[0][1:], strict=False):
        assert two in (one / 2, one, 2 * one)
    first, second = (checkpoint_folder(folder, 4) for folder in (straight, resumed))
    weights = [checkpoints.open_saved(path).position.kl_weight for path in (first, second)]
    assert weights[0] == weights[1]
    assert same(saved_tensors(first), saved_tensors(second))


OPTIONS = {
    "trimmed, balanced, noise weights": {
        "advantage__trim": 0.25,
        "advantage__balance": True,
        "update__step_weight": "noise",
    },
    "guard": {"sampling__log_ratio": "guard", "update__step_weight": "inverse_dt"},
    "listed weights, velocity": {
        "update__step_weight": [1.0, 0.5, 0.0, 2.0],
        "update__kl": 0.1,
        "update__kl_form": "velocity",
    },
    "short prefix": {
        "sampling__steps": 6,
        "window__strategy": "frozen",
        "window__start": 3,
        "prefix__solver": "dpm",
        "prefix__ratio": 0.6,
    },
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_trains(world: World, folder: Path, option: str) -> None:
    train_here(world.config(folder, **{**QUICK, **OPTIONS[option]}))
    (record,) = training_records(folder)
    assert record["update/ratio_error_on_policy"] <= 1e-6
    assert record["update/grad_norm"] > 0
    if option == "short prefix":  # two steps before the window, one behind it
        assert record["rollout/evaluations_per_image"] == (2 * 3 + 8 * 2) / 8
