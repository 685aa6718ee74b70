"""The rollout against a plain one: one picture at a time, every step evaluated and kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from small import (
    SHAPE,
    SHIFT,
    Counted,
    SmallNet,
    relative_error,
    small_noise,
    small_plan,
    small_text,
    tiny_flux,
)
from torch import Tensor

from mixgrpo.maths.dpm_solver import DPMSolver, Prediction, dpm_step
from mixgrpo.maths.schedule import flash_sigmas, step_at
from mixgrpo.noise import Noise
from mixgrpo.rollout import SamplingPlan, rollout, sample_ode
from mixgrpo.text.prompt_files import PromptList
from mixgrpo.text.prompts import PromptBatches
from mixgrpo.types import TextEmbedding, Trajectory, Velocity, Window

TAILS = {
    "euler": {},
    "flash-1": {"solver": "dpm", "order": 1, "ratio": 0.6},
    "flash-2": {"solver": "dpm", "order": 2, "ratio": 0.6},
    "flash-3": {"solver": "dpm", "order": 3, "ratio": 0.6},
    "dpm-2, full length": {"solver": "dpm", "order": 2},
}


@dataclass(frozen=True)
class Plain:
    """All latents [B, T+1, S, C] and the means of the window's steps [B, w, S, C]."""

    latents: Tensor
    means: Tensor


@torch.no_grad()
def plain_rollout(
    velocity: Velocity,
    text: TextEmbedding,
    plan: SamplingPlan,
    noise: Noise,
    eta: float,
    order: int,
) -> Plain:
    """``order`` 0 is an Euler tail, otherwise that of DPM-Solver++ (midpoint)."""
    rows = range(len(noise.prompts) * noise.samples)
    images = [_plain_image(velocity, text, plan, noise, eta, order, row) for row in rows]
    return Plain(torch.stack([i.latents for i in images]), torch.stack([i.means for i in images]))


def _plain_image(
    velocity: Velocity,
    text: TextEmbedding,
    plan: SamplingPlan,
    noise: Noise,
    eta: float,
    order: int,
    row: int,
) -> Plain:
    prompt = row // noise.samples
    x = noise.initial()[prompt if noise.shared else row]
    latents, means, history = [x], [], []
    for i in range(plan.steps):
        sigma, after = plan.sigmas[i], plan.sigmas[i + 1]
        v = velocity(x[None], sigma[None], text[prompt : prompt + 1])[0]
        history.append(Prediction(x - sigma * v, float(sigma)))
        if plan.window.start <= i < plan.window.stop:
            g = eta * torch.sqrt(sigma / (1 - (plan.sigmas[1] if i == 0 else sigma)))
            score_term = g**2 / (2 * sigma) * (x + (1 - sigma) * v)
            means.append(x + (v + score_term) * (after - sigma))
            x = means[-1] + g * torch.sqrt(sigma - after) * noise.at(i, range(row, row + 1))[0]
        elif i >= plan.window.stop and order > 0:
            # Below 15 steps the one before the last is at most of second order, as in diffusers.
            highest = min(order, 2) if i == plan.steps - 2 else order
            x = dpm_step(history[-order:], x, step_at(plan.sigmas, i), highest)
        else:
            x = x + v * (after - sigma)
        latents.append(x)
    return Plain(torch.stack(latents), torch.stack(means))


def small_rollout(
    plan: SamplingPlan, noise: Noise, micro_batch: int = 100, seed: int = 0
) -> Trajectory:
    return rollout(SmallNet(seed), small_text(len(noise.prompts)), plan, noise, micro_batch)


