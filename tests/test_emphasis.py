"""What is trained of a rollout, and how much it counts, on any number of processes."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Counted, Recording, SmallNet, relative_error
from test_update import (
    drawn_advantages,
    knobs,
    objective,
    off_policy,
    plain_gradient,
    small_trajectory,
)
from tiny_world import (
    World,
    checkpoint_folder,
    environment,
    python,
    saved_tensors,
    train_here,
)
from torch import Tensor

from mixgrpo.emphasis import Emphasis, whole
from mixgrpo.noise import drawn_steps
from mixgrpo.types import Trajectory
from mixgrpo.update import evaluations_for, evaluations_of_all, parts_of_groups, update

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


# ---- runs

ALL_STEPS = {
    "window__strategy": "all",
    "update__step_fraction": 0.6,
    "update__micro_batch": 1,
    "advantage__best_of": 2,
    "advantage__skip_equal": True,
    "validation__every": 0,
    "run__iterations": 2,
}


def test_two_processes_equal_one_with_drawn_steps(world: World, tmp_path: Path) -> None:
    """Their draws need unequal numbers of evaluations; tolerances as in test_train."""
    alone, folder = tmp_path / "alone", tmp_path / "two"
    train_here(world.config(alone, **ALL_STEPS))
    torchrun = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [*torchrun, "-m", "mixgrpo", *world.arguments(folder, **ALL_STEPS)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    start = dict(world.policy().module.named_parameters())
    one = saved_tensors(checkpoint_folder(alone, 2))
    two = saved_tensors(checkpoint_folder(folder, 2))
    apart = sum((two[name] - one[name]).square().sum() for name in one).sqrt()
    travelled = sum((one[name] - start[name]).square().sum() for name in one).sqrt()
    assert apart < 1e-2 * travelled
