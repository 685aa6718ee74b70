"""Times one MixGRPO iteration: the published way of computing it against this repository's.

    python scripts/benchmark/speed.py --help

Published: one image at a time, all latents kept, a log-probability in every step, one sample and
one window step per backward, one image per decoding. Ours: mixgrpo.rollout and
mixgrpo.methods.grpo. In between, "batched": computed in the same batches as ours, but every sample
is evaluated at every step, although the samples of a prompt share their initial noise. All get the
same model, prompts, noise and advantages, and the gradients of their first optimizer step are
compared; the exit code is 1 if they differ. The optimizer's learning rate is 0, so that every
iteration of every variant starts from the same weights.

With --train, the same iteration is also timed as `python -m mixgrpo train` reports it, in a process
of its own with the same environment: what the training loop adds shows there.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Protocol, cast

from mixgrpo.commands.before_torch import prepare
from mixgrpo.files.disk import write_text_whole

if __name__ == "__main__":
    prepare()  # as the train command does, before torch is imported

import torch
from environment import ROOT, environment, output_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mixgrpo.config import ModelConfig, UpdateConfig
from mixgrpo.engines.data_parallel import DataParallel
from mixgrpo.maths.dpm_solver import make_solver
from mixgrpo.maths.schedule import flash_sigmas, step_at
from mixgrpo.maths.transitions import euler, log_prob, log_ratio, make_transition, sample
from mixgrpo.methods.grpo import Objective, update
from mixgrpo.models.flux import FLUX
from mixgrpo.models.policy import DiffusersPolicy
from mixgrpo.noise import Noise
from mixgrpo.rollout import SamplingPlan, rollout
from mixgrpo.types import TextEmbedding, Trajectory, Velocity, Window

SHAPES_FLUX = ROOT / "data" / "shapes" / "flux"
PHASES = ("rollout", "decode", "update")
SHIFT, ETA, CLIP = 3.0, 0.7, 1e-4
FLASH_RATIO = 0.4
TOLERANCE = 1e-3
MAX_NORM = 1e9  # clips nothing: clipping would hide a wrong scale of the gradient
MEGABYTE = 2**20


def frozen_adamw(parameters: list[nn.Parameter]) -> tuple[Optimizer, LambdaLR]:
    """All of AdamW's work, without an effect."""
    optimizer = AdamW(parameters, lr=0.0)
    return optimizer, LambdaLR(optimizer, lambda _: 1.0)


@dataclass(frozen=True)
class Task:
    """What every variant computes.

    Attributes:
        policy: the model; all transformer weights are trained.
        text: the P prompts.
        samples: images per prompt, G.
        steps: denoising steps T.
        window: the stochastic, trained steps.
        optimizer_steps: per iteration; each takes an equal part of every group.
        advantages: [P*G].
        micro_batch: ours only: model evaluations and decoded images in one pass.
        seed: of the noise.
        optimizer: makes it, and its schedule.
        update_batch: ours only: evaluations in one pass of the update; 0 for ``micro_batch``.
    """

    policy: DiffusersPolicy
    text: TextEmbedding
    samples: int
    steps: int
    window: Window
    optimizer_steps: int
    advantages: Tensor
    micro_batch: int
    seed: int
    optimizer: Callable[[list[nn.Parameter]], tuple[Optimizer, LambdaLR]] = frozen_adamw
    update_batch: int = 0

    @property
    def images(self) -> int:
        return len(self.text) * self.samples

    def noise(self, iteration: int) -> Noise:
        return Noise(
            seed=self.seed,
            iteration=iteration,
            prompts=range(len(self.text)),
            samples=self.samples,
            shape=self.policy.latent_shape,
            shared=True,
            device=self.policy.device,
        )

    def plan(self, solver: str = "euler", ratio: float = 1.0) -> SamplingPlan:
        sigmas = flash_sigmas(self.steps, SHIFT, self.window, ratio)
        return SamplingPlan(
            sigmas=sigmas,
            window=self.window,
            transition=make_transition("flow_sde", ETA),
            solver=partial(make_solver, solver, sigmas, 2, "midpoint"),
        )


