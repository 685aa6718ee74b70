"""What the tests of a GPU share: the Shapes model on a device, its rollouts and updates there."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from small import Recording, perturbed, small_plan
from tiny_world import ROOT
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from trainings import become_rank, free_port
from whole_states import whole

from mixgrpo.assembly import network_of
from mixgrpo.config import Config, EngineConfig, ModelConfig, UpdateConfig
from mixgrpo.engines import Engine
from mixgrpo.engines.adamw import FrugalAdamW
from mixgrpo.engines.data_parallel import DataParallel
from mixgrpo.engines.distributed import Process, process_group
from mixgrpo.engines.fsdp import FullySharded
from mixgrpo.engines.optimizer import make_optimizer
from mixgrpo.maths.transitions import log_ratio
from mixgrpo.methods.grpo import Objective, update
from mixgrpo.models.policy import DiffusersPolicy, recompute
from mixgrpo.noise import Noise
from mixgrpo.rollout import SamplingPlan, rollout
from mixgrpo.shapes.architecture import TEXT_LENGTH
from mixgrpo.types import TextEmbedding, Trajectory, Velocity

SHAPES = ROOT / "data" / "shapes"
CAPTIONS = [
    f"a {colour} {shape} on a {ground} background"
    for colour in ("red", "blue", "green")
    for shape in ("circle", "square")
    for ground in ("gray", "black")
]


def shapes_config(**knobs: Any) -> ModelConfig:
    given = {"compute_dtype": "float32", "gradient_checkpointing": False, "lora_rank": 4}
    return ModelConfig(
        path=str(SHAPES / "flux"),
        height=64,
        width=64,
        text_length=TEXT_LENGTH,
        **{**given, **knobs},
    )


def shapes_policy(device: torch.device, empty: bool = False, **knobs: Any) -> DiffusersPolicy:
    """The Shapes model. Its adapters are not zero, so that nothing of them is left out."""
    policy = DiffusersPolicy.load(shapes_config(**knobs), device, seed=7, empty=empty)
    if not empty and knobs.get("train") == "lora":
        perturbed(adapters_of(policy.module), 0.02)
    return policy


def adapters_of(module: nn.Module) -> nn.ParameterList:
    return nn.ParameterList([p for p in module.parameters() if p.requires_grad])


@contextlib.contextmanager
def recomputing(policy: DiffusersPolicy, wanted: bool) -> Iterator[None]:
    """Context with or without gradient checkpointing, on one policy: compiling it takes long."""
    transformer: Any = policy.module
    if wanted:
        transformer.enable_gradient_checkpointing(recompute(policy.blocks(transformer)))
    try:
        yield
    finally:
        transformer.disable_gradient_checkpointing()


def noise_on(
    device: torch.device, prompts: int, samples: int, shared: bool = True, seed: int = 5
) -> Noise:
    return Noise(seed, 0, range(prompts), samples, (16, 64), shared, device)


# ---- an iteration


@dataclass(frozen=True)
class Task:
    """A rollout and the update that follows it.

    Attributes:
        micro_batch: model evaluations per forward pass, of the rollout and of the update.
    """

    plan: SamplingPlan
    prompts: int = 2
    samples: int = 4
    shared: bool = True
    micro_batch: int = 12
    optimizer_steps: int = 1
    clip: float = 1e-4
    max_grad_norm: float = math.inf

    def rollout(self, velocity: Velocity, text: TextEmbedding, finished: Any = None) -> Trajectory:
        noise = noise_on(text.tokens.device, self.prompts, self.samples, self.shared)
        return rollout(velocity, text, self.plan, noise, self.micro_batch, finished)

    def update(
        self, engine: Engine, velocity: Velocity, trajectory: Trajectory, **objective: Any
    ) -> dict[str, Tensor]:
        """The advantages are drawn on the CPU, the same on every device."""
        generator = torch.Generator().manual_seed(3)
        advantages = torch.randn(len(trajectory), generator=generator)
        advantages = advantages.to(engine.device, non_blocking=True)
        aim = replace(Objective(self.plan.transition, log_ratio, self.clip), **objective)
        knobs = UpdateConfig(
            optimizer_steps=self.optimizer_steps,
            micro_batch=self.micro_batch,
            max_grad_norm=self.max_grad_norm,
        )
        return update(engine, velocity, trajectory, advantages, aim, knobs)


@dataclass(frozen=True)
class Course:
    """An iteration's numbers, on the CPU.

    Attributes:
        log_ratios: of every transition, of weights that are not those of the rollout.
        gradient: of the same weights, of all samples in one optimizer step.
    """

    trajectory: Trajectory
    images: Tensor
    log_ratios: Tensor
    gradient: Tensor


def course_of(policy: DiffusersPolicy, task: Task) -> Course:
    text = policy.encode(CAPTIONS[: task.prompts])
    trajectory = task.rollout(policy.velocity(policy.module), text)
    images = policy.decode(trajectory.final)
    seen: list[Tensor] = []

    def spying(*given: Tensor) -> Tensor:
        seen.append(log_ratio(*given))
        return seen[-1]

    other = copy.deepcopy(policy.module)
    perturbed(adapters_of(other), 2e-3)
    engine = Recording(other, device=policy.device)
    task.update(engine, policy.velocity(other), trajectory, log_ratio=spying)
    (gradient,) = engine.gradients
    return Course(trajectory, images.cpu(), torch.cat(seen).detach().cpu(), gradient.cpu())


def in_half_precision(device: torch.device, train: str, **knobs: Any) -> DiffusersPolicy:
    return shapes_policy(device, train=train, compute_dtype="bfloat16", **knobs)


def on_policy(policy: DiffusersPolicy, task: Task) -> dict[str, float]:
    """The metrics of an update that changes the weights, on what they have just sampled."""
    velocity = policy.velocity(policy.module)
    trajectory = task.rollout(velocity, policy.encode(CAPTIONS[: task.prompts]))
    engine = Recording(policy.module, lr=0.1, device=policy.device)
    metrics = task.update(engine, velocity, trajectory)
    return {name: float(value) for name, value in metrics.items()}


def assert_ratio_is_one(found: dict[str, float]) -> None:
    """Until the first optimizer step, which must then show."""
    assert found["ratio_error_on_policy"] <= 1e-6, found
    assert found["ratio_deviation"] > 1e-6, found


# ---- engines and optimizers


def make_engine(kind: str, dtype: str, device: torch.device) -> tuple[Engine, DiffusersPolicy]:
    """The engine of a run, also where a run of one process would take ``single``."""
    config = Config()
    config.update.learning_rate = 1e-3
    policy = shapes_policy(device, empty="fsdp" in kind, train="lora", compute_dtype=dtype)
    optimizer = partial(make_optimizer, config)
    if "fsdp" in kind:
        network = network_of(policy, policy.module)
        knobs = EngineConfig("fsdp", offload="offload" in kind)
        return FullySharded(network, knobs, device, optimizer), policy
    engine = DataParallel(policy.module, device, optimizer)
    if kind == "ddp":
        engine.module = DistributedDataParallel(policy.module, gradient_as_bucket_view=True)
    return engine, policy


def two_steps(kind: str, dtype: str, device: torch.device) -> dict[str, Any]:
    """An iteration of two optimizer steps, by the same adapters whatever holds them."""
    engine, policy = make_engine(kind, dtype, device)
    generator = torch.Generator().manual_seed(1)
    for shard in engine.shards:  # B is zero at first, and A would have no gradient
        shard.copy_(0.05 * torch.randn(shard.shape, generator=generator))
    engine.refresh()
    task = Task(euler_plan(), optimizer_steps=2, micro_batch=4, max_grad_norm=1.0)
    velocity, text = policy.velocity(engine.module), policy.encode(CAPTIONS[:2])
    before = whole(engine.weights())
    with engine.gathered():
        trajectory = task.rollout(velocity, text)
    metrics = task.update(engine, velocity, trajectory)
    weights = whole(engine.weights())
    return {"final": trajectory.final.cpu(), "before": before, "weights": weights, **metrics}


def descend(
    device: torch.device, dtype: torch.dtype, make: Callable[[list[nn.Parameter]], Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Ten steps down a noisy quadratic: the weights and the optimizer's state."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 512, generator=generator)
    parameter = nn.Parameter(start.to(device, dtype))
    optimizer = make([parameter])
    for _ in range(10):
        noise = torch.randn(64, 512, generator=generator).to(device)
        parameter.grad = (parameter.detach().float() - 0.5 + 0.3 * noise).to(dtype)
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


def frugal(parameters: list[nn.Parameter], eight_bit: bool = True, seed: int = 3) -> FrugalAdamW:
    return FrugalAdamW(parameters, 0.01, (0.9, 0.99), 0.01, eight_bit, seed)


def torchs(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    fused = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(parameters, 0.01, (0.9, 0.99), weight_decay=0.01, fused=fused)


# ---- a GPU's own


@contextlib.contextmanager
def waits_forbidden(device: torch.device) -> Iterator[None]:
    """On a GPU, an operation for which the host would wait is an error inside the context."""
    if device.type == "cpu":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def memory_used(device: torch.device) -> int:
    """Bytes of all tensors on a GPU, without cuBLAS's workspaces; 0 on the CPU."""
    gc.collect()
    if device.type == "cpu":
        return 0
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated(device)


