"""Whole iterations at FLUX.1-dev's size: the published way beside this repository's, on one model.

The variants are those of ``speed.py``. A policy is built once; compiled blocks replace its own and
are taken away again, so that all variants have the same weights. Instead of a whole iteration, what
warms up is one evaluation of every batch size that an iteration has. The optimizer's learning rate
is 0: every iteration starts from the same weights.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from speed import Ours, Published, Task, Variant, iterate, synchronize
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gpu.job import Job
from gpu.models import Scale, build, text_for
from mixgrpo.config import ModelConfig
from mixgrpo.devices import Clock
from mixgrpo.engines.adamw import FrugalAdamW
from mixgrpo.models.compiled import compile_blocks, repeated_blocks
from mixgrpo.models.policy import DiffusersPolicy
from mixgrpo.planning.operations import operations_per_picture
from mixgrpo.types import Window

GIB = 2**30
# The solver behind the window, and the share of the steps there that are kept.
TAILS = {
    "published": ("euler", 1.0),
    "MixGRPO": ("euler", 1.0),
    "MixGRPO-Flash": ("dpm", 0.4),
    "MixGRPO-Flash*": ("dpm", 0.2),
}
STAR = "MixGRPO-Flash*"  # its window stays at the first steps
GUESSED_RATE = 200.0  # TFLOP/s of a GPU, until an iteration has been measured
COMPILING = 25.0  # seconds for a batch size, on a GPU; a guess


@dataclass(frozen=True)
class Batches:
    """The largest numbers of evaluations in one pass; as many latents as in the rollout are decoded
    together."""

    rollout: int
    update: int


@dataclass(frozen=True)
class Wanted:
    """An iteration to measure.

    Attributes:
        variant: one of TAILS.
        compile: "off", or the compiler of the blocks.
        samples, steps: fewer of them make a short form, which ends early.
    """

    variant: str
    compile: str
    samples: int
    steps: int

    def name(self, scale: Scale) -> str:
        short = "" if self.steps == scale.steps else f", {self.steps} steps"
        compiled = "" if self.compile == "off" else f", {self.compile}"
        return f"{self.variant}{compiled}, {self.samples} images{short}"


class Bench:
    """A policy, and the iterations that are measured on it."""

    def __init__(self, job: Job, scale: Scale, knobs: ModelConfig, batches: Batches) -> None:
        self.job = job
        self.scale = scale
        self.batches = batches
        self.device = torch.device(job.device)
        self.policy = build(scale, knobs, self.device)
        self.rate = GUESSED_RATE if self.device.type == "cuda" else 0.01
        self.stepping = 0.0  # seconds of an optimizer step
        self.warm: set[tuple[str, int, bool]] = set()

    def measure(self, wanted: Wanted) -> bool:
        """Reports an iteration, or that it does not fit into the time that is left; returns whether
        it worked or was left out."""
        name = wanted.name(self.scale)
        expected = self._expected(wanted)
        if expected > self.job.left():
            self.job.report(name, skipped=f"{expected:.0f} s expected, {self.job.left():.0f} left")
            return True
        worked = self.job.attempt(name, partial(self._measure, wanted))
        if not worked:
            self.policy.module.zero_grad(set_to_none=True)  # what it may have left
            reset_peak(self.device, empty=True)
        return worked

    def _measure(self, wanted: Wanted) -> dict[str, Any]:
        task = self.task(wanted)
        with compiled(self.policy, wanted.compile):
            warming = self._warm_up(task, wanted)
            reset_peak(self.device)
            variant = make_variant(wanted.variant, task)
            stepping = Stepping(variant.optimizer, self.device)
            found = iterate(task, variant, 0)
        seconds = {**found.seconds, "total": sum(found.seconds.values())}
        seconds["optimizer"] = stepping.seconds()
        self.stepping = seconds["optimizer"] / task.optimizer_steps
        per_image = {phase: found.evaluations[phase] / task.images for phase in found.seconds}
        operations = task.images * self._per_image(per_image["rollout"], per_image["update"])
        self.rate = operations / 1e12 / (seconds["total"] - seconds["optimizer"])
        return {
            "variant": wanted.variant,
            "compile": wanted.compile,
            "images": task.images,
            "of": self.scale.samples,
            "steps": wanted.steps,
            "window": [task.window.start, task.window.stop],
            "optimizer_steps": task.optimizer_steps,
            "batches": [self.batches.rollout, self.batches.update],
            "model": {key: getattr(self.policy.config, key) for key in MODEL_KNOBS},
            "seconds": seconds,
            "warm_up": warming,
            "evaluations": {phase: per_image[phase] for phase in ("rollout", "update")},
            "tflop": operations / 1e12,
            "tflops": operations / 1e12 / seconds["total"],
            "memory_gib": memory(self.device),
        }

    def task(self, wanted: Wanted) -> Task:
        scale, policy = self.scale, self.policy
        start = 0 if wanted.variant == STAR else min(scale.start, wanted.steps - scale.window - 1)
        generator = torch.Generator().manual_seed(0)
        return Task(
            policy=policy,
            text=text_for(policy, 1),
            samples=wanted.samples,
            steps=wanted.steps,
            window=Window(start, start + scale.window),
            optimizer_steps=scale.optimizer_steps,
            advantages=torch.randn(wanted.samples, generator=generator).to(self.device),
            micro_batch=self.batches.rollout,
            update_batch=self.batches.update,
            seed=0,
            optimizer=frugal,
        )

    def _warm_up(self, task: Task, wanted: Wanted) -> float:
        """Evaluates every batch size that is new, with gradients if the update has it, and decodes;
        returns the seconds."""
        start = perf_counter()
        for count, trains in self._cold(task, wanted):
            evaluate(self.policy, count, trains)
            self.warm.add((wanted.compile, count, trains))
        count = 1 if wanted.variant == "published" else min(task.images, task.micro_batch)
        self.policy.decode(torch.zeros(count, *self.policy.latent_shape, device=self.device))
        synchronize(self.device)
        return perf_counter() - start

    def _cold(self, task: Task, wanted: Wanted) -> list[tuple[int, bool]]:
        """The batch sizes of an iteration that have not been evaluated yet."""
        sizes = sorted(batch_sizes(task, wanted.variant))
        return [size for size in sizes if (wanted.compile, *size) not in self.warm]

    def _expected(self, wanted: Wanted) -> float:
        """About the seconds that the iteration will take, with what warms up before it."""
        task = self.task(wanted)
        cold = self._cold(task, wanted)
        first = sum(count * self._per_image(float(not t), float(t)) for count, t in cold)
        seconds = (first + self._operations(wanted, task)) / 1e12 / self.rate
        if wanted.compile == "inductor":
            seconds += COMPILING * len({count for count, _ in cold})
        return seconds + task.optimizer_steps * self.stepping

    def _operations(self, wanted: Wanted, task: Task) -> float:
        """About as many as the iteration will take."""
        plan = task.plan(*TAILS[wanted.variant])
        images = task.images
        first, rest = plan.window.start + 1, plan.steps - plan.window.start - 1
        if wanted.variant == "published":
            return images * self._per_image(plan.steps, plan.window.size)
        shared = task.optimizer_steps / images
        return images * self._per_image(first / images + rest, plan.window.size - 1 + shared)

    def _per_image(self, rollout: float, update: float) -> float:
        knobs = self.policy.config
        return operations_per_picture(
            self.scale.products,
            rollout,
            update,
            train_all=knobs.train == "full",
            recomputed=1 / knobs.checkpoint_every if knobs.gradient_checkpointing else 0.0,
            with_reference=False,
        )


MODEL_KNOBS = (
    *("train", "weights", "compute_dtype", "gradient_checkpointing", "checkpoint_every"),
    *("attention", "lora_rank", "lora_targets"),
)


def make_variant(name: str, task: Task) -> Variant:
    return Published(task) if name == "published" else Ours(task, *TAILS[name])


def frugal(parameters: list[nn.Parameter]) -> tuple[Optimizer, LambdaLR]:
    """8-bit AdamW's work, without an effect."""
    optimizer = FrugalAdamW(parameters, 0.0, (0.9, 0.999), 0.0, eight_bit=True, seed=0)
    return optimizer, LambdaLR(optimizer, lambda _: 1.0)