class Variant(Protocol):
    """A way to compute an iteration; ``kept`` is whatever its rollout leaves for the update."""

    velocity: Counted
    optimizer: Optimizer

    def rollout(self, noise: Noise) -> Any: ...

    def decode(self, kept: Any) -> None: ...

    def update(self, kept: Any) -> None: ...

    def kept_bytes(self, kept: Any) -> int:
        """Of the latents that are kept until the update ends."""
        ...


class Counted:
    """A velocity that counts its evaluations."""

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = velocity
        self.evaluations = 0

    def __call__(self, x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
        self.evaluations += len(x)
        return self.velocity(x, sigma, text)


# --- the published way ----------------------------------------------------------------------------


@dataclass(frozen=True)
class PublishedImage:
    """All T+1 latents [1, S, C] of an image, and a log-probability [1] of every step."""

    latents: list[Tensor]
    log_probs: list[Tensor]


class Published:
    """One image at a time, one window step at a time; nothing is shared."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.plan = task.plan()
        self.velocity = Counted(task.policy.velocity(task.policy.module))
        self.parameters = [p for p in task.policy.module.parameters() if p.requires_grad]
        self.optimizer, _ = task.optimizer(self.parameters)

    @torch.no_grad()
    def rollout(self, noise: Noise) -> list[PublishedImage]:
        initial = noise.initial()  # [P, S, C]
        return [
            self._image(initial[row // noise.samples][None], noise, row)
            for row in range(self.task.images)
        ]

    def _image(self, x: Tensor, noise: Noise, row: int) -> PublishedImage:
        latents, log_probs = [x], []
        for i in range(self.plan.steps):
            step, v = step_at(self.plan.sigmas, i), self._velocity(x, i, row)
            normal = self.plan.transition(x, v, step)
            if i in self.plan.window:
                x = sample(normal, noise.at(i, range(row, row + 1)))
            else:
                x = euler(x, v, step)
            latents.append(x)
            log_probs.append(log_prob(x, normal))
        return PublishedImage(latents, log_probs)

    def _velocity(self, x: Tensor, i: int, row: int) -> Tensor:
        prompt = row // self.task.samples
        sigma = x.new_full((1,), float(self.plan.sigmas[i]))
        return self.velocity(x, sigma, self.task.text[prompt : prompt + 1])

    def decode(self, kept: list[PublishedImage]) -> None:
        for image in kept:
            self.task.policy.decode(image.latents[-1])

    def update(self, kept: list[PublishedImage]) -> None:
        for rows in self._parts():
            for row, i in itertools.product(rows, self.plan.window.steps):
                loss = self.loss(kept[row], row, i)
                (loss.sum() / (len(rows) * self.plan.window.size)).backward()
            nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _parts(self) -> Iterator[list[int]]:
        """The images whose gradients each optimizer step accumulates."""
        samples, prompts = self.task.samples, len(self.task.text)
        share = samples // self.task.optimizer_steps
        for start in range(0, samples, share):
            yield [p * samples + start + s for p in range(prompts) for s in range(share)]

    def loss(self, image: PublishedImage, row: int, i: int) -> Tensor:
        """The clipped loss [1] of one image's window step i."""
        x, x_next = image.latents[i], image.latents[i + 1]
        step = step_at(self.plan.sigmas, i)
        normal = self.plan.transition(x, self._velocity(x, i, row), step)
        ratio = torch.exp(log_prob(x_next, normal) - image.log_probs[i])
        advantage = self.task.advantages[row]
        return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP, 1 + CLIP))

    def kept_bytes(self, kept: list[PublishedImage]) -> int:
        return sum(latent.nbytes for image in kept for latent in image.latents)


# --- ours -----------------------------------------------------------------------------------------


