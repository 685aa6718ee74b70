"""Mixed ODE-SDE sampling (MixGRPO, arXiv 2507.21802, algorithm 1).

Steps inside the window are stochastic (SDE); steps before and after it are deterministic (ODE).
With MixGRPO-Flash, the steps after the window follow a shortened schedule and may be solved with
DPM-Solver++. Samples of a prompt that share their initial noise follow the same trajectory up to
the first stochastic step, so that part is computed only once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixgrpo.maths.batches import in_batches_of
from mixgrpo.maths.dpm_solver import Euler, Solver
from mixgrpo.maths.schedule import step_at
from mixgrpo.maths.transitions import Transition, euler, predict_data, sample
from mixgrpo.noise import Noise
from mixgrpo.types import TextEmbedding, Trajectory, Velocity, Window


@dataclass(frozen=True)
class SamplingPlan:
    """How the images of one iteration are sampled.

    Attributes:
        sigmas: [T+1] float32 on the CPU, from 1 to exactly 0, including the compressed tail of
            MixGRPO-Flash, if any.
        window: the stochastic steps.
        transition: the stochastic step.
        solver: creates the solver for the steps after the window; called once per micro-batch.
        prefix: creates the solver for the steps before the window.
        passes: evaluations of the network for each velocity; two with guidance.
    """

    sigmas: Tensor
    window: Window
    transition: Transition
    solver: Callable[[], Solver]
    prefix: Callable[[], Solver] = Euler
    passes: int = 1

    @property
    def steps(self) -> int:
        return self.sigmas.shape[0] - 1


@torch.no_grad()
def rollout(
    velocity: Velocity,
    text: TextEmbedding,
    plan: SamplingPlan,
    noise: Noise,
    micro_batch: int,
    finished: Callable[[Tensor, range], None] | None = None,
) -> Trajectory:
    """Samples G images for each of P prompts.

    Args:
        velocity: the policy.
        text: the P prompts.
        plan: the schedule, the window, the transition and the solvers.
        noise: the initial noise and the noise of every stochastic step.
        micro_batch: number of samples per model evaluation.
        finished: called in order with the final latents [b, S, C] of each micro-batch and their
            rows, as soon as they are sampled, so that they can be decoded and scored while the
            next micro-batch is being sampled.
    """
    x = noise.initial()  # [P, S, C] if shared, else [B, S, C]
    spread = noise.samples if noise.shared else 1
    sources = text.repeat_each(noise.samples // spread)
    evaluate = in_batches(velocity, micro_batch)
    prefix = plan.prefix()
    for i in range(plan.window.start):
        x = prefix.step(x, evaluate(x, plan.sigmas[i], sources), step_at(plan.sigmas, i))
    v = evaluate(x, plan.sigmas[plan.window.start], sources)
    evaluations = len(x) * (plan.window.start + 1)

    x, v = x.repeat_interleave(spread, 0), v.repeat_interleave(spread, 0)  # [B, S, C]
    group = torch.arange(len(text)).repeat_interleave(noise.samples)
    branches = []
    for rows in in_batches_of(micro_batch, range(len(x))):
        part = slice(rows.start, rows.stop)
        branches.append(_branch(velocity, x[part], v[part], text[group[part]], plan, noise, rows))
        if finished:
            finished(branches[-1][-1], rows)
    evaluations += len(x) * (plan.steps - plan.window.start - 1)
    states, means, final = (torch.cat(parts) for parts in zip(*branches, strict=True))
    return Trajectory(
        sigmas=plan.sigmas,
        window=plan.window,
        states=states,
        old_means=means,
        final=final,
        text=text,
        group=group,
        shared=noise.shared,
        evaluations=evaluations * plan.passes,
    )


def _branch(
    velocity: Velocity,
    x: Tensor,
    v: Tensor,
    text: TextEmbedding,
    plan: SamplingPlan,
    noise: Noise,
    rows: range,
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples one micro-batch from the start of the window to sigma 0.

    ``v`` is the velocity at the first window step, which has already been evaluated. Returns the
    window states [b, w+1, S, C], the window means [b, w, S, C] and the final latents [b, S, C].
    """
    states, means = [x], []
    solver = plan.solver()
    for i in plan.window.steps:
        step = step_at(plan.sigmas, i)
        if i > plan.window.start:
            v = velocity(x, _per_sample(plan.sigmas[i], x), text)
        # A multistep solver continues after the window from the predictions made inside it.
        solver.observe(predict_data(x, v, step), step.sigma)
        normal = plan.transition(x, v, step)
        x = sample(normal, noise.at(i, rows))
        states.append(x)
        means.append(normal.mean)
    for i in range(plan.window.stop, plan.steps):
        v = velocity(x, _per_sample(plan.sigmas[i], x), text)
        x = solver.step(x, v, step_at(plan.sigmas, i))
    return torch.stack(states, 1), torch.stack(means, 1), x


@torch.no_grad()
def sample_ode(
    velocity: Velocity, x: Tensor, text: TextEmbedding, sigmas: Tensor, micro_batch: int
) -> Tensor:
    """Deterministic Euler sampling from noise x [N, S, C] at sigma 1 to latents at sigma 0."""
    evaluate = in_batches(velocity, micro_batch)
    for i in range(sigmas.shape[0] - 1):
        x = euler(x, evaluate(x, sigmas[i], text), step_at(sigmas, i))
    return x


def in_batches(
    velocity: Velocity, micro_batch: int
) -> Callable[[Tensor, Tensor, TextEmbedding], Tensor]:
    """Returns a function that evaluates the velocity of any number of samples at one sigma.

    It evaluates ``micro_batch`` samples at a time.
    """

    def evaluate(x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
        parts = [slice(rows.start, rows.stop) for rows in in_batches_of(micro_batch, range(len(x)))]
        return torch.cat([velocity(x[p], _per_sample(sigma, x[p]), text[p]) for p in parts])

    return evaluate


def _per_sample(sigma: Tensor, x: Tensor) -> Tensor:
    # Filled on x's device from a CPU scalar: copying the scalar would synchronise with the device.
    return x.new_full((len(x),), float(sigma))
