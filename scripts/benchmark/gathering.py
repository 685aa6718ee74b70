"""Bytes that each process receives per iteration, by how often weights are gathered.

    python -m torch.distributed.run --standalone --nproc_per_node 2 scripts/benchmark/gathering.py

Runs one MixGRPO iteration (rollout and update, no rewards) of a small untrained FLUX with every way
to gather and reduce. Collective operations on tensors are counted as they are called, as if in a
ring of n processes: gathering or reduce-scattering B bytes moves B (n-1)/n to each process, and
all-reducing moves twice that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from time import perf_counter
from typing import Any

import torch
from environment import environment, output_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixgrpo.config import EngineConfig, ModelConfig, UpdateConfig
from mixgrpo.engines import Engine, Network
from mixgrpo.engines.data_parallel import DataParallel
from mixgrpo.engines.distributed import process_group
from mixgrpo.engines.fsdp import FullySharded
from mixgrpo.files.disk import write_text_whole
from mixgrpo.maths.dpm_solver import make_solver
from mixgrpo.maths.schedule import make_sigmas
from mixgrpo.maths.transitions import log_ratio, make_transition
from mixgrpo.methods.grpo import Objective, update
from mixgrpo.models.flux import FLUX
from mixgrpo.models.policy import DiffusersPolicy
from mixgrpo.noise import Noise
from mixgrpo.rollout import SamplingPlan, rollout
from mixgrpo.shapes.architecture import flux_pipeline
from mixgrpo.types import TextEmbedding, Velocity, Window

SHIFT, ETA, CLIP = 3.0, 0.7, 1e-4
TEXT_LENGTH = 16
GATHERED, REDUCED = "gathered", "reduced"
WAYS = {
    "fsdp": [("once", "once"), ("rollout", "once"), ("evaluation", "once"),
             ("evaluation", "micro_batch")],
    "deepspeed": [("once", "once"), ("evaluation", "micro_batch")],
    "ddp": [("-", "once")],
}  # fmt: skip


class Traffic(TorchDispatchMode):
    """Counts the bytes that collective operations move, by the phase in which they are called."""

    KINDS = (("allgather", GATHERED), ("reduce_scatter", REDUCED), ("alltoall", REDUCED))

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.share = (world_size - 1) / world_size
        self.phase = ""
        self.bytes: dict[tuple[str, str], float] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "c10d":
            self._count(name, args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        tensors = [[leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)]
                   for arg in args[:2]]  # fmt: skip
        largest = max(sum(sizes) for sizes in tensors)  # of output and input, the whole one
        for part, kind in self.KINDS:
            if part in name.replace("_base", ""):
                self._add(kind, largest)
        if name.startswith("allreduce"):
            self._add(REDUCED, 2 * largest)

    def _add(self, kind: str, size: float) -> None:
        key = (self.phase, kind)
        self.bytes[key] = self.bytes.get(key, 0) + size * self.share

    @contextmanager
    def counting(self, phase: str) -> Iterator[None]:
        self.phase = phase
        with self:
            yield


@dataclass(frozen=True)
class Found:
    """One way: MB that a process receives in an iteration, and model evaluations of a process."""

    engine: str
    gather: str
    reduce: str
    rollout_gathered: float
    update_gathered: float
    reduced: float
    evaluations: int
    seconds: float


def make_engine(
    kind: str, knobs: EngineConfig, policy: DiffusersPolicy, device: torch.device
) -> Engine:
    network = Network(policy.module, policy.blocks(policy.module), policy.compute_dtype)
    if kind == "fsdp":
        return FullySharded(network, knobs, device, frozen_adamw)
    if kind == "deepspeed":
        from mixgrpo.engines.zero import Zero

        return Zero(network, knobs, device, frozen_adamw)
    return DataParallel(policy.module, device, frozen_adamw)


def frozen_adamw(parameters: list[nn.Parameter]) -> tuple[Optimizer, LRScheduler]:
    optimizer = AdamW(parameters, lr=0.0)
    return optimizer, LambdaLR(optimizer, lambda _: 1.0)


class Counted:
    """A velocity that counts its forward passes."""

    def __init__(self, velocity: Velocity) -> None:
        self.velocity, self.calls = velocity, 0

    def __call__(self, x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
        self.calls += 1
        return self.velocity(x, sigma, text)


def measure(chosen: argparse.Namespace, kind: str, gather: str, reduce: str, device: Any) -> Found:
    """Measures the second of two iterations, because the first initialises the engines."""
    model = ModelConfig(height=64, width=64, compute_dtype=chosen.dtype, text_length=TEXT_LENGTH)
    policy = DiffusersPolicy(FLUX, flux_pipeline(), model, device)
    policy.pipeline.transformer.requires_grad_(True).train()
    knobs = EngineConfig() if kind == "ddp" else EngineConfig(gather=gather, reduce=reduce)  # type: ignore[arg-type]
    engine = make_engine(kind, knobs, policy, device)
    velocity = Counted(policy.velocity(engine.module))
    sigmas = make_sigmas(chosen.steps, SHIFT)
    plan = SamplingPlan(
        sigmas, Window(1, 1 + chosen.window), make_transition("flow_sde", ETA),
        lambda: make_solver("euler", sigmas, 2),
    )  # fmt: skip
    noise = Noise(0, 0, [engine.rank], chosen.samples, policy.latent_shape, True, device)
    text = policy.encode(["a red circle on a gray background"])
    advantages = torch.linspace(-1, 1, chosen.samples, device=device)
    objective = Objective(plan.transition, log_ratio, CLIP)
    learning = UpdateConfig(optimizer_steps=2, micro_batch=chosen.micro_batch)
    for _ in range(2):
        traffic, velocity.calls, start = Traffic(engine.world_size), 0, perf_counter()
        with traffic.counting("rollout"), engine.gathered():
            kept = rollout(velocity, text, plan, noise, chosen.micro_batch)
        with traffic.counting("update"):
            update(engine, velocity, kept, advantages, objective, learning)
    return Found(
        *(kind, gather, reduce),
        rollout_gathered=traffic.bytes.get(("rollout", GATHERED), 0.0) / 1e6,
        update_gathered=traffic.bytes.get(("update", GATHERED), 0.0) / 1e6,
        reduced=traffic.bytes.get(("update", REDUCED), 0.0) / 1e6,
        evaluations=velocity.calls,
        seconds=perf_counter() - start,
    )


HEADS = ("engine", "gather", "reduce", "rollout MB", "update MB", "reduced MB", "passes", "s")
ROW = "{:>10} {:>11} {:>12} {:>11} {:>10} {:>11} {:>7} {:>6}"


def row(found: Found) -> str:
    moved = (found.rollout_gathered, found.update_gathered, found.reduced)
    return ROW.format(
        *(found.engine, found.gather, found.reduce),
        *(f"{value:.1f}" for value in moved),
        *(found.evaluations, f"{found.seconds:.1f}"),
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--engines", nargs="+", choices=list(WAYS), default=["fsdp", "ddp"])
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--steps", type=int, default=8)
    add("--window", type=int, default=2)
    add("--samples", type=int, default=4, help="samples of the one prompt of each process")
    add("--micro-batch", type=int, default=2, help="samples per model evaluation")
    add("--json", type=output_file, help="also write the results to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    with process_group(1) as process:
        first = process.rank == 0
        if process.world_size == 1:
            raise SystemExit(f"one process gathers nothing; start several:\n{__doc__}")
        about = environment(process.device)
        parameters = sum(p.numel() for p in flux_pipeline().transformer.parameters())
        if first:
            print("\n".join(f"{key}: {value}" for key, value in about.items()))
            print(f"task: {process.world_size} processes, {parameters / 1e6:.2f}M weights, "
                  f"{chosen.dtype}, {chosen.samples} samples, {chosen.steps} steps, 2 optimizer "
                  f"steps\n\n{ROW.format(*HEADS)}")  # fmt: skip
        ways = chain.from_iterable([(kind, *way) for way in WAYS[kind]] for kind in chosen.engines)
        results = []
        for kind, gather, reduce in ways:
            results.append(measure(chosen, kind, gather, reduce, process.device))
            if first:
                print(row(results[-1]), flush=True)
    if chosen.json and first:
        found = [asdict(result) for result in results]
        write_text_whole(chosen.json, json.dumps({**about, "results": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