class Ours:
    """mixgrpo.rollout and mixgrpo.methods.grpo with the DataParallel engine."""

    def __init__(self, task: Task, solver: str = "euler", ratio: float = 1.0) -> None:
        self.task = task
        self.plan = task.plan(solver, ratio)
        self.engine = DataParallel(task.policy.module, task.policy.device, task.optimizer)
        self.optimizer = self.engine.optimizer
        self.velocity = Counted(task.policy.velocity(self.engine.module))
        self.objective = Objective(self.plan.transition, log_ratio, CLIP)
        self.knobs = UpdateConfig(
            optimizer_steps=task.optimizer_steps,
            micro_batch=task.update_batch or task.micro_batch,
            clip=CLIP,
            max_grad_norm=MAX_NORM,
        )

    def rollout(self, noise: Noise) -> Trajectory:
        return rollout(self.velocity, self.task.text, self.plan, noise, self.task.micro_batch)

    def decode(self, kept: Trajectory) -> None:
        for latents in kept.final.split(self.task.micro_batch):
            self.task.policy.decode(latents)

    def update(self, kept: Trajectory) -> None:
        update(self.engine, self.velocity, kept, self.task.advantages, self.objective, self.knobs)

    def kept_bytes(self, kept: Trajectory) -> int:
        return kept.states.nbytes + kept.old_means.nbytes + kept.final.nbytes


class _Unshared:
    """Noise of which samples start from equal initial noise, without the sampler knowing it."""

    shared = False

    def __init__(self, noise: Noise) -> None:
        self.samples = noise.samples
        self.at = noise.at
        self._noise = noise

    def initial(self) -> Tensor:
        """[B, S, C]."""
        return self._noise.initial().repeat_interleave(self.samples, 0)


class Batched(Ours):
    """As ours, but nothing is shared: every sample is evaluated at every step."""

    def rollout(self, noise: Noise) -> Trajectory:
        return super().rollout(cast(Noise, _Unshared(noise)))


VARIANTS: dict[str, Callable[[Task], Variant]] = {
    "published": Published,
    "batched": Batched,
    "MixGRPO": Ours,
    "MixGRPO-Flash": partial(Ours, solver="dpm", ratio=FLASH_RATIO),
}


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """One variant: medians of seconds, evaluations per image, and megabytes.

    ``peak_mb`` is what it used above the loaded model (gradients and optimizer state included),
    NaN where the system does not tell.
    """

    seconds: dict[str, float]
    evaluations: dict[str, float]
    peak_mb: float
    latents_mb: float


def measure(task: Task, make: Callable[[Task], Variant], iterations: int) -> Measurement:
    """Runs iterations 0 to ``iterations``; the first warms up and is not timed."""
    memory = PeakMemory(task.policy.device)
    variant = make(task)
    runs = [iterate(task, variant, index) for index in range(iterations + 1)]
    timed = [{**run.seconds, "total": sum(run.seconds.values())} for run in runs[1:]]
    evaluations = runs[-1].evaluations
    return Measurement(
        seconds={phase: median(run[phase] for run in timed) for phase in timed[0]},
        evaluations={phase: evaluations[phase] / task.images for phase in ("rollout", "update")},
        peak_mb=memory.peak() / MEGABYTE,
        latents_mb=runs[-1].latents_bytes / MEGABYTE,
    )


@dataclass(frozen=True)
class Iteration:
    """Phase -> seconds and model evaluations; the size of the latents kept between them."""

    seconds: dict[str, float]
    evaluations: dict[str, int]
    latents_bytes: int


def iterate(task: Task, variant: Variant, index: int) -> Iteration:
    """One iteration, phase by phase."""
    seconds, evaluations = {}, {}
    given: Any = task.noise(index)
    for phase in PHASES:
        before = variant.velocity.evaluations
        result, seconds[phase] = _timed(partial(getattr(variant, phase), given), task.policy.device)
        evaluations[phase] = variant.velocity.evaluations - before
        if phase == "rollout":
            given = result  # what the later phases work on
    return Iteration(seconds, evaluations, variant.kept_bytes(given))


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    synchronize(device)
    start = perf_counter()
    result = work()
    synchronize(device)
    return result, perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """The most memory in use since it was made, above what was in use then.

    On a GPU that is allocated tensors; on the CPU the process's resident memory, as Linux counts.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = float(torch.cuda.memory_allocated(device))
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # else freed memory would count as in use
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.before = _status_bytes("VmRSS")

    def peak(self) -> float:
        """In bytes; NaN where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return _status_bytes("VmHWM") - self.before


