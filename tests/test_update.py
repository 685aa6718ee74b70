"""The update against a plain one: one sample and one window step per backward, nothing shared."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from small import (
    CPU,
    SHAPE,
    Counted,
    Recording,
    SmallNet,
    gradient_of,
    perturbed,
    relative_error,
    small_noise,
    small_plan,
    small_text,
    tiny_flux,
)
from torch import Tensor, nn

from mixgrpo.config import UpdateConfig
from mixgrpo.engines.data_parallel import DataParallel
from mixgrpo.maths.advantages import group_advantages
from mixgrpo.maths.objective import kl_in_velocity
from mixgrpo.maths.transitions import LogRatio, log_ratio, make_transition
from mixgrpo.methods.emphasis import whole
from mixgrpo.methods.grpo import (
    NonFiniteUpdate,
    Objective,
    evaluations_for,
    evaluations_of_all,
    parts_of_groups,
    passes,
    shares,
    update,
    whole_groups,
)
from mixgrpo.rollout import rollout
from mixgrpo.types import TextEmbedding, Trajectory, Velocity

CLIP = 1e-4
ETA = 0.7


def small_trajectory(
    net: Velocity, prompts: int = 2, samples: int = 4, start: int = 1, size: int = 3
) -> Trajectory:
    noise = small_noise(range(prompts), samples)
    return rollout(net, small_text(prompts), small_plan(8, start, size), noise, 100)


def drawn_advantages(count: int, seed: int = 3) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def objective(clip: float = CLIP, kl: float = 0.0, reference: Velocity | None = None) -> Objective:
    return Objective(make_transition("flow_sde", ETA), log_ratio, clip, kl, reference)


def knobs(optimizer_steps: int = 1, micro_batch: int = 100) -> UpdateConfig:
    return UpdateConfig(
        optimizer_steps=optimizer_steps, micro_batch=micro_batch, max_grad_norm=math.inf
    )


def off_policy(net: nn.Module, scale: float = 5e-3) -> nn.Module:
    """A copy whose ratios are not 1, some beyond the clip."""
    return perturbed(copy.deepcopy(net), scale)


def gradients(
    net: nn.Module, trajectory: Trajectory, advantages: Tensor, micro_batch: int = 100
) -> Tensor:
    """Of all samples in one optimizer step."""
    engine = Recording(net)
    update(engine, engine.module, trajectory, advantages, objective(), knobs(1, micro_batch))
    (found,) = engine.gradients
    assert found.norm() > 0
    return found


def plain_gradient(
    net: nn.Module,
    velocity: Velocity,
    trajectory: Trajectory,
    advantages: Tensor,
    rows: Iterable[int] | None = None,
    kl: float = 0.0,
    reference: Velocity | None = None,
) -> Tensor:
    """The loss from its formulas, for each sample and step its own forward and backward.

    The average is over all samples; those outside ``rows`` count as zero.
    """
    net.zero_grad()
    count = len(trajectory) * trajectory.window.size
    for row in range(len(trajectory)) if rows is None else rows:
        for k in range(trajectory.window.size):
            mean, std = _plain_mean(velocity, trajectory, row, k)
            x_next, old = trajectory.states[row, k + 1], trajectory.old_means[row, k]
            ratio = torch.exp((((x_next - old) ** 2 - (x_next - mean) ** 2) / (2 * std**2)).mean())
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            loss = torch.maximum(-advantages[row] * ratio, -advantages[row] * clipped)
            if reference is not None:
                reference_mean = _plain_mean(reference, trajectory, row, k)[0].detach()
                loss = loss + kl * ((mean - reference_mean) ** 2 / (2 * std**2)).mean()
            (loss / count).backward()
    found = gradient_of(list(net.parameters()))
    net.zero_grad()
    return found


def _plain_mean(
    velocity: Velocity, trajectory: Trajectory, row: int, k: int
) -> tuple[Tensor, Tensor]:
    """Flow-SDE's mean [S, C] and standard deviation at window step k."""
    i = trajectory.window.start + k
    sigma, after = trajectory.sigmas[i], trajectory.sigmas[i + 1]
    x, prompt = trajectory.states[row, k], trajectory.group[row : row + 1]
    v = velocity(x[None], sigma[None], trajectory.text[prompt])[0]
    g = ETA * torch.sqrt(sigma / (1 - (trajectory.sigmas[1] if i == 0 else sigma)))
    mean = x + (v + g**2 / (2 * sigma) * (x + (1 - sigma) * v)) * (after - sigma)
    return mean, g * torch.sqrt(sigma - after)


