"""While it samples, the host never waits for the device: it only queues work.

On the meta device tensors have no values: whatever asks for one (item, bool, a copy to the CPU)
is an error. Copies to the device are watched: those that are not ``non_blocking`` make it wait.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from small import CPU, ETA, SHIFT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixgrpo.config import ModelConfig
from mixgrpo.maths.dpm_solver import make_solver
from mixgrpo.maths.schedule import flash_sigmas
from mixgrpo.maths.transitions import make_transition
from mixgrpo.models.flux import FLUX
from mixgrpo.models.policy import DiffusersPolicy
from mixgrpo.noise import Noise
from mixgrpo.rollout import SamplingPlan, rollout, sample_ode
from mixgrpo.shapes.architecture import TEXT_LENGTH, flux_pipeline
from mixgrpo.types import TextEmbedding, Velocity, Window

META = torch.device("meta")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Waits(TorchDispatchMode):
    """Lists the copies from one device to another that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in COPIES:
            source = args[0] if func is COPIES[0] else args[1]
            non_blocking = (kwargs or {}).get("non_blocking") or (
                func is COPIES[1] and len(args) > 2 and args[2]
            )
            if source.device != result.device and not non_blocking:
                self.found.append(f"{source.device} -> {result.device}, {list(source.shape)}")
        return result


@functools.cache
def make_velocity(device: torch.device) -> Velocity:
    """A small FLUX, with and without values."""
    pipeline = flux_pipeline()
    config = ModelConfig(height=64, width=64, text_length=TEXT_LENGTH, compute_dtype="float32")
    policy = DiffusersPolicy(FLUX, pipeline, config, device, text=NoText())
    if device == META:
        policy.device = CPU  # the one whose autocast is left off; there is none for meta
    return policy.velocity(policy.module)


class NoText:
    """In the text encoders' place."""


def text_on(device: torch.device) -> TextEmbedding:
    shape = (2, TEXT_LENGTH, 128)
    return TextEmbedding(torch.zeros(shape, device=device), torch.zeros(2, 64, device=device))


def plan_of(transition: str, solver: str) -> SamplingPlan:
    window = Window(2, 4)
    sigmas = flash_sigmas(8, SHIFT, window, 0.5 if solver == "dpm" else 1.0)
    return SamplingPlan(
        sigmas, window, make_transition(transition, ETA), partial(make_solver, solver, sigmas, 3)
    )


def noise_on(device: torch.device, shared: bool = True) -> Noise:
    return Noise(0, 0, (0, 1), 3, (16, 64), shared, device)


def sampled(plan: SamplingPlan, noise: Noise, velocity: Velocity) -> list[str]:
    with Waits() as waits:
        rollout(velocity, text_on(noise.device), plan, noise, micro_batch=2)
    return waits.found


@pytest.mark.parametrize("transition", ["flow_sde", "dance_sde", "cps", "precise"])
@pytest.mark.parametrize("solver", ["euler", "dpm"])
def test_a_rollout_only_queues(transition: str, solver: str) -> None:
    assert sampled(plan_of(transition, solver), noise_on(META), make_velocity(META)) == []


def test_nor_does_one_of_independent_noise_or_deterministic_sampling() -> None:
    velocity, plan = make_velocity(META), plan_of("flow_sde", "euler")
    assert sampled(plan, noise_on(META, shared=False), velocity) == []
    with Waits() as waits:
        sample_ode(velocity, noise_on(META).initial(), text_on(META), plan.sigmas, micro_batch=1)
    assert waits.found == []


def asking(velocity: Velocity, what: Callable[[Tensor], Any]) -> Velocity:
    def evaluate(x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
        what(x)
        return velocity(x, sigma, text)

    return evaluate


@pytest.mark.parametrize("what", [Tensor.item, bool, Tensor.cpu, Tensor.nonzero])
def test_asking_for_a_value_would_be_found(what: Callable[[Tensor], Any]) -> None:
    velocity = asking(make_velocity(META), lambda x: what(x.mean()))
    with pytest.raises((RuntimeError, NotImplementedError)):
        sampled(plan_of("flow_sde", "euler"), noise_on(META), velocity)


def test_a_copy_to_the_device_would_be_found() -> None:
    velocity = asking(make_velocity(META), lambda x: torch.arange(3).to(x.device))
    found = sampled(plan_of("flow_sde", "euler"), noise_on(META), velocity)
    assert found
    assert set(found) == {"cpu -> meta, [3]"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    device = torch.device("cuda")
    velocity, plan, noise = make_velocity(device), plan_of("flow_sde", "dpm"), noise_on(device)
    text = text_on(device)
    rollout(velocity, text, plan, noise, micro_batch=2)  # the first one loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        rollout(velocity, text, plan, replace(noise, iteration=1), micro_batch=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