def _status_bytes(name: str) -> float:
    status = Path("/proc/self/status")
    found = re.search(rf"{name}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * float(found[1]) if found else math.nan


# --- the training loop ----------------------------------------------------------------------------


def brightness(images: Tensor, texts: list[str]) -> Tensor:
    """A reward that takes no time: [B] means of images [B, 3, H, W]."""
    return images.mean((1, 2, 3))


def train_seconds(chosen: argparse.Namespace) -> dict[str, float]:
    """Phase -> median seconds of an iteration of ``python -m mixgrpo train`` on the same task."""
    with tempfile.TemporaryDirectory() as place:
        folder, prompts = Path(place, "run"), Path(place, "prompts.txt")
        prompts.write_text("\n".join(captions(chosen.prompts)) + "\n")
        done = subprocess.run(
            [sys.executable, "-m", "mixgrpo", "train", *_train_options(chosen, folder, prompts)],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"error: the training failed: {done.stderr.strip()[-2000:]}")
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "update/loss" in record][1:]
    seconds = {phase: [record[f"seconds/{phase}"] for record in records] for phase in PHASES}
    totals = [sum(parts) for parts in zip(*seconds.values(), strict=True)]
    return {**{phase: median(found) for phase, found in seconds.items()}, "total": median(totals)}


def _train_options(chosen: argparse.Namespace, folder: Path, prompts: Path) -> list[str]:
    knobs = {
        "run.folder": folder,
        "run.iterations": chosen.iterations + 1,
        "run.seed": chosen.seed,
        "model.path": chosen.model,
        "model.train": "full",
        "model.compute_dtype": chosen.dtype,
        "model.height": chosen.size,
        "model.width": chosen.size,
        "model.text_length": chosen.text_length,
        "model.gradient_checkpointing": str(chosen.gradient_checkpointing).lower(),
        "sampling.steps": chosen.steps,
        "sampling.shift": SHIFT,
        "sampling.eta": ETA,
        "sampling.micro_batch": chosen.micro_batch,
        "sampling.decode_batch": chosen.micro_batch,
        "window.size": chosen.window,
        "window.start": chosen.start,
        "window.strategy": "frozen",
        "batch.prompts_file": prompts,
        "batch.prompts": chosen.prompts,
        "batch.samples": chosen.samples,
        "rewards.brightness.kind": "speed:brightness",
        "update.optimizer_steps": chosen.optimizer_steps,
        "update.micro_batch": chosen.micro_batch,
        "update.clip": CLIP,
        "update.max_grad_norm": MAX_NORM,
        "ema.decay": 0,
        "validation.before": "false",
        "validation.every": 0,
        "validation.prompts_file": prompts,
        "validation.prompts": 1,
        "validation.steps": 2,
        "log.progress": "false",
        "log.wandb": "disabled",
    }
    return [word for knob, value in knobs.items() for word in (f"--{knob}", str(value))]


# --- the same gradients ---------------------------------------------------------------------------


def gradient_differences(task: Task) -> dict[str, float]:
    """Our variants' first gradients against the published way's, relative, in float32."""
    policy, dtype = task.policy, task.policy.compute_dtype
    policy.compute_dtype = torch.float32
    try:
        found = {name: first_gradient(task, make) for name, make in VARIANTS.items()}
    finally:
        policy.compute_dtype = dtype
    expected = found.pop("published")
    return {name: float((g - expected).norm() / expected.norm()) for name, g in found.items()}


def first_gradient(task: Task, make: Callable[[Task], Variant]) -> Tensor:
    """All gradients at the first optimizer step of iteration 0, as one vector."""
    variant = make(task)
    kept: list[Tensor] = []

    def keep(optimizer: Optimizer, args: object, kwargs: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not kept:
            kept.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))

    variant.optimizer.register_step_pre_hook(keep)
    variant.update(variant.rollout(task.noise(0)))
    return kept[0]