# --- the gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize(("start", "size"), [(0, 3), (3, 2), (2, 1), (4, 3)])
def test_gradient_is_the_plain_one(start: int, size: int, is_off_policy: bool) -> None:
    net = SmallNet()
    trajectory, advantages = small_trajectory(net, start=start, size=size), drawn_advantages(8)
    if is_off_policy:
        net = off_policy(net)
    expected = plain_gradient(net, net, trajectory, advantages)
    assert relative_error(gradients(net, trajectory, advantages), expected) < 1e-4
    unshared = gradients(net, replace(trajectory, shared=False), advantages)
    assert relative_error(unshared, expected) < 1e-4


def test_the_clip_bites_off_policy() -> None:
    """So that the equalities above and below cover both branches of the loss."""
    net = SmallNet()
    trajectory, engine = small_trajectory(net), Recording(off_policy(net))
    metrics = update(engine, engine.module, trajectory, drawn_advantages(8), objective(), knobs())
    assert 0.2 < float(metrics["clip_fraction"]) < 0.8


def test_gradient_is_the_plain_one_on_flux() -> None:
    flux = tiny_flux()
    text = flux.encode(["a red circle on a gray background", "a blue square"])
    noise = small_noise(samples=3, shape=flux.latent_shape)
    trajectory = rollout(flux.velocity(flux.module), text, small_plan(6, 1, 2), noise, 100)
    module = off_policy(flux.module, 1e-4)
    velocity, advantages = flux.velocity(module), drawn_advantages(6)

    def found(shared: bool) -> Tensor:
        engine = Recording(module)
        given = replace(trajectory, shared=shared)
        update(engine, velocity, given, advantages, objective(), knobs(1, 4))
        return engine.gradients[0]

    expected = plain_gradient(module, velocity, trajectory, advantages)
    assert relative_error(found(shared=True), expected) < 1e-4
    assert relative_error(found(shared=False), expected) < 1e-4


@pytest.mark.parametrize("micro_batch", [1, 5, 12, 13])
def test_micro_batches_lose_no_remainder(micro_batch: int) -> None:
    """One prompt, 6 samples, 3 steps: 13 evaluations."""
    net = SmallNet()
    trajectory, advantages = small_trajectory(net, 1, 6), drawn_advantages(6)
    counted, engine = Counted(net), Recording(net)
    update(engine, counted, trajectory, advantages, objective(), knobs(1, micro_batch))
    assert counted.evaluations == 13
    assert max(counted.batches) == micro_batch
    assert relative_error(engine.gradients[0], gradients(net, trajectory, advantages)) < 1e-5


def test_kl_adds_its_gradient() -> None:
    net = SmallNet()
    trajectory, advantages = small_trajectory(net), drawn_advantages(8)
    policy, reference = off_policy(net), off_policy(net, 0.05)
    engine = Recording(policy)
    with_kl = objective(kl=0.3, reference=reference)
    metrics = update(engine, policy, trajectory, advantages, with_kl, knobs(1, 5))
    expected = plain_gradient(policy, policy, trajectory, advantages, None, 0.3, reference)
    assert relative_error(engine.gradients[0], expected) < 1e-4
    assert relative_error(engine.gradients[0], gradients(policy, trajectory, advantages)) > 0.01
    assert metrics["kl"] > 0
    assert all(p.grad is None for p in reference.parameters())


def test_kl_in_velocity_adds_its_gradient() -> None:
    """mean_D[(v - v_ref)^2] over the distinct states, from autograd alone."""
    net = SmallNet()
    trajectory = small_trajectory(net, prompts=1, samples=2, start=1, size=1)
    policy, reference = off_policy(net), off_policy(net, 0.05)
    engine = Recording(policy)
    with_kl = replace(objective(kl=0.3, reference=reference), kl_form=kl_in_velocity)
    metrics = update(engine, policy, trajectory, torch.zeros(2), with_kl, knobs())
    sigma = trajectory.sigmas[1:2]
    there = trajectory.states[:1, 0], sigma, trajectory.text
    penalty = ((policy(*there) - reference(*there).detach()) ** 2).mean()
    (0.3 * penalty).backward()
    expected = gradient_of(list(policy.parameters()))
    assert float(metrics["kl"]) == pytest.approx(float(penalty), rel=1e-4)
    assert relative_error(engine.gradients[0], expected) < 1e-4


