"""While it samples and while it computes losses, the host only queues work for a GPU.

On a fake GPU, whose tensors have no values, in bfloat16 autocast as on a real one; so this also
shows that no tensor is left on the wrong device. ``test_gpu.py`` repeats it on a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from fake_gpu import GPU, FakeGpu, HostWait, fake_gpu
from on_device import Task
from small import CPU, Recording, small_plan
from small_qwen import WIDTH, qwen_pipeline
from torch import Tensor

from mixgrpo.config import ModelConfig
from mixgrpo.methods import grpo
from mixgrpo.models.family import Family
from mixgrpo.models.flux import FLUX
from mixgrpo.models.guidance import Guidance
from mixgrpo.models.policy import DiffusersPolicy
from mixgrpo.models.qwen_image import QWEN_IMAGE
from mixgrpo.shapes.architecture import TEXT_LENGTH, flux_pipeline
from mixgrpo.types import TextEmbedding, Trajectory, Velocity

GUIDANCE = Guidance(4.0)


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as found:
        yield found


# ---- the fake GPU itself


@pytest.mark.parametrize(
    "wait",
    [
        Tensor.item,
        bool,
        Tensor.cpu,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: torch.equal(x, x),
        lambda x: torch.arange(3).to(x.device),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: x.index_put_((x > 0,), x[:2]),
    ],
    ids=[
        "item",
        "bool",
        "cpu",
        "mask",
        "nonzero",
        "cpu_index",
        "equal",
        "to_gpu",
        "copy_",
        "masked_write",
    ],
)
def test_what_would_wait_is_found(gpu: FakeGpu, wait: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3, device=GPU)
    with pytest.raises(HostWait):
        wait(x.sum() if wait in (Tensor.item, bool) else x)


def test_tensors_on_different_devices_do_not_mix(gpu: FakeGpu) -> None:
    with pytest.raises(RuntimeError, match="two different devices"):
        torch.ones(3, device=GPU) + torch.ones(3)


def test_what_only_queues_is_let_through(gpu: FakeGpu) -> None:
    x = torch.arange(3).to(GPU, non_blocking=True)
    found = [x[x.flip(0)], x * torch.tensor(2.0), torch.where(x > 1, x, 0.0), x.new_full((2,), 7)]
    x[x > 1] = 0
    assert [tensor.device for tensor in found] == [GPU] * 4
    assert found[1].dtype == torch.float32
    with torch.autocast("cuda", torch.bfloat16):
        assert (torch.ones(2, 3, device=GPU) @ torch.ones(3, 4, device=GPU)).dtype == torch.bfloat16
    assert torch.ones(3).sum().item() == 3  # on the CPU values are real


# ---- the product


def make_policy(
    gpu: FakeGpu, family: Family, train: str, checkpointing: bool = False
) -> DiffusersPolicy:
    """A small model as ``DiffusersPolicy.load`` would make it, on the fake GPU."""
    config = ModelConfig(
        train=train,
        height=64,
        width=64,
        text_length=TEXT_LENGTH,
        gradient_checkpointing=checkpointing,
    )
    pipeline = flux_pipeline() if family is FLUX else qwen_pipeline()
    if family is FLUX:
        pipeline.vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    pipeline.vae.to(torch.bfloat16)
    if train == "lora":
        pipeline.transformer.to(torch.bfloat16)
    policy = DiffusersPolicy(family, pipeline, config, CPU, text=mock.sentinel.text)
    policy.make_trainable(seed=0)
    for module in (policy.module, pipeline.vae):
        gpu.place(module)
    gpu.watching = False
    family.mend(policy.module, GPU)
    gpu.watching = True
    policy.device = GPU
    return policy


def make_text(family: Family, prompts: int) -> TextEmbedding:
    """Of Qwen-Image with padding and negative prompts."""
    if family is not FLUX:
        tokens = torch.zeros(prompts + 1, TEXT_LENGTH, WIDTH, device=GPU, dtype=torch.bfloat16)
        lengths = torch.arange(4, prompts + 4)
        negative = TextEmbedding(tokens[prompts:, :6])
        return TextEmbedding(tokens[:prompts], lengths=lengths, negative=negative)
    tokens = torch.zeros(prompts, TEXT_LENGTH, 128, device=GPU, dtype=torch.bfloat16)
    return TextEmbedding(tokens, torch.zeros(prompts, 64, device=GPU, dtype=torch.bfloat16))


def sampled(
    policy: DiffusersPolicy, velocity: Velocity, task: Task, decode: bool = False
) -> Trajectory:
    """A rollout in two micro-batches, which may decode what it has sampled."""
    images = []

    def finished(latents: Tensor, rows: range) -> None:
        images.append(policy.decode(latents) if decode else latents)

    trajectory = task.rollout(velocity, make_text(policy.family, task.prompts), finished)
    assert [len(batch) for batch in images] == [4, 4]
    assert {batch.device for batch in images} == {trajectory.states.device} == {GPU}
    return trajectory


def guided(policy: DiffusersPolicy) -> Velocity:
    return policy.velocity(policy.module, GUIDANCE if policy.family is QWEN_IMAGE else None)


@pytest.mark.parametrize(
    ("family", "train", "shared", "solver"),
    [(FLUX, "lora", True, "euler"), (FLUX, "full", False, "dpm"),
     (QWEN_IMAGE, "lora", True, "euler")],
    ids=["flux-lora", "flux-full", "qwen-lora"],
)  # fmt: skip
def test_a_rollout_that_decodes_only_queues(
    gpu: FakeGpu, family: Family, train: str, shared: bool, solver: str
) -> None:
    policy = make_policy(gpu, family, train)
    velocity = guided(policy)
    plan = small_plan(steps=5, start=1, solver=solver, order=3)
    task = Task(plan, shared=shared, micro_batch=4)
    sampled(policy, velocity, task, decode=True)
    with pytest.raises(HostWait):
        sampled(policy, asking(velocity), task)


def asking(velocity: Velocity) -> Velocity:
    """A velocity that looks at a value."""

    def evaluate(x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
        return velocity(x, sigma, text) * x.mean().item()

    return evaluate


@pytest.mark.parametrize(
    ("family", "train", "checkpointing"),
    [(FLUX, "lora", False), (FLUX, "lora", True), (FLUX, "full", True), (QWEN_IMAGE, "lora", True)],
    ids=["flux-lora", "flux-lora-checkpointing", "flux-full-checkpointing", "qwen-lora"],
)
def test_an_updates_losses_are_only_queued(
    gpu: FakeGpu, family: Family, train: str, checkpointing: bool
) -> None:
    """With a reference policy too: without the adapters, or another one's velocity."""
    policy = make_policy(gpu, family, train, checkpointing)
    velocity = guided(policy)
    reference = policy.without_adapters(policy.module) if train == "lora" else velocity
    task = Task(small_plan(steps=3, start=0), micro_batch=4, optimizer_steps=2)
    trajectory = sampled(policy, velocity, task)
    metrics = losses(policy, velocity, trajectory, task, reference)
    assert metrics["kl"].device == metrics["loss"].device == GPU
    assert metrics["ratio_error_on_policy"].dtype == torch.float32
    with pytest.raises(HostWait):
        losses(policy, asking(velocity), trajectory, task, reference)


def losses(
    policy: DiffusersPolicy,
    velocity: Velocity,
    trajectory: Trajectory,
    task: Task,
    reference: Velocity,
) -> dict[str, Tensor]:
    """The update's forward half: two optimizer steps, without backward passes and steps.

    The check for finite numbers is left out too: it waits once per optimizer step, and must.
    """
    engine = Recording(policy.module, device=GPU)
    norm = torch.ones((), device=GPU)
    with (
        mock.patch.object(engine, "backward") as backward,
        mock.patch.object(engine, "clip_gradients", return_value=norm),
        mock.patch.object(engine, "step"),
        mock.patch.object(grpo, "_require_finite"),
    ):
        metrics = task.update(engine, velocity, trajectory, kl=0.1, reference=reference)
    assert backward.call_count == 4  # 2 + 2 * 2 evaluations in each optimizer step
    assert all(call.args[0].requires_grad for call in backward.call_args_list)
    return metrics