# --- reporting ------------------------------------------------------------------------------------


def table(measurements: dict[str, Measurement], iterations: int) -> str:
    """A line per variant, then how many times more the published way takes."""
    columns = (*PHASES, "total")
    lines = [
        f"{'':<24}{f'seconds per iteration, median of {iterations}':^36}"
        f"{'evaluations/image':^20}{'memory, MB':^20}",
        _row("", columns, ("rollout", "update"), ("peak", "latents")),
    ]
    for name, found in measurements.items():
        seconds = [f"{found.seconds[c]:.3f}" for c in columns]
        evaluations = [f"{value:.2f}" for value in found.evaluations.values()]
        lines.append(
            _row(name, seconds, evaluations, (f"{found.peak_mb:.0f}", f"{found.latents_mb:.2f}"))
        )
    for name, ratio in ratios(measurements).items():
        seconds = [f"{ratio['seconds'][c]:.2f}x" for c in columns]
        evaluations = [f"{value:.2f}x" for value in ratio["evaluations"].values()]
        memory = (f"{ratio['peak_mb']:.2f}x", f"{ratio['latents_mb']:.2f}x")
        lines.append(_row(f"published/{name}", seconds, evaluations, memory))
    return "\n".join(lines)


def train_row(trained: dict[str, float], ours: dict[str, float]) -> str:
    """The train command's seconds, and their ratio to this program's own of MixGRPO."""
    columns = (*PHASES, "total")
    seconds = "".join(f"{trained[c]:>9.3f}" for c in columns)
    over = "".join(f"{f'{trained[c] / ours[c]:.2f}x':>9}" for c in columns)
    return f"{'train command':<24}{seconds}\n{'train command/MixGRPO':<24}{over}"


def _row(name: str, *groups: Sequence[str]) -> str:
    widths = (9, 10, 10)
    cells = [f"{c:>{w}}" for g, w in zip(groups, widths, strict=True) for c in g]
    return f"{name:<24}{''.join(cells)}"


def ratios(measurements: dict[str, Measurement]) -> dict[str, dict[str, Any]]:
    """Published over each of ours: above 1, ours takes less."""
    base = vars(measurements["published"])

    def over(a: Any, b: Any) -> Any:
        return {key: a[key] / b[key] for key in a} if isinstance(a, dict) else a / b

    return {
        name: {key: over(base[key], value) for key, value in vars(found).items()}
        for name, found in measurements.items()
        if name != "published"
    }