def test_kl_to_itself_changes_nothing() -> None:
    net = SmallNet()
    trajectory, advantages = small_trajectory(net), drawn_advantages(8)
    engine = Recording(net)
    update(engine, net, trajectory, advantages, objective(kl=9.0, reference=net), knobs())
    expected = gradients(net, trajectory, advantages)
    assert relative_error(engine.gradients[0], expected) < 1e-5


def test_zero_advantages_give_no_gradient() -> None:
    net = SmallNet()
    engine = Recording(net)
    update(engine, net, small_trajectory(net), torch.zeros(8), objective(), knobs())
    assert not engine.gradients[0].any()


# --- failed samples -------------------------------------------------------------------------------

FAILED = (0, 5)  # the first sample of its group, whose first state serves the group, and another


def with_failures(count: int = 8) -> Tensor:
    advantages = drawn_advantages(count)
    advantages[list(FAILED)] = math.nan
    return advantages


def diverged(trajectory: Trajectory, bad: float) -> Trajectory:
    """The failed samples' latents are ``bad`` from the state on that is their own."""
    states, means = trajectory.states.clone(), trajectory.old_means.clone()
    states[list(FAILED), 1:] = bad
    means[list(FAILED), 1:] = bad
    return replace(trajectory, states=states, old_means=means)


def test_failed_samples_get_no_gradient() -> None:
    """As if left out, but over the same number of samples."""
    net = SmallNet()
    trajectory = small_trajectory(net)
    valid = [row for row in range(8) if row not in FAILED]
    policy = off_policy(net)
    expected = plain_gradient(policy, policy, trajectory, with_failures(), valid)
    for shared in (True, False):
        found = gradients(policy, replace(trajectory, shared=shared), with_failures())
        assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_failed_samples_may_be_non_finite(bad: float) -> None:
    """A latent that became NaN fails its reward, and must not reach the others' gradient."""
    net = SmallNet()
    trajectory = small_trajectory(net)
    valid = [row for row in range(8) if row not in FAILED]
    policy = off_policy(net)
    expected = plain_gradient(policy, policy, trajectory, with_failures(), valid)
    engine = Recording(policy)
    metrics = update(
        engine, policy, diverged(trajectory, bad), with_failures(), objective(), knobs()
    )
    assert relative_error(engine.gradients[0], expected) < 1e-4
    assert all(value.isfinite() for value in metrics.values())


def test_failed_samples_stay_out_of_the_ratio() -> None:
    """Their latents say nothing about the policy; on-policy, the others' ratio is still 1."""
    net = SmallNet()
    broken = diverged(small_trajectory(net), math.nan)
    metrics = update(Recording(net), net, broken, with_failures(), objective(), knobs())
    assert float(metrics["ratio_error_on_policy"]) <= 1e-6
    assert float(metrics["ratio_deviation"]) <= 1e-6


def test_failed_samples_are_not_held_to_the_reference() -> None:
    net = SmallNet()
    trajectory = small_trajectory(net)
    valid = [row for row in range(8) if row not in FAILED]
    policy, reference = off_policy(net), off_policy(net, 0.05)
    engine = Recording(policy)
    with_kl = objective(kl=0.3, reference=reference)
    update(engine, policy, trajectory, with_failures(), with_kl, knobs())
    expected = plain_gradient(policy, policy, trajectory, with_failures(), valid, 0.3, reference)
    assert relative_error(engine.gradients[0], expected) < 1e-4


