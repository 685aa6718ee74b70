"""The policy update: the clipped objective over the window (MixGRPO, arXiv 2507.21802, eq. 9).

Each optimizer step uses an equal share of every group, or an equal share of the groups, and
evaluates each distinct (state, step) pair once. At the first window step, samples of a group that
were drawn from the same initial noise still have the same state, so one forward and one backward
pass serve all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixgrpo.config import UpdateConfig
from mixgrpo.engines import Engine
from mixgrpo.maths.batches import in_batches_of
from mixgrpo.maths.objective import KL, Prediction, clipped_loss, is_clipped, kl_in_mean
from mixgrpo.maths.schedule import step_at
from mixgrpo.maths.transitions import LogRatio, Transition
from mixgrpo.methods.emphasis import Emphasis, whole
from mixgrpo.types import Trajectory, Velocity


@dataclass(frozen=True)
class Objective:
    """The training objective.

    Attributes:
        transition: the stochastic step that the rollout used.
        log_ratio: computes the log-ratio of two transitions from their means.
        clip: the ratio is clipped to 1 +- clip.
        kl: weight of the KL divergence from the reference policy.
        reference: the reference policy's velocity; required only if kl > 0.
        kl_form: computes the KL divergence from the predictions of the two policies.
        passes: evaluations of the network for each velocity; two with guidance.
    """

    transition: Transition
    log_ratio: LogRatio
    clip: float
    kl: float = 0.0
    reference: Velocity | None = None
    kl_form: KL = kl_in_mean
    passes: int = 1


@dataclass(frozen=True)
class Evaluations:
    """Distinct model evaluations, and the transitions that each of them serves.

    They are planned on the CPU, where selecting rows does not synchronise with the device.

    Attributes:
        sample: [E] the sample whose state is evaluated.
        prompt: [E] the position of its prompt in the trajectory's text, always on the CPU.
        step: [E] the step, counted from the first step of the window.
        row_sample: [R] the sample of each transition.
        row_evaluation: [R] indices into the E evaluations, non-decreasing. An evaluation may serve
            no transition: such padding keeps the number of evaluations equal on all processes.
    """

    sample: Tensor
    prompt: Tensor
    step: Tensor
    row_sample: Tensor
    row_evaluation: Tensor

    def __len__(self) -> int:
        return len(self.sample)

    def chunk(self, part: range) -> Evaluations:
        """Returns the evaluations at these positions, with the transitions that they serve."""
        start, stop = part.start, part.stop
        inside = (self.row_evaluation >= start) & (self.row_evaluation < stop)
        return Evaluations(
            self.sample[start:stop],
            self.prompt[start:stop],
            self.step[start:stop],
            self.row_sample[inside],
            self.row_evaluation[inside] - start,
        )

    def padded(self, count: int) -> Evaluations:
        """Pads to ``count`` evaluations; the added ones serve no transition."""
        rows = torch.arange(count).clamp(max=len(self) - 1)
        return Evaluations(
            self.sample[rows],
            self.prompt[rows],
            self.step[rows],
            self.row_sample,
            self.row_evaluation,
        )

    def to(self, device: torch.device) -> Evaluations:
        parts = (self.sample, self.step, self.row_sample, self.row_evaluation)
        sample, *others = (part.to(device, non_blocking=True) for part in parts)
        return Evaluations(sample, self.prompt, *others)


class NonFiniteUpdate(RuntimeError):
    """Raised if a loss or gradient is not finite; the optimizer step has not been taken.

    Attributes:
        optimizer_step: 0-based index within the iteration of the step that was not taken.
    """

    def __init__(self, message: str, optimizer_step: int) -> None:
        super().__init__(message)
        self.optimizer_step = optimizer_step


def update(
    engine: Engine,
    velocity: Velocity,
    trajectory: Trajectory,
    advantages: Tensor,
    objective: Objective,
    knobs: UpdateConfig,
    emphasis: Emphasis | None = None,
) -> dict[str, Tensor]:
    """Takes ``knobs.optimizer_steps`` steps on the trajectory and returns this rank's metrics.

    Args:
        velocity: the policy's velocity, evaluated through ``engine.module``.
        advantages: [B]; NaN marks a failed sample, which contributes no gradient. The loss is
            averaged over all samples, with zero for the failed ones, so that failures do not scale
            up the gradients of the other samples.
        knobs: number of optimizer steps, micro-batch (model evaluations per forward pass) and
            maximum gradient norm.
        emphasis: the transitions to train on, and their weights; None trains on all of them, with
            equal weights.

    Raises:
        NonFiniteUpdate: on every rank, before the optimizer step is taken.
    """
    collected: list[dict[str, Tensor]] = []
    norms: list[Tensor] = []
    ratio_error = None
    evaluated = 0
    emphasis = emphasis or whole(trajectory, engine.world_size)
    trained = emphasis.trained.view(-1, *emphasis.weights.shape)  # [world, B, w]
    for index, samples in enumerate(shares(trajectory, knobs)):
        everyone = evaluations_of_all(trajectory, samples, trained)
        needed, parts = everyone[engine.rank], passes(everyone, knobs.micro_batch)
        scale = 1 / int(trained[engine.rank, samples].sum())
        step_rows = []
        for part in parts:
            with engine.accumulate(last=part == parts[-1]):
                rows = _losses(
                    velocity,
                    trajectory,
                    advantages,
                    objective,
                    needed.chunk(part),
                    emphasis.weights,
                )
                engine.backward(rows["loss"].sum() * scale)
            step_rows.append({name: value.detach() for name, value in rows.items()})
        merged = {name: torch.cat([part[name] for part in step_rows]) for name in step_rows[0]}
        norms.append(engine.clip_gradients(knobs.max_grad_norm))
        _require_finite(engine, index, norms[-1], merged, trajectory)
        engine.step()
        collected.append(merged)
        evaluated += len(needed)
        if ratio_error is None:
            ratio_error = (merged["log_ratio"].exp() - 1).abs().max()
    assert ratio_error is not None
    metrics = _summary(collected)
    metrics["grad_norm"] = torch.stack(norms).mean()
    metrics["ratio_error_on_policy"] = ratio_error
    metrics["evaluations_per_image"] = torch.tensor(evaluated * objective.passes / len(trajectory))
    return metrics


def parts_of_groups(trajectory: Trajectory, parts: int) -> Iterator[Tensor]:
    """Yields the samples [B/parts] of each optimizer step: an equal share of every group.

    Samples stay in prompt-major order. ``parts`` must divide the group size.
    """
    prompts = len(trajectory.text)
    indices = torch.arange(len(trajectory))
    for part in indices.view(prompts, -1).chunk(parts, dim=1):
        yield part.reshape(-1)


def shares(trajectory: Trajectory, knobs: UpdateConfig) -> Iterator[Tensor]:
    """Yields the samples of each optimizer step, divided as ``knobs.split`` says."""
    split = whole_groups if knobs.split == "groups" else parts_of_groups
    return split(trajectory, knobs.optimizer_steps)


def whole_groups(trajectory: Trajectory, parts: int) -> Iterator[Tensor]:
    """Yields the samples [B/parts] of each optimizer step: all those of every ``parts``-th prompt.

    Processes hold consecutive prompts, whose number ``parts`` must divide, so that it depends on a
    prompt's position in the iteration alone and not on the number of processes.
    """
    groups = torch.arange(len(trajectory)).view(len(trajectory.text), -1)
    for part in range(parts):
        yield groups[part::parts].reshape(-1)


def evaluations_of_all(
    trajectory: Trajectory, samples: Tensor, trained: Tensor
) -> list[Evaluations]:
    """Returns the evaluations of every process, padded to equal number so that collectives match.

    How many samples share the evaluation of the first window step depends on which steps are
    trained, which differs between processes. Processes that need fewer evaluations than others are
    padded; this costs no time, because they would otherwise wait.

    Args:
        samples: the rows of the samples, which are the same on every process.
        trained: [world, B, w] bool, the trained transitions of every process.
    """
    all_needed = [evaluations_for(trajectory, samples, mine) for mine in trained]
    most = max(len(needed) for needed in all_needed)
    return [needed.padded(most) for needed in all_needed]


def passes(everyone: Sequence[Evaluations], size: int) -> list[range]:
    """Splits the evaluations into forward passes of at most ``size``, equally on every process.

    Unless it takes one more pass, those of the first window step are kept apart from the others, as
    the rollout keeps them. The kernels of a GPU round differently for different batch sizes; with
    equal ones in rollout and update, the ratio of an unchanged policy is exactly 1.

    Args:
        everyone: the evaluations of every process, equally many.
    """
    count, firsts = len(everyone[0]), {int((each.step == 0).sum()) for each in everyone}
    together = in_batches_of(size, range(count))
    if len(firsts) > 1:
        return together
    first = firsts.pop()
    apart = in_batches_of(size, range(first)) + in_batches_of(size, range(first, count))
    return apart if len(apart) == len(together) else together


def evaluations_for(trajectory: Trajectory, samples: Tensor, trained: Tensor) -> Evaluations:
    """Returns the model evaluations that the ``trained`` [B, w] transitions of these samples need.

    If the whole window is trained, G' samples of a group need ``1 + G'*(w-1)`` evaluations if they
    share their initial noise, and ``G'*w`` otherwise.
    """
    chosen = trained[samples]
    starting = samples[chosen[:, 0]]  # the samples whose first window step is trained
    served_by = torch.arange(len(starting))
    first = starting
    if trajectory.shared:
        groups = trajectory.group[starting]
        is_first = torch.ones(len(starting), dtype=torch.bool)
        is_first[1:] = groups[1:] != groups[:-1]
        first, served_by = starting[is_first], is_first.cumsum(0) - 1
    position, later = chosen[:, 1:].nonzero(as_tuple=True)
    sample = torch.cat([first, samples[position]])
    return Evaluations(
        sample=sample,
        prompt=trajectory.group[sample],
        step=torch.cat([torch.zeros_like(first), later + 1]),
        row_sample=torch.cat([starting, samples[position]]),
        row_evaluation=torch.cat([served_by, len(first) + torch.arange(len(position))]),
    )


def _losses(
    velocity: Velocity,
    trajectory: Trajectory,
    advantages: Tensor,
    objective: Objective,
    needed: Evaluations,
    weights: Tensor,
) -> dict[str, Tensor]:
    """Returns the loss and statistics [R] of the transitions that these evaluations serve."""
    needed = needed.to(trajectory.states.device)
    all_failed = advantages.isnan()
    policy = _predict(velocity, trajectory, objective.transition, needed, all_failed)
    at = needed.row_evaluation
    sample, step = needed.row_sample, needed.step[at]
    mean, std = policy.mean[at], policy.std[at]
    failed = all_failed[sample]
    x_next = _finite_if_failed(trajectory.states[sample, step + 1], failed)
    old_mean = _finite_if_failed(trajectory.old_means[sample, step], failed)
    log_ratio = objective.log_ratio(x_next, mean, old_mean, std).masked_fill(failed, 0.0)
    advantage = advantages[sample].masked_fill(failed, 0.0)
    loss = clipped_loss(log_ratio, advantage, objective.clip)
    rows = {
        "log_ratio": log_ratio,
        "clip_fraction": is_clipped(log_ratio, advantage, objective.clip).float(),
    }
    if objective.kl > 0:
        assert objective.reference is not None, "the KL term needs a reference policy"
        with torch.no_grad():
            reference = _predict(
                objective.reference, trajectory, objective.transition, needed, all_failed
            )
        rows["kl"] = objective.kl_form(policy, reference)[at]
        loss = loss + objective.kl * rows["kl"]
    loss = loss * weights[sample, step]
    rows["loss"] = torch.where(failed, torch.zeros_like(loss), loss)
    rows["sample"] = sample
    return rows


def _predict(
    velocity: Velocity,
    trajectory: Trajectory,
    transition: Transition,
    needed: Evaluations,
    failed: Tensor,
) -> Prediction:
    steps = needed.step + trajectory.window.start
    sigmas = trajectory.sigmas.to(steps.device, non_blocking=True)
    x = _finite_if_failed(trajectory.states[needed.sample, needed.step], failed[needed.sample])
    text = trajectory.text[needed.prompt]
    v = velocity(x, sigmas[steps], text)
    return Prediction(v, *transition(x, v, step_at(sigmas, steps)))


def _finite_if_failed(latents: Tensor, failed: Tensor) -> Tensor:
    # A sample that diverged has no score, hence no gradient; but 0 * NaN is NaN and would spread to
    # the other samples. In a sample that has a score, a non-finite latent is an error and must show
    # up in the loss.
    return torch.where(failed[:, None, None], latents.nan_to_num(0.0, 0.0, 0.0), latents)


def _require_finite(
    engine: Engine,
    index: int,
    norm: Tensor,
    rows: dict[str, Tensor],
    trajectory: Trajectory,
) -> None:
    bad = ~rows["loss"].isfinite()
    if not engine.any(bool(bad.any()) or not bool(norm.isfinite())):
        return
    groups = trajectory.group[rows["sample"][bad].cpu()].unique().tolist()
    place = f" (prompts at positions {groups})" if groups else ""
    raise NonFiniteUpdate(
        f"the loss or gradient is not finite at optimizer step {index} of the iteration: on this "
        f"process, {int(bad.sum())} of {len(bad)} transitions have a non-finite loss{place}; "
        f"gradient norm {norm.item():.4g}, "
        f"largest |log ratio| {rows['log_ratio'].abs().max().item():.4g}",
        index,
    )


def _summary(collected: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    rows = {name: torch.cat([part[name] for part in collected]) for name in collected[0]}
    ratio = rows["log_ratio"].exp()
    metrics = {
        "loss": rows["loss"].mean(),
        "clip_fraction": rows["clip_fraction"].mean(),
        "ratio_mean": ratio.mean(),
        "ratio_deviation": (ratio - 1).abs().mean(),
    }
    if "kl" in rows:
        metrics["kl"] = rows["kl"].mean()
    return metrics