def plain(value: Any) -> Any:
    """As JSON can hold it: NaN becomes null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


# --- the command ----------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group().add_argument
    which("--model", help="FLUX pipeline folder; default: data/shapes/flux if it is there")
    which("--random-small", action="store_true", help="a small untrained model instead")
    defaults = {"prompts": 4, "steps": 16, "start": 4, "iterations": 2, "micro_batch": 96}
    add_task_options(parser, **defaults, size=64)
    add("--text-length", type=int, default=16, help="tokens that the T5 encoder sees")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--gradient-checkpointing", action="store_true")
    add("--seed", type=int, default=0)
    add("--train", action="store_true", help="also time the train command on the same task")
    chosen = parser.parse_args(arguments)
    if chosen.model is None and SHAPES_FLUX.is_dir() and not chosen.random_small:
        chosen.model = str(SHAPES_FLUX)
    for complaint in task_complaints(chosen):
        parser.error(complaint)
    if chosen.train and not chosen.model:
        parser.error("--train needs a model folder: name one with --model")
    return chosen


def add_task_options(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """What an iteration consists of, where it runs, and where the results go."""
    add = partial(parser.add_argument, type=int)
    add("--prompts")
    add("--samples", default=12, help="images per prompt")
    add("--steps", help="denoising steps")
    add("--window", default=4, help="window size")
    add("--start", help="the window's first step")
    add("--optimizer-steps", default=4, help="per iteration")
    add("--iterations", help="timed iterations, after one that warms up")
    add("--micro-batch", help="evaluations in one pass; ours only")
    add("--size", help="height and width of the images in pixels")
    add("--device", type=str, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=output_file, help="also write the results to this file")
    parser.set_defaults(**defaults)


def task_complaints(chosen: argparse.Namespace) -> Iterator[str]:
    """What cannot be an iteration, a sentence each."""
    if chosen.start + chosen.window > chosen.steps - 1:
        yield f"the window must end before the last of {chosen.steps} steps"
    if chosen.samples % chosen.optimizer_steps:
        yield (
            f"--samples {chosen.samples} must be a multiple of --optimizer-steps "
            f"{chosen.optimizer_steps}"
        )
    if min(chosen.prompts, chosen.iterations, chosen.window, chosen.micro_batch) < 1:
        yield "--prompts, --iterations, --window and --micro-batch must be at least 1"


def load_policy(chosen: argparse.Namespace) -> DiffusersPolicy:
    config = ModelConfig(
        path=chosen.model or "",
        train="full",
        compute_dtype=chosen.dtype,
        height=chosen.size,
        width=chosen.size,
        text_length=chosen.text_length,
        gradient_checkpointing=chosen.gradient_checkpointing,
    )
    device = torch.device(chosen.device)
    if chosen.model:
        return DiffusersPolicy.load(config, device, chosen.seed)
    from mixgrpo.shapes.architecture import flux_pipeline

    pipeline = flux_pipeline(chosen.seed)
    pipeline.vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    if chosen.gradient_checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
    return DiffusersPolicy(FLUX, pipeline, config, device)


def captions(count: int) -> list[str]:
    kinds = itertools.product(("red", "blue", "green", "yellow"), ("circle", "square", "cross"))
    endless = itertools.cycle(f"a {c} {s} on a gray background" for c, s in kinds)
    return list(itertools.islice(endless, count))


def make_task(chosen: argparse.Namespace) -> Task:
    policy = load_policy(chosen)
    text = policy.encode(captions(chosen.prompts))
    count = chosen.prompts * chosen.samples
    advantages = torch.randn(count, generator=torch.Generator().manual_seed(chosen.seed))
    return Task(
        policy=policy,
        text=TextEmbedding(text.tokens.float(), text.pooled.float()),
        samples=chosen.samples,
        steps=chosen.steps,
        window=Window(chosen.start, chosen.start + chosen.window),
        optimizer_steps=chosen.optimizer_steps,
        advantages=advantages.to(policy.device),
        micro_batch=chosen.micro_batch,
        seed=chosen.seed,
    )


def describe(task: Task, chosen: argparse.Namespace) -> str:
    weights = sum(p.numel() for p in task.policy.module.parameters())
    return (
        f"{chosen.prompts} prompts x {chosen.samples} images of {chosen.size}x{chosen.size}, "
        f"{chosen.steps} steps, window {task.window}, {chosen.optimizer_steps} optimizer steps; "
        f"{chosen.model or 'untrained model'}, {weights / 1e6:.1f}M weights, {chosen.dtype}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if the gradients differ."""
    chosen = parse(arguments)
    task = make_task(chosen)
    about = {**environment(task.policy.device), "task": describe(task, chosen)}
    print("\n".join(f"{name + ':':<10} {text}" for name, text in about.items()), flush=True)

    differences = gradient_differences(task)
    is_equal = all(difference <= TOLERANCE for difference in differences.values())
    listed = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    print(
        f"gradients: {'equal' if is_equal else 'DIFFERENT'} at the first optimizer step, relative "
        f"difference to the published way in float32: {listed}\n",
        flush=True,
    )
    found = {name: measure(task, make, chosen.iterations) for name, make in VARIANTS.items()}
    print(table(found, chosen.iterations))
    trained = train_seconds(chosen) if chosen.train else {}
    if trained:
        print(train_row(trained, found["MixGRPO"].seconds))
    if chosen.json:
        results = {
            **about,
            "gradient_difference": differences,
            "variants": {name: vars(each) for name, each in found.items()},
            "ratios": ratios(found),
            "train": trained,
        }
        write_text_whole(chosen.json, json.dumps(plain(results), indent=1) + "\n")
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