# --- what is evaluated ----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_steps", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 3])
def test_evaluations_with_shared_noise(size: int, optimizer_steps: int) -> None:
    """1 + G'*(w-1) for each of 2 groups and each optimizer step, which takes G' of 4 samples."""
    counted = Counted(SmallNet())
    trajectory = small_trajectory(counted.velocity, size=size)
    engine = Recording(counted.velocity)
    metrics = update(
        engine, counted, trajectory, drawn_advantages(8), objective(), knobs(optimizer_steps)
    )
    each = 2 * (1 + 4 // optimizer_steps * (size - 1))
    assert counted.evaluations == optimizer_steps * each
    assert float(metrics["evaluations_per_image"]) == optimizer_steps * each / 8
    window = trajectory.sigmas[trajectory.window.start : trajectory.window.stop].tolist()
    assert set(counted.sigmas) == set(window)


def test_evaluations_with_independent_noise() -> None:
    net = SmallNet()
    noise = small_noise(samples=4, shared=False)
    trajectory = rollout(net, small_text(2), small_plan(8, 1, 3), noise, 100)
    counted, engine = Counted(net), Recording(net)
    update(engine, counted, trajectory, drawn_advantages(8), objective(), knobs(2))
    assert counted.evaluations == 8 * 3
    expected = plain_gradient(net, net, trajectory, drawn_advantages(8))
    assert relative_error(gradients(net, trajectory, drawn_advantages(8)), expected) < 1e-4


@pytest.mark.parametrize("optimizer_steps", [1, 2, 3, 6])
def test_every_sample_is_in_exactly_one_optimizer_step(optimizer_steps: int) -> None:
    trajectory = small_trajectory(SmallNet(), prompts=3, samples=6)
    parts = list(parts_of_groups(trajectory, optimizer_steps))
    assert len(parts) == optimizer_steps
    assert sorted(torch.cat(parts).tolist()) == list(range(18))
    for part in parts:
        shares = trajectory.group[part].bincount(minlength=3).tolist()
        assert shares == [6 // optimizer_steps] * 3


@pytest.mark.parametrize("optimizer_steps", [1, 2, 4])
def test_every_group_is_in_exactly_one_optimizer_step(optimizer_steps: int) -> None:
    """The same prompts are in a step whether one process has all four, or each of more a part."""
    trajectory = small_trajectory(SmallNet(), prompts=4, samples=3)
    parts = list(whole_groups(trajectory, optimizer_steps))
    assert sorted(torch.cat(parts).tolist()) == list(range(12))
    for position, part in enumerate(parts):
        prompts = list(range(position, 4, optimizer_steps))
        assert trajectory.group[part].tolist() == [p for p in prompts for _ in range(3)]
    for processes in (1, 2, 4):
        if (each := 4 // processes) % optimizer_steps:
            continue
        local = small_trajectory(SmallNet(), prompts=each, samples=3)
        divided = list(whole_groups(local, optimizer_steps))
        for position, part in enumerate(divided):
            mine = [local.group[part] + rank * each for rank in range(processes)]
            assert torch.cat(mine).tolist() == trajectory.group[parts[position]].tolist()


def test_an_optimizer_step_of_whole_groups_averages_over_them() -> None:
    """Each of the two steps has the plain gradient of one group; the weights stay as they are."""
    net = SmallNet()
    trajectory, advantages = small_trajectory(net), drawn_advantages(8)
    policy = off_policy(net)
    engine, counted = Recording(policy), Counted(policy)
    by_groups = replace(knobs(2), split="groups")
    metrics = update(engine, counted, trajectory, advantages, objective(), by_groups)
    for found, rows in zip(engine.gradients, (range(4), range(4, 8)), strict=True):
        expected = 2 * plain_gradient(policy, policy, trajectory, advantages, rows)
        assert relative_error(found, expected) < 1e-4
    # Window of 3: each group's first step is evaluated once, not once in each optimizer step.
    assert counted.evaluations == 2 * (1 + 4 * 2)
    assert float(metrics["evaluations_per_image"]) == 18 / 8


@pytest.mark.parametrize("split", ["samples", "groups"])
def test_the_knob_says_how_samples_are_divided(split: str) -> None:
    trajectory = small_trajectory(SmallNet())
    expected = {"samples": [[0, 1, 4, 5], [2, 3, 6, 7]], "groups": [[0, 1, 2, 3], [4, 5, 6, 7]]}
    found = [part.tolist() for part in shares(trajectory, replace(knobs(2), split=split))]
    assert found == expected[split]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_transition_is_served_once_by_its_own_state(size: int, shared: bool) -> None:
    """In whatever chunks; and what serves it is at its step, of its sample or its group's first."""
    trajectory = replace(
        small_trajectory(SmallNet(), prompts=2, samples=6, size=size), shared=shared
    )
    (_, samples) = parts_of_groups(trajectory, 2)
    needed = evaluations_for(trajectory, samples, whole(trajectory).trained)
    for chunk_size in (1, 3, 100):
        served = []
        for part in passes([needed], chunk_size):
            chunk = needed.chunk(part)
            for sample, at in zip(chunk.row_sample, chunk.row_evaluation, strict=True):
                step, source = int(chunk.step[at]), int(chunk.sample[at])
                served.append((int(sample), step))
                assert torch.equal(trajectory.states[source, step], trajectory.states[sample, step])
                assert trajectory.group[source] == trajectory.group[sample]
        assert sorted(served) == [(int(s), k) for s in samples for k in range(size)]


# --- the ratio ------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 5, 100])
def test_ratio_is_one_before_the_first_optimizer_step(micro_batch: int) -> None:
    """Although rollout and update batch differently."""
    net = SmallNet()
    engine = Recording(net)
    trajectory = small_trajectory(net)
    metrics = update(
        engine, net, trajectory, drawn_advantages(8), objective(), knobs(2, micro_batch)
    )
    assert float(metrics["ratio_error_on_policy"]) <= 1e-6
    assert float(metrics["clip_fraction"]) == 0


def test_ratio_is_one_on_flux() -> None:
    flux = tiny_flux()
    velocity = flux.velocity(flux.module)
    text = flux.encode(["a red circle", "a blue square"])
    noise = small_noise(samples=2, shape=flux.latent_shape)
    trajectory = rollout(velocity, text, small_plan(6, 1, 2), noise, 3)
    engine = Recording(flux.module)
    metrics = update(engine, velocity, trajectory, drawn_advantages(4), objective(), knobs(2, 2))
    assert float(metrics["ratio_error_on_policy"]) <= 1e-6


def test_ratio_leaves_one_in_later_optimizer_steps() -> None:
    net = SmallNet()
    trajectory, engine = small_trajectory(net), Recording(net, lr=0.1)
    seen: list[Tensor] = []

    def spying(x_next: Tensor, new: Tensor, old: Tensor, std: Tensor) -> Tensor:
        seen.append(log_ratio(x_next, new, old, std).detach())
        return log_ratio(x_next, new, old, std)

    spied = replace(objective(), log_ratio=spying)
    metrics = update(engine, net, trajectory, drawn_advantages(8), spied, knobs(4))
    errors = [float(log_ratios.abs().max()) for log_ratios in seen]
    assert len(engine.gradients) == len(errors) == 4
    assert errors[0] <= 1e-6
    assert min(errors[1:]) > 1e-5
    assert float(metrics["ratio_error_on_policy"]) <= 1e-6
    assert float(metrics["ratio_deviation"]) > 1e-6


def test_reports_the_norm_before_it_is_clipped() -> None:
    net = SmallNet()
    trajectory, advantages = small_trajectory(net), drawn_advantages(8)
    engine = Recording(net)
    clipped = replace(knobs(), max_grad_norm=1e-3)
    metrics = update(engine, net, trajectory, advantages, objective(), clipped)
    whole = gradients(net, trajectory, advantages)
    assert float(metrics["grad_norm"]) == pytest.approx(float(whole.norm()), rel=1e-4)
    assert float(engine.gradients[0].norm()) == pytest.approx(1e-3, rel=1e-3)


# --- stopping in time -----------------------------------------------------------------------------


def nan_at(latent: Tensor) -> LogRatio:
    """A log-ratio that is NaN for the transition to this latent [S, C]."""

    def broken(x_next: Tensor, new: Tensor, old: Tensor, std: Tensor) -> Tensor:
        hit = (x_next == latent).flatten(1).all(1)
        return log_ratio(x_next, new, old, std).masked_fill(hit, math.nan)

    return broken


@pytest.mark.parametrize(("row", "steps_taken", "prompt"), [(0, 0, 0), (3, 1, 0), (6, 1, 1)])
def test_non_finite_loss_stops_before_the_step(row: int, steps_taken: int, prompt: int) -> None:
    """Two optimizer steps; each group's first two samples are in the first."""
    net = SmallNet()
    trajectory, engine = small_trajectory(net), Recording(net, lr=0.01)
    broken = replace(objective(), log_ratio=nan_at(trajectory.states[row, 2]))
    with pytest.raises(NonFiniteUpdate, match=rf"step {steps_taken} .*positions \[{prompt}\]"):
        update(engine, net, trajectory, drawn_advantages(8), broken, knobs(2))
    assert len(engine.gradients) == steps_taken


def test_non_finite_loss_leaves_the_weights_unchanged() -> None:
    net = SmallNet()
    before = copy.deepcopy(net.state_dict())
    trajectory, engine = small_trajectory(net), Recording(net, lr=0.01)
    broken = replace(objective(), log_ratio=nan_at(trajectory.states[1, 1]))
    with pytest.raises(NonFiniteUpdate):
        update(engine, net, trajectory, drawn_advantages(8), broken, knobs(2))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("field", ["states", "old_means"])
def test_non_finite_latents_of_a_valid_sample_stop(field: str) -> None:
    """Only a failed sample may have them: a scored one is not trained on something made up."""
    net = SmallNet()
    trajectory = small_trajectory(net)
    latents = getattr(trajectory, field).clone()
    latents[3, 1] = math.nan
    broken = replace(trajectory, **{field: latents})
    with pytest.raises(NonFiniteUpdate):
        update(Recording(net), net, broken, drawn_advantages(8), objective(), knobs())


def test_non_finite_gradient_stops_too() -> None:
    """The loss is finite, its gradient is not."""
    net = SmallNet()

    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, v: Tensor) -> Tensor:
            return v.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad * math.nan

    def poisoned(x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
        return Poisoned.apply(net(x, sigma, text))

    engine = Recording(net, lr=0.01)
    with pytest.raises(NonFiniteUpdate, match="gradient norm nan"):
        update(engine, poisoned, small_trajectory(net), drawn_advantages(8), objective(), knobs())
    assert not engine.gradients


# --- learning -------------------------------------------------------------------------------------


class Affine(nn.Module):
    """v = scale*x + shift, one number of each per channel; x -> 0 at the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(SHAPE[1]))
        self.shift = nn.Parameter(torch.zeros(SHAPE[1]))

    def forward(self, x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
        return x * self.scale + self.shift


def test_a_few_iterations_raise_the_reward() -> None:
    """Reward: how near the final latent is to 1, -(x - 1)^2."""
    net = Affine()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    engine = DataParallel(net, CPU, lambda _: (optimizer, schedule))
    plan, text = small_plan(6, 1, 2), small_text(4)
    rewards = []
    for iteration in range(30):
        noise = small_noise(range(4), 8, iteration=iteration)
        trajectory = rollout(net, text, plan, noise, 100)
        reward = -((trajectory.final - 1) ** 2).flatten(1).mean(1)
        advantages = group_advantages(
            {"near": reward}, trajectory.group, {"near": 1.0}, "advantage_sum", 5.0
        )
        update(engine, net, trajectory, advantages, objective(), knobs(2))
        rewards.append(float(reward.mean()))
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert last > first + 0.3


# --- the sizes of passes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("micro_batch", "batches"), [(3, [1, 3, 3, 3]), (5, [5, 5]), (10, [10]), (1, [1] * 10)]
)
def test_the_first_window_step_has_a_pass_of_its_own_if_that_takes_no_more(
    micro_batch: int, batches: list[int]
) -> None:
    """So that rollout and update evaluate the same state in batches of the same size."""
    net = SmallNet()
    trajectory = small_trajectory(net, prompts=1, samples=3, start=1, size=4)
    counted = Counted(net)
    update(
        Recording(net), counted, trajectory, drawn_advantages(3), objective(), knobs(1, micro_batch)
    )
    assert counted.batches == batches


def test_processes_that_differ_have_passes_of_equal_sizes() -> None:
    """Every process takes part in every gathering of sharded weights."""
    trajectory = small_trajectory(SmallNet(), prompts=1, samples=4, size=3)
    samples, all_steps = torch.arange(4), torch.ones(2, 4, 3, dtype=torch.bool)
    all_steps[1, :, 0] = False  # trains no first step
    everyone = evaluations_of_all(trajectory, samples, all_steps)
    assert passes(everyone, 3) == [range(0, 3), range(3, 6), range(6, 9)]
