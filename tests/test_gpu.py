"""What only a GPU can show, in the order of its worth: pytest tests/test_gpu.py

Without a GPU, ``--device cpu`` runs every line on the CPU, where some of it cannot fail.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from on_device import (
    CAPTIONS,
    SHAPES,
    Task,
    assert_ratio_is_one,
    course_of,
    descend,
    distance,
    euler_plan,
    flash_plan,
    frugal,
    group_of_one,
    in_half_precision,
    little_memory,
    memory_used,
    on_policy,
    recomputing,
    shapes_policy,
    torchs,
    two_steps,
    waits_forbidden,
)
from small import CPU, Recording, relative_error, small_plan
from test_train import assert_same_checkpoint
from tiny_world import QUICK, World, checkpoint_folder, records, train_here, without_times
from torch import Tensor, nn

from mixgrpo.engines.adamw import decode, round_stochastically
from mixgrpo.methods import grpo
from mixgrpo.models.flux import FLUX
from mixgrpo.models.policy import DiffusersPolicy
from mixgrpo.models.text import TextEncoders
from mixgrpo.planning.memory import OutOfMemory
from mixgrpo.rewards import ScoreStream, build_reward, resident, score

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module")
def _as_a_run_sets_it(device: torch.device) -> Iterator[None]:
    """As ``process_group`` does: this GPU, and convolutions that do not round to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    yield
    torch.backends.cudnn.allow_tf32 = before


# ---- the numbers are the CPU's


@pytest.mark.parametrize(
    ("train", "task"),
    [
        ("full", Task(euler_plan(), clip=8e-5)),
        ("lora", Task(flash_plan(), shared=False, clip=8e-5)),
    ],
    ids=["full, Euler", "LoRA, Flash"],
)
def test_an_iteration_computes_what_the_cpu_computes(
    device: torch.device, train: str, task: Task
) -> None:
    """Float32 without TF32. The noise is the same: it is drawn on the CPU.

    Sums that are rounded differently change a layer's outputs by some 1e-7. With 1e-6 instead,
    added on a CPU, latents changed by up to 4e-6, gradients by 7e-6 and log-ratios, which are small
    differences, by 9e-5: the tolerances are ten times as much or more. With 3e-4, as in TF32, they
    changed by 4e-4, 2e-3 and 1e-2, beyond all tolerances.
    """
    expected = course_of(shapes_policy(CPU, train=train), task)
    found = course_of(shapes_policy(device, train=train), task)
    assert found.trajectory.states.device.type == device.type
    for name in ("states", "old_means", "final"):
        ours, theirs = (getattr(course.trajectory, name).cpu() for course in (found, expected))
        assert relative_error(ours, theirs) < 5e-5, name
    assert relative_error(found.images, expected.images) < 1e-4
    # Some are clipped, and none is so near to the clip that rounding decides it.
    beyond = (expected.log_ratios.exp() - 1).abs() - task.clip
    assert beyond.min() < 0 < beyond.max()
    assert beyond.abs().min() > 1e-5
    assert relative_error(found.log_ratios, expected.log_ratios) < 2e-3
    assert relative_error(found.gradient, expected.gradient) < 5e-4


# ---- the ratio before the first update


@pytest.fixture(scope="module", params=["lora", "full"])
def eager(request: pytest.FixtureRequest, device: torch.device) -> DiffusersPolicy:
    return in_half_precision(device, request.param)