@contextlib.contextmanager
def little_memory(device: torch.device, more: int) -> Iterator[None]:
    """Lets this process take only so many bytes more of a GPU; on the CPU, none at all.

    There a rollout says what it would say on a GPU.
    """
    if device.type == "cpu":
        full = torch.OutOfMemoryError("CUDA out of memory")
        with (
            mock.patch("mixgrpo.trainer.rollout", side_effect=full),
            mock.patch("mixgrpo.trainer.memory_of", return_value=2**30),
        ):
            yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = (torch.cuda.memory_reserved(device) + more) / total
    torch.cuda.set_per_process_memory_fraction(allowed, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        gc.collect()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def group_of_one(device: torch.device) -> Iterator[Process]:
    """The process group that torchrun would make of this process alone: of NCCL on a GPU."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))
        become_rank(0, 1, free_port())
        if device.type == "cpu":
            stack.enter_context(mock.patch("torch.cuda.is_available", return_value=False))
        stack.callback(_leave_group)
        yield stack.enter_context(process_group(1))


def _leave_group() -> None:
    """After a failure a GPU's group is left as it is: processes that end do not wait for others."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Between two sets of weights."""
    assert first.keys() == second.keys()
    return math.sqrt(sum(float((first[n] - second[n]).square().sum()) for n in first))


def euler_plan() -> SamplingPlan:
    return small_plan(steps=6, start=1, size=3)


def flash_plan() -> SamplingPlan:
    """MixGRPO-Flash: DPM-Solver++ of order 2 on half the steps behind the window."""
    return small_plan(steps=8, start=2, size=2, solver="dpm", ratio=0.5)
