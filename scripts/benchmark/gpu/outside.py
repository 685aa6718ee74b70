"""Cheaper evaluations for the steps outside the window, whose rounding leaves the ratio exact.

Only the window's steps have log-probabilities, and the update evaluates the same network at them.
What the steps before and behind the window evaluate changes the images a little, not the ratio.
Compared are, each compiled: the network as the window evaluates it; the same without the
activations for a backward pass, which the window's code keeps so that it equals the update's; with
the adapters merged into bfloat16 weights; and with merged weights and activations in float8
(e4m3, a scale for every row of both).

The distance of the final latents is relative to those sampled as in the window everywhere. On
random weights it shows the size of the rounding, not of a change in the images' quality.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from speed import Task
from torch import Tensor, nn

from gpu.iterations import TAILS, compiled, memory, reset_peak
from gpu.job import Job, main
from gpu.machine import seconds_of
from gpu.models import FULL, SMALL, Scale, build, move_adapters, text_for
from mixgrpo.models.compiled import repeated_blocks
from mixgrpo.models.policy import DiffusersPolicy
from mixgrpo.rollout import SamplingPlan, rollout
from mixgrpo.types import TextEmbedding, Velocity, Window

LARGEST = torch.finfo(torch.float8_e4m3fn).max
EVERYWHERE = "as in the window"


class Float8Linear(nn.Module):
    """A linear layer whose product is computed in float8, with bfloat16 outputs.

    Each row of the inputs is scaled to float8's range when it comes in, each row of the weights
    once. Kernels for scales of rows exist on GPUs (Hopper and newer); elsewhere, all rows have one.

    Args:
        layer: the layer in bfloat16; its weights are not kept.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.by_rows = layer.weight.device.type == "cuda"
        weight, scale = to_float8(layer.weight.detach(), self.by_rows)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        values, scale = to_float8(rows, self.by_rows)
        found = torch._scaled_mm(
            values,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale.t() if self.by_rows else self.scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return found.reshape(*x.shape[:-1], -1)


def to_float8(values: Tensor, by_rows: bool) -> tuple[Tensor, Tensor]:
    """[N, K] -> float8 values [N, K], and their scales [N, 1], or [] if all rows have one."""
    exact = values.float()
    largest = exact.abs().amax(1, keepdim=True) if by_rows else exact.abs().amax()
    scale = (largest / LARGEST).clamp_min(1e-12)
    return (exact / scale).to(torch.float8_e4m3fn), scale


def merged(module: nn.Module) -> nn.Module:
    """A copy of the network without adapters: they are added to its weights."""
    found = copy.deepcopy(module).requires_grad_(False).eval()
    for name, layer in list(found.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            _replace(found, name, layer.get_base_layer())
    return found


def in_float8(module: nn.Module) -> nn.Module:
    """The network with the linear layers of its blocks in float8, in place."""
    for block in list(repeated_blocks(module)):
        for name, layer in list(block.named_modules()):
            # A product of one row per image, as in modulations, has nothing to gain.
            if isinstance(layer, nn.Linear) and "norm" not in name:
                _replace(block, name, Float8Linear(layer))
    return module


def _replace(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, part)


# ---- a rollout with two networks


@dataclass(frozen=True)
class Mixed:
    """A velocity that uses one network at the window's sigmas and another elsewhere.

    It reads sigma on the host, which waits for the GPU once in every evaluation: next to an
    evaluation of a whole batch that is little.
    """

    inside: Velocity
    outside: Velocity
    plan: SamplingPlan

    def __call__(self, x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
        sigmas = self.plan.sigmas[self.plan.window.start : self.plan.window.stop]
        is_inside = bool((sigmas == sigma[0].cpu()).any())
        return (self.inside if is_inside else self.outside)(x, sigma, text)


def without_gradients(transformer: Any, compiler: str) -> nn.Module:
    """Compiles the blocks for evaluations without gradients only, in place."""
    codes: dict[type, Callable[..., Any]] = {}
    for block in repeated_blocks(transformer):
        kind = type(block)
        if kind not in codes:
            codes[kind] = torch.compile(
                kind.forward, backend=compiler, fullgraph=True, dynamic=False
            )
        block.forward = codes[kind].__get__(block)
    return transformer


class Comparison:
    """Rollouts whose steps outside the window are evaluated by other networks."""

    def __init__(self, job: Job, scale: Scale) -> None:
        self.job, self.scale = job, scale
        self.device = torch.device(job.device)
        self.compiler = "eager" if job.small else "inductor"
        self.policy: DiffusersPolicy = build(scale, scale.knobs(train="lora"), self.device)
        move_adapters(self.policy.module)
        self.policy.module.eval()
        self.inside = self.policy.velocity(self.policy.module)
        count = scale.samples
        window = Window(scale.start, scale.start + scale.window)
        # Nothing is trained here: advantages and optimizer steps do not matter.
        self.task = Task(
            policy=self.policy,
            text=text_for(self.policy, 1),
            samples=count,
            steps=scale.steps,
            window=window,
            optimizer_steps=1,
            advantages=torch.zeros(count),
            micro_batch=count,
            seed=0,
        )
        self.plan = self.task.plan(*TAILS["MixGRPO-Flash"])
        self.expected: Tensor | None = None

    def report(self, name: str, make: Callable[[], nn.Module]) -> None:
        """Times one evaluation of the network that ``make`` returns, and a rollout that uses it."""
        if self.job.left() > 0:
            self.job.attempt(name, partial(self._measure, make))
        reset_peak(self.device, empty=True)

    @torch.no_grad()
    def _measure(self, make: Callable[[], nn.Module]) -> dict[str, Any]:
        reset_peak(self.device)
        outside = self.policy.velocity(make())
        x, text = self.task.noise(0).at(0, range(self.scale.samples)), self.task.text
        text = text.repeat_each(self.scale.samples)
        sigma = x.new_full((len(x),), 0.5)
        work = partial(outside, x, sigma, text)
        evaluation = seconds_of(work, self.device, repeats=2, warm_up=1) / len(x)
        for velocity in (self.inside, outside):  # at the rollout's other batch size
            velocity(x[:1], sigma[:1], text[:1])
        self.inside(x, sigma, text)
        final, seconds = self._sample(outside)
        if self.expected is None:
            self.expected = final
        distance = (final - self.expected).norm() / self.expected.norm()
        return {
            "seconds_per_evaluation": evaluation,
            "rollout_seconds": seconds,
            "distance": distance.item(),
            "memory_gib": memory(self.device).get("allocated"),
        }

    def _sample(self, outside: Velocity) -> tuple[Tensor, float]:
        """Final latents of a rollout, and its seconds."""
        task, plan = self.task, self.plan
        velocity, found = Mixed(self.inside, outside, plan), []

        def sample() -> None:
            found.append(rollout(velocity, task.text, plan, task.noise(0), task.micro_batch).final)

        seconds = seconds_of(sample, self.device, repeats=1, warm_up=0)
        return found[-1], seconds


@contextmanager
def plain_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Context in which a network's blocks are its own, and not the compiled ones."""
    forwards = {block: block.__dict__.pop("forward", None) for block in repeated_blocks(module)}
    try:
        yield module
    finally:
        for block, forward in forwards.items():
            if forward is not None:
                block.forward = forward


def perform(job: Job) -> None:
    bench = Comparison(job, SMALL if job.small else FULL)
    module, compiler = bench.policy.module, bench.compiler

    def copied() -> nn.Module:
        with plain_blocks(module):
            return merged(module)

    with compiled(bench.policy, compiler):
        bench.report(EVERYWHERE, lambda: module)
        bench.report("float8", lambda: without_gradients(in_float8(copied()), compiler))
        bench.report("merged", lambda: without_gradients(copied(), compiler))
        bench.report("no activations kept", lambda: without_gradients(unmerged(module), compiler))


def unmerged(module: nn.Module) -> nn.Module:
    """A copy of the network with its adapters."""
    with plain_blocks(module):
        return copy.deepcopy(module).requires_grad_(False).eval()


if __name__ == "__main__":
    main("outside", perform)