def batch_sizes(task: Task, variant: str) -> set[tuple[int, bool]]:
    """The batch sizes of an iteration, and whether a backward pass follows."""
    if variant == "published":
        return {(1, False), (1, True)}
    prompts, part = len(task.text), task.images // task.optimizer_steps
    evaluated = prompts + part * (task.window.size - 1)  # by one optimizer step
    rollout = {*sizes_of(prompts, task.micro_batch), *sizes_of(task.images, task.micro_batch)}
    update = sizes_of(evaluated, task.update_batch or task.micro_batch)
    return {(size, False) for size in rollout} | {(size, True) for size in update}


def sizes_of(count: int, most: int) -> set[int]:
    """The sizes of the parts when ``count`` is split into parts of ``most`` and a last one."""
    return {size for size in (min(most, count), count % most) if size}


def evaluate(policy: DiffusersPolicy, count: int, trains: bool) -> None:
    """One evaluation of ``count`` samples, with a backward pass if ``trains``."""
    x = torch.randn(count, *policy.latent_shape, device=policy.device)
    sigma = x.new_full((count,), 0.5)
    text = text_for(policy, 1).repeat_each(count)
    with torch.set_grad_enabled(trains):
        found = policy.velocity(policy.module)(x, sigma, text)
    if trains:
        found.square().mean().backward()
        policy.module.zero_grad(set_to_none=True)


@contextmanager
def compiled(policy: DiffusersPolicy, how: str) -> Iterator[None]:
    """Context in which the policy's blocks are compiled, unless ``how`` is "off"."""
    if how == "off":
        yield
        return
    compile_blocks(policy.module, how)
    try:
        yield
    finally:
        for block in repeated_blocks(policy.module):
            del block.forward


class Stepping:
    """The time that the steps of an optimizer take, on the device."""

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self.clock = Clock(device)
        self.marks: list[Any] = []
        optimizer.register_step_pre_hook(lambda *_: self.marks.append(self.clock.now()))
        optimizer.register_step_post_hook(lambda *_: self.marks.append(self.clock.now()))

    def seconds(self) -> float:
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        return sum(self.clock.seconds(*pair) for pair in pairs)


# ---- memory


def reset_peak(device: torch.device, empty: bool = False) -> None:
    """Begins to look for the peak anew; ``empty`` also gives back what is reserved and unused."""
    gc.collect()
    if device.type == "cuda":
        if empty:
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> dict[str, float]:
    """GiB: peaks of what tensors held and of what was reserved for them; what CUDA itself took."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated": torch.cuda.max_memory_allocated(device) / GIB,
        "reserved": torch.cuda.max_memory_reserved(device) / GIB,
        "context": (total - free - torch.cuda.memory_reserved(device)) / GIB,
        "card": total / GIB,
    }
