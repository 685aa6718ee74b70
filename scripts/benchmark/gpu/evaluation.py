"""One evaluation: attention backends, batch sizes, recomputing, and where its time goes.

Every time is that of an evaluation for one image: a batch's time divided by its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gpu.iterations import compiled, evaluate, memory, reset_peak
from gpu.job import Job, main
from gpu.machine import seconds_of
from gpu.models import FULL, SMALL, Scale, build, text_for
from mixgrpo.devices import deterministic
from mixgrpo.models.policy import DiffusersPolicy, recompute

# A kernel belongs to the first kind of which its name has a word.
KINDS = {
    "compiled": ("triton_",),  # named after what they compute
    "attention": ("flash", "fmha", "sdpa", "attention", "mha_"),
    "matrix product": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "wgmma", "mm_", "addmm"),
    "norm": ("layer_norm", "rms_norm"),
    "copy": ("memcpy", "memset", "copy_kernel", "copy_"),
    "reduction": ("reduce",),
    "elementwise": ("elementwise", "vectorized", "mul", "add", "silu", "gelu"),
}


class Evaluations:
    """A LoRA policy whose evaluations are timed."""

    def __init__(self, job: Job, scale: Scale) -> None:
        self.job = job
        self.device = torch.device(job.device)
        knobs = scale.knobs(train="lora", compute_dtype="bfloat16", gradient_checkpointing=True)
        self.policy = build(scale, knobs, self.device)
        self.operations = scale.products

    def report(self, name: str, count: int, trains: bool, **choice: Any) -> None:
        """Times evaluations of ``count`` images; ``choice`` as for ``_time``."""
        if self.job.left() > 0:
            self.job.attempt(name, partial(self._time, count, trains, **choice))

    def _time(
        self,
        count: int,
        trains: bool,
        recompute_every: int = 1,
        backend: str = "native",
        repeatable: bool = False,
    ) -> dict[str, Any]:
        """Seconds for one image, of an evaluation alone or with its backward pass.

        Args:
            repeatable: use deterministic kernels, as ``run.deterministic`` does.
        """
        reset_peak(self.device)
        with (
            recomputing(self.policy, recompute_every),
            attention(self.policy, backend),
            deterministic(repeatable),
        ):
            work = partial(evaluate, self.policy, count, trains)
            seconds = seconds_of(work, self.device, repeats=2, warm_up=1) / count
            change = None if trains else gradients_change(self.policy, count)
        forward = self.operations.total
        operations = forward
        if trains:
            again = forward / recompute_every if recompute_every else 0.0
            operations = forward + again + self.operations.backward(train_all=False)
        return {
            "batch": count,
            "trains": trains,
            "backend": backend,
            "recompute_every": recompute_every,
            "seconds": seconds,
            "tflops": operations / 1e12 / seconds,
            "memory_gib": memory(self.device).get("allocated"),
            "gradients_change": change,
        }


def gradients_change(policy: DiffusersPolicy, count: int) -> float:
    """How much an evaluation differs when it is part of an update: the largest absolute difference
    over the largest absolute value. Unless it is 0, the ratio is not exactly 1 before an update."""
    x = torch.randn(count, *policy.latent_shape, device=policy.device)
    text, sigma = text_for(policy, 1).repeat_each(count), x.new_full((count,), 0.5)
    velocity = policy.velocity(policy.module)
    with torch.no_grad():
        without = velocity(x, sigma, text)
    difference = (velocity(x, sigma, text).detach() - without).abs().max()
    return float(difference / without.abs().max())


@contextmanager
def attention(policy: DiffusersPolicy, backend: str) -> Iterator[None]:
    """Context with another attention backend."""
    policy.module.set_attention_backend(backend)  # type: ignore[operator]
    try:
        yield
    finally:
        policy.module.set_attention_backend("native")  # type: ignore[operator]


@contextmanager
def recomputing(policy: DiffusersPolicy, every: int) -> Iterator[None]:
    """Context in which the backward pass recomputes every n-th block; 0 recomputes none."""
    transformer: Any = policy.module
    kept: Sequence[nn.Module] = policy.blocks(transformer)
    if every != 1:
        transformer.enable_gradient_checkpointing(recompute(kept[::every] if every else ()))
    try:
        yield
    finally:
        transformer.enable_gradient_checkpointing(recompute(kept))


@dataclass(frozen=True)
class Choices:
    """What is compared, each list in the order of its worth."""

    backends: tuple[str, ...]
    batch: int  # of the comparison of backends, and of the profiles
    rollout: tuple[int, ...]
    update: tuple[int, ...]
    recomputing: tuple[tuple[int, int], ...]  # every n-th block (0: none), and the batch
    compiled: tuple[int, ...]


FULL_CHOICES = Choices(
    backends=("native", "_native_cudnn", "_native_flash"),
    batch=3,
    rollout=(1, 12, 6),
    update=(10, 1, 5),
    recomputing=((4, 2), (0, 2), (2, 4)),
    compiled=(12,),
)
SMALL_CHOICES = Choices(
    backends=("native", "_native_math"),
    batch=2,
    rollout=(1, 2),
    update=(1, 2),
    recomputing=((0, 1), (2, 2)),
    compiled=(2,),
)


def perform(job: Job) -> None:
    bench = Evaluations(job, SMALL if job.small else FULL)
    chosen = SMALL_CHOICES if job.small else FULL_CHOICES
    compiler, policy = "eager" if job.small else "inductor", bench.policy
    phases = ((False, "rollout"), (True, "update"))
    for trains, phase in phases:
        for backend in chosen.backends:
            name = f"attention {backend}, {phase}, batch {chosen.batch}"
            bench.report(name, chosen.batch, trains, backend=backend)
        name = f"deterministic kernels, {phase}, batch {chosen.batch}"
        bench.report(name, chosen.batch, trains, repeatable=True)
    for counts in zip_longest(chosen.rollout, chosen.update):
        for count, (trains, phase) in zip(counts, phases, strict=True):
            if count:
                bench.report(f"{phase}, batch {count}", count, trains)
    for trains, phase in phases:
        work = partial(evaluate, policy, chosen.batch, trains)
        job.attempt(f"profile, {phase}", partial(profiled, work))
    for every, count in chosen.recomputing:
        name = f"update, batch {count}, recomputing {f'1 block in {every}' if every else 'none'}"
        bench.report(name, count, trains=True, recompute_every=every)
    with compiled(policy, compiler):
        for count in chosen.compiled:
            bench.report(f"rollout, batch {count}, {compiler}", count, trains=False)
        work = partial(evaluate, policy, chosen.compiled[0], False)
        job.attempt(f"profile, rollout, {compiler}", partial(profiled, work))


# ---- where the time goes


def profiled(work: Callable[[], None]) -> dict[str, Any]:
    """Milliseconds of the device by kind of kernel, its share of idle time, the longest kernels."""
    work()
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    # On a GPU not the host's side too: recording it would slow the launches down.
    wanted = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profile(activities=wanted) as found_by:
        work()
        if on_gpu:
            torch.cuda.synchronize()
    found: dict[str, float] = {}
    longest: list[tuple[float, str]] = []
    for event in found_by.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        is_kernel = str(event.device_type).endswith("CUDA") if on_gpu else True
        if not spent or not is_kernel or event.is_user_annotation:
            continue
        kind = kind_of(event.key)
        found[kind] = found.get(kind, 0.0) + spent / 1000
        longest.append((spent / 1000, event.key))
    busy = sum(found.values())
    wall = span_of(found_by) / 1000
    return {
        "milliseconds": dict(sorted(found.items(), key=lambda item: -item[1])),
        "busy": busy / wall if on_gpu and wall else None,
        "longest": [[spent, key[:120]] for spent, key in sorted(longest, reverse=True)[:8]],
    }


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(w in name for w in words)), "other")


def span_of(profiler: Any) -> float:
    """Microseconds from the start of the first kernel to the end of the last one."""
    kernels = [e for e in profiler.events() if str(e.device_type).endswith("CUDA")]
    if not kernels:
        return 0.0
    return max(e.time_range.end for e in kernels) - min(e.time_range.start for e in kernels)


if __name__ == "__main__":
    main("evaluation", perform)