# Twelve prompts in micro-batches of twelve, the default: the rollout and the update evaluate the
# policy for twelve samples at a time, always. A GPU may use other kernels for other numbers.
TWELVES = Task(small_plan(steps=5, start=1, size=3), prompts=12, samples=2, optimizer_steps=2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_ratio_is_one_in_bfloat16(eager: DiffusersPolicy, checkpointing: bool) -> None:
    with recomputing(eager, checkpointing):
        assert_ratio_is_one(on_policy(eager, TWELVES))


def test_the_ratio_of_other_batches_is_nearly_one_in_bfloat16(eager: DiffusersPolicy) -> None:
    """Four prompts: the first window step is evaluated for 4 samples, and again among 12.

    Against float32, where all of bfloat16's rounding shows, the error is 7e-4.
    """
    task = Task(TWELVES.plan, prompts=4, samples=4)
    found = on_policy(eager, task)
    assert found["grad_norm"] > 0
    print(f"ratio error of mixed batch sizes: {found['ratio_error_on_policy']:.3g}")
    assert found["ratio_error_on_policy"] < 1e-3, found


# ---- resuming


@pytest.mark.parametrize(
    "knobs",
    [
        {"model__train": "lora", "update__optimizer": "adamw"},
        {"model__train": "full", "update__optimizer": "adamw_8bit"},
    ],
    ids=["LoRA", "full, 8 bits"],
)
def test_four_iterations_equal_two_and_two_resumed(
    device: torch.device, world: World, tmp_path: Path, knobs: dict[str, Any]
) -> None:
    """To the last bit."""
    knobs = {**QUICK, "model__compute_dtype": "bfloat16", "ema__decay": 0.9, **knobs}

    def trained(name: str, iterations: int, resume: bool = False) -> Path:
        given = {**knobs, "run__iterations": iterations, "run__resume": resume}
        config = world.config(tmp_path / name, run__deterministic=True, **given)
        return train_here(config, device=device)

    straight = trained("straight", 4)
    trained("resumed", 2)
    resumed = trained("resumed", 4, resume=True)
    assert_same_checkpoint(checkpoint_folder(resumed, 4), checkpoint_folder(straight, 4))
    assert without_times(records(resumed))[-1] == without_times(records(straight))[-1]


# ---- nothing waits


def test_a_rollout_and_its_decoding_only_queue_work(
    device: torch.device, eager: DiffusersPolicy
) -> None:
    """As on the fake GPU of test_no_waiting."""
    images: list[Tensor] = []
    task = Task(flash_plan(), micro_batch=4)
    velocity, text = eager.velocity(eager.module), eager.encode(CAPTIONS[:2])

    def decode_it(latents: Tensor, rows: range) -> None:
        images.append(eager.decode(latents))

    first = task.rollout(velocity, text, decode_it)  # loads the kernels
    with waits_forbidden(device):
        second = task.rollout(velocity, text, decode_it)
        if device.type == "cuda":
            with pytest.raises(RuntimeError):
                second.final.sum().item()
    assert torch.equal(first.final, second.final)
    assert torch.equal(torch.cat(images[:2]), torch.cat(images[2:]))


def test_an_update_only_queues_work_between_its_checks(
    device: torch.device, eager: DiffusersPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward passes included; the checks, one in each optimizer step, are left out."""
    task = Task(euler_plan(), optimizer_steps=2, max_grad_norm=1.0)
    velocity = eager.velocity(eager.module)
    trajectory = task.rollout(velocity, eager.encode(CAPTIONS[:2]))
    engine = Recording(eager.module, lr=1e-3, device=device)
    task.update(engine, velocity, trajectory)
    monkeypatch.setattr(grpo, "_require_finite", lambda *_: None)
    with waits_forbidden(device):
        metrics = task.update(engine, velocity, trajectory)
    assert len(engine.gradients) == 4
    assert metrics["grad_norm"].isfinite()


# ---- engines


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("ddp", "float32"),
        ("fsdp", "float32"),
        ("fsdp, offload", "float32"),
        ("fsdp", "bfloat16"),
    ],
)
def test_an_engine_of_one_process_computes_what_single_computes(
    device: torch.device, kind: str, dtype: str
) -> None:
    """By NCCL on a GPU; as in test_engines but for the tolerance of bfloat16's gradients."""
    expected = two_steps("single", dtype, device)
    with group_of_one(device) as process:
        assert process.device.type == device.type
        for place in (device, CPU):  # NCCL and gloo
            summed = torch.ones(3, device=place)
            torch.distributed.all_reduce(summed)
            assert summed.tolist() == [1.0] * 3
        found = two_steps(kind, dtype, device)
    rounding = 1e-5 if dtype == "float32" else 1e-2
    assert relative_error(found["final"], expected["final"]) < rounding
    assert float(found["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=rounding)
    way = distance(expected["before"], expected["weights"])
    apart = distance(found["weights"], expected["weights"])
    assert apart < (1e-3 if dtype == "float32" else 0.1) * way, (apart, way)


# ---- the optimizer of small GPUs


def test_8_bit_moments_are_close_to_adamws(device: torch.device) -> None:
    """A code is about 1% from its neighbours, and nearer to the value on average."""
    expected, moments = descend(device, torch.float32, torchs)
    exact, _ = descend(device, torch.float32, partial(frugal, eight_bit=False))
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-6)
    found, state = descend(device, torch.float32, frugal)
    assert state["exp_avg"].dtype == torch.uint8
    assert {value.device.type for name, value in state.items() if name != "step"} == {device.type}
    mean = decode(state["exp_avg"], state["exp_avg_scale"], signed=True)
    root = decode(state["exp_avg_sq"], state["exp_avg_sq_scale"], signed=False)
    assert 1e-4 < relative_error(mean, moments["exp_avg"]) < 0.05
    assert 1e-4 < relative_error(root, moments["exp_avg_sq"].sqrt()) < 0.05
    assert relative_error(found, expected) < 0.01


def test_stochastic_rounding_repeats_itself_and_is_unbiased(device: torch.device) -> None:
    first, second, other = (
        descend(device, torch.bfloat16, partial(frugal, seed=seed))[0] for seed in (3, 3, 4)
    )
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    values = torch.tensor([1.001, -1.001, 3.14159, 1e-20, 0.99999, -2.0, 0.0], device=device)
    generator, count = torch.Generator(device).manual_seed(1), 40_000
    drawn = round_stochastically(values.expand(count, -1).contiguous(), generator).double()
    error = (drawn.mean(0) - values.double()).abs()
    assert (error <= 5 * (drawn.amax(0) - drawn.amin(0)) / 2 / count**0.5).all()
    assert (drawn.amin(0) < drawn.amax(0)).tolist() == [True] * 5 + [False] * 2


# ---- offloading


def test_a_reward_off_loaded_leaves_nothing_on_the_device(device: torch.device) -> None:
    reward = build_reward("hpsv2", {"model": str(SHAPES / "hpsv2")}, CPU)
    model = reward.clip.model
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    size = sum(p.nbytes for p in model.parameters())
    for _ in range(2):  # the second time kernels and workspaces are there
        before = memory_used(device)
        with resident({"hpsv2": reward}, "offload", device):
            assert {p.device.type for p in model.parameters()} == {device.type}
            during = memory_used(device)
            scores = score({"hpsv2": reward}, images, CAPTIONS[:4], 4)["hpsv2"]
        assert scores.isfinite().all()
        del scores
        assert {p.device for p in model.parameters()} == {CPU}
        assert device.type == "cpu" or during >= before + size
    assert memory_used(device) == before


def test_text_encoders_off_loaded_leave_nothing_on_the_device(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = shapes_policy(CPU)
    resting = TextEncoders(FLUX, policy.pipeline, 16, device, "offload")
    own = policy.pipeline.text_encoder_2
    copies: list[weakref.ref[nn.Module]] = []
    encode_one = resting._encode_one

    def looked_at(prompt: str) -> Any:
        there = policy.pipeline.text_encoder_2
        assert {p.device.type for p in there.parameters()} == {device.type}
        copies.append(weakref.ref(there))
        return encode_one(prompt)

    monkeypatch.setattr(resting, "_encode_one", looked_at)
    for _ in range(2):
        before = memory_used(device)
        found = resting.encode(CAPTIONS[:2]).to(CPU)
        assert all(copied() is None for copied in copies), "copies await the garbage collector"
        after = memory_used(device)
    assert after == before
    assert len(copies) == 4
    assert policy.pipeline.text_encoder_2 is own
    assert {p.device for p in own.parameters()} == {CPU}
    expected = TextEncoders(FLUX, policy.pipeline, 16, device, "cpu").encode(CAPTIONS[:2]).to(CPU)
    assert relative_error(found.tokens, expected.tokens) < 1e-4
    assert relative_error(found.pooled, expected.pooled) < 1e-4


# ---- scoring beside sampling


def test_scores_of_a_second_stream_are_those_of_scoring_at_once(device: torch.device) -> None:
    """A GPU is still busy when images are submitted, in whose place there are zeros until then."""
    rewards = {
        kind: build_reward(kind, {"model": str(SHAPES / kind)}, device)
        for kind in ("hpsv2", "pickscore")
    }
    images = torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    expected = score(rewards, images, CAPTIONS, 5)
    late = torch.zeros_like(images)
    stream = ScoreStream(rewards, 5, device)
    for start, stop in ((0, 4), (4, 8), (8, 12)):
        if device.type == "cuda":
            torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        late[start:stop].copy_(images[start:stop])
        stream.submit(late[start:stop], CAPTIONS[start:stop])
    found = stream.result().scores
    assert found.keys() == rewards.keys()
    for name, values in found.items():
        assert values.device == CPU
        assert values.std() > 1e-4
        torch.testing.assert_close(values, expected[name].cpu(), rtol=1e-5, atol=1e-6)


# ---- too little memory


def test_out_of_memory_is_told_with_advice(
    device: torch.device, world: World, folder: Path
) -> None:
    """4096 tokens of 8 samples: a feed-forward layer's output alone takes 64 MiB."""
    size = {"model__height": 1024, "model__width": 1024, "validation__before": False}
    knobs = {**QUICK, **size}
    with little_memory(device, more=64 * 2**20), pytest.raises(OutOfMemory) as raised:
        train_here(world.config(folder, **knobs), device=device)
    said = str(raised.value)
    assert "GiB are not enough: the transformer (lora) needs about" in said
    assert "lower --update.micro_batch" in said
    assert "\n" not in said


# ---- compiled


@pytest.fixture(scope="module", params=["lora", "full"])
def compiled(request: pytest.FixtureRequest, device: torch.device) -> Iterator[DiffusersPolicy]:
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    yield in_half_precision(device, request.param, compile=backend)
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_ratio_is_one_compiled(
    compiled: DiffusersPolicy, device: torch.device, checkpointing: bool
) -> None:
    assert all("forward" in vars(block) for block in compiled.blocks(compiled.module))
    with recomputing(compiled, checkpointing):
        assert_ratio_is_one(on_policy(compiled, TWELVES))