# --- equal to the plain rollout -------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "independent"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("start", [0, 3, 5])
def test_equals_the_plain_rollout(start: int, tail: str, shared: bool) -> None:
    """Windows [0, 2), [3, 5) and the last valid one of 8 steps, [5, 7)."""
    plan, noise = small_plan(8, start, 2, **TAILS[tail]), small_noise(shared=shared)
    order = TAILS[tail].get("order", 0)
    text, net = small_text(2), SmallNet()
    expected = plain_rollout(net, text, plan, noise, eta=0.7, order=order)
    for micro_batch in (1, 3, 100):
        found = rollout(net, text, plan, noise, micro_batch)
        window_latents = expected.latents[:, start : start + 3]
        assert relative_error(found.final, expected.latents[:, -1]) < 1e-5
        assert relative_error(found.states, window_latents) < 1e-5
        assert relative_error(found.old_means, expected.means) < 1e-5


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "independent"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_prefix_by_dpm_solver_equals_the_plain_one(order: int, shared: bool) -> None:
    """Window [6, 8) of 10 steps; the six before it become three, still run once per prompt."""
    sigmas = flash_sigmas(10, SHIFT, Window(6, 8), 1.0, before=0.5)
    plan = replace(
        small_plan(10, 3, 2),
        sigmas=sigmas,
        prefix=lambda: DPMSolver(sigmas, order),
        solver=lambda: DPMSolver(sigmas, 1),
    )
    assert plan.steps == 3 + 2 + 2
    noise, text, net = small_noise(samples=3, shared=shared), small_text(2), Counted(SmallNet())
    found = rollout(net, text, plan, noise, 100)
    assert net.evaluations == found.evaluations == (2 * 4 + 6 * 3 if shared else 6 * 7)
    for row in range(6):
        x = noise.initial()[row // 3 if shared else row][None]
        history: list[Prediction] = []
        for i in range(3):
            v = net(x, sigmas[i : i + 1], text[row // 3 : row // 3 + 1])
            history.append(Prediction(x - sigmas[i] * v, float(sigmas[i])))
            x = dpm_step(history[-order:], x, step_at(sigmas, i), order)
        assert relative_error(found.states[row : row + 1, 0], x) < 1e-5


def test_finished_pictures_are_handed_on_in_order_before_the_next_are_sampled() -> None:
    net = Counted(SmallNet())
    plan, noise = small_plan(8, 3, 2), small_noise(samples=3)
    seen: list[tuple[range, Tensor, int]] = []

    def finished(latents: Tensor, rows: range) -> None:
        seen.append((rows, latents, net.evaluations))

    found = rollout(net, small_text(2), plan, noise, 4, finished)
    assert [rows for rows, _, _ in seen] == [range(4), range(4, 6)]
    assert torch.equal(torch.cat([latents for _, latents, _ in seen]), found.final)
    shared = 2 * 4  # both prompts, the steps before the window and its first
    assert [count for _, _, count in seen] == [shared + 4 * 4, shared + 6 * 4]


@pytest.mark.parametrize("order", [0, 2])
def test_equals_the_plain_rollout_on_flux(order: int) -> None:
    flux = tiny_flux()
    velocity = flux.velocity(flux.module)
    text = flux.encode(["a red circle on a gray background", "a blue square"])
    tail = {"solver": "dpm", "order": order, "ratio": 0.6} if order else {}
    plan, noise = small_plan(6, 1, 2, **tail), small_noise(samples=2, shape=flux.latent_shape)
    expected = plain_rollout(velocity, text, plan, noise, eta=0.7, order=order)
    found = rollout(velocity, text, plan, noise, micro_batch=3)
    assert relative_error(found.final, expected.latents[:, -1]) < 1e-5
    assert relative_error(found.states, expected.latents[:, 1:4]) < 1e-5
    assert relative_error(found.old_means, expected.means) < 1e-5


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("start", [0, 3])
def test_exact_on_a_flow_to_one_point_per_prompt(start: int, tail: str) -> None:
    """v = (x - c)/sigma always predicts the data c: every step, noisy or not, leads there."""
    plan, noise, text = small_plan(8, start, 2, **TAILS[tail]), small_noise(), small_text(2)

    def velocity(x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
        return (x - text.pooled[:, :1, None]) / sigma[:, None, None]

    final = rollout(velocity, text, plan, noise, micro_batch=4).final
    expected = text.pooled[:, :1, None].repeat_interleave(3, 0).expand(6, *SHAPE)
    torch.testing.assert_close(final, expected, rtol=1e-5, atol=1e-5)


# --- how much is evaluated and kept ---------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 4, 100])
@pytest.mark.parametrize(("start", "size"), [(0, 2), (3, 2), (2, 1), (0, 7)])
def test_evaluations_with_shared_noise(start: int, size: int, micro_batch: int) -> None:
    """(l+1) + G*(T-l-1) for each of the 2 groups of 3."""
    counted = Counted(SmallNet())
    found = rollout(counted, small_text(2), small_plan(8, start, size), small_noise(), micro_batch)
    expected = 2 * ((start + 1) + 3 * (8 - start - 1))
    assert counted.evaluations == found.evaluations == expected
    assert found.evaluations_per_image == expected / 6
    assert max(counted.batches) <= micro_batch


def test_evaluations_with_independent_noise() -> None:
    """G*T: nothing is shared, and nothing is taken to be."""
    counted = Counted(SmallNet())
    found = rollout(counted, small_text(2), small_plan(8, 3, 2), small_noise(shared=False), 4)
    assert counted.evaluations == found.evaluations == 2 * 3 * 8
    assert not found.shared


@pytest.mark.parametrize(("start", "ratio", "tail"), [(0, 0.4, 2), (3, 0.4, 1), (5, 0.01, 1)])
def test_evaluations_of_flash(start: int, ratio: float, tail: int) -> None:
    """Each picture takes l + w + n steps."""
    counted = Counted(SmallNet())
    plan = small_plan(8, start, 2, solver="dpm", ratio=ratio)
    found = rollout(counted, small_text(2), plan, small_noise(shared=False), 100)
    assert plan.steps == start + 2 + tail
    assert counted.evaluations == found.evaluations == 6 * (start + 2 + tail)


@pytest.mark.parametrize("tail", TAILS)
def test_every_sigma_is_visited_and_the_last_is_zero(tail: str) -> None:
    plan = small_plan(8, 3, 2, **TAILS[tail])
    counted = Counted(SmallNet())
    found = rollout(counted, small_text(2), plan, small_noise(), 100)
    assert found.sigmas[0] == 1
    assert found.sigmas[-1] == 0
    assert sorted(set(counted.sigmas), reverse=True) == plan.sigmas[:-1].tolist()


@pytest.mark.parametrize("shared", [True, False])
def test_keeps_the_window_and_no_more(shared: bool) -> None:
    found = small_rollout(small_plan(8, 2, 3), small_noise(shared=shared))
    assert found.states.shape == (6, 4, *SHAPE)
    assert found.old_means.shape == (6, 3, *SHAPE)
    assert found.final.shape == (6, *SHAPE)
    assert found.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.shared is shared
    for kept in (found.states, found.old_means, found.final):
        assert kept.dtype == torch.float32
        assert not kept.requires_grad


# --- the window -----------------------------------------------------------------------------------


@pytest.mark.parametrize("transition", ["flow_sde", "dance_sde", "cps", "precise"])
@pytest.mark.parametrize("start", [0, 2])
def test_window_steps_are_the_transition(start: int, transition: str) -> None:
    """The kept means are the transition's at the kept states; the states are drawn around them."""
    plan, noise, text = small_plan(8, start, 3, transition=transition), small_noise(), small_text(2)
    net = SmallNet()
    found = rollout(net, text, plan, noise, micro_batch=4)
    for k, i in enumerate(plan.window.steps):
        x = found.states[:, k]
        with torch.no_grad():
            v = net(x, plan.sigmas[i].expand(6), text[found.group])
        normal = plan.transition(x, v, step_at(plan.sigmas, i))
        torch.testing.assert_close(found.old_means[:, k], normal.mean, rtol=1e-5, atol=1e-5)
        drawn = (found.states[:, k + 1] - normal.mean) / normal.std
        torch.testing.assert_close(drawn, noise.at(i, range(6)), rtol=1e-3, atol=1e-3)


def test_a_group_parts_in_the_first_window_step() -> None:
    found = small_rollout(small_plan(8, 3, 2), small_noise(), micro_batch=2)
    states, means = (t.unflatten(0, (2, 3)) for t in (found.states, found.old_means))
    assert torch.equal(states[:, :1, 0].expand(-1, 3, -1, -1), states[:, :, 0])
    assert torch.equal(means[:, :1, 0].expand(-1, 3, -1, -1), means[:, :, 0])
    assert not torch.equal(states[0, 0, 0], states[1, 0, 0])
    for latents in (found.states[:, 1], found.final):
        distance = torch.cdist(latents.flatten(1), latents.flatten(1)) + 9 * torch.eye(6)
        assert float(distance.min()) > 0.1


def test_no_two_samples_or_steps_get_the_same_noise() -> None:
    plan = small_plan(8, 1, 4)
    found = small_rollout(plan, small_noise())
    stds = torch.stack([plan.transition(*[torch.zeros(1, *SHAPE)] * 2, step_at(plan.sigmas, i)).std
                        for i in plan.window.steps])  # fmt: skip
    drawn = (found.states[:, 1:] - found.old_means) / stds[:, None, None]
    drawn = drawn.flatten(0, 1).flatten(1)  # [6*4, S*C]
    distance = torch.cdist(drawn, drawn) + 9 * torch.eye(len(drawn))
    assert float(distance.min()) > 0.5


def test_next_iteration_draws_anew() -> None:
    plan = small_plan()
    first, second = (small_rollout(plan, small_noise(iteration=i)) for i in (0, 1))
    assert relative_error(first.final, second.final) > 0.1


@pytest.mark.parametrize("transition", ["flow_sde", "dance_sde", "cps", "precise"])
def test_without_noise_it_is_the_ode(transition: str) -> None:
    plan = small_plan(8, 2, 3, transition=transition, eta=1e-6)
    noise, text, net = small_noise(), small_text(2), SmallNet()
    found = rollout(net, text, plan, noise, micro_batch=100).final.unflatten(0, (2, 3))
    expected = sample_ode(net, noise.initial(), text, plan.sigmas, micro_batch=100)
    for sample in range(3):
        assert relative_error(found[:, sample], expected) < 1e-5


# --- the same result however it is computed -------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_two_processes_sample_what_one_does(shared: bool) -> None:
    """Four prompts at once, and by two processes that know their positions in the batch."""
    plan, text = small_plan(), small_text(4)

    def sampled(rank: int, world_size: int) -> Tensor:
        positions = PromptBatches(PromptList.plain("abcd"), 4, 0, rank, world_size).at(0).positions
        noise = small_noise(prompts=positions, shared=shared)
        mine = text[torch.tensor(positions)]
        return rollout(SmallNet(), mine, plan, noise, micro_batch=1).final

    assert torch.equal(torch.cat([sampled(0, 2), sampled(1, 2)]), sampled(0, 1))


def test_same_seed_same_pictures() -> None:
    plan, noise = small_plan(), small_noise()
    found, again = small_rollout(plan, noise), small_rollout(plan, noise)
    assert torch.equal(found.final, again.final)
    assert torch.equal(found.states, again.states)
    other = small_rollout(plan, replace(noise, seed=6))
    assert relative_error(found.final, other.final) > 0.1


# --- deterministic sampling -----------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 2, 100])
def test_ode_sampling(micro_batch: int) -> None:
    plan, text, x = small_plan(), small_text(3), small_noise(prompts=(0, 1, 2)).initial()
    counted = Counted(SmallNet())
    found = sample_ode(counted, x, text, plan.sigmas, micro_batch)
    for i in range(plan.steps):
        with torch.no_grad():
            v = counted.velocity(x, plan.sigmas[i].expand(3), text)
        x = x + v * (plan.sigmas[i + 1] - plan.sigmas[i])
    assert relative_error(found, x) < 1e-5
    assert counted.evaluations == 3 * plan.steps
    assert max(counted.batches) <= micro_batch
