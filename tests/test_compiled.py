"""Compiled blocks: the same numbers, the same code in rollout and update; attention, TF32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small import CPU, Recording, gradient_of, perturbed, relative_error, small_noise, small_plan
from torch._dynamo.backends.debugging import aot_eager

from mixgrpo.config import ModelConfig, UpdateConfig
from mixgrpo.maths.transitions import log_ratio
from mixgrpo.methods.grpo import Objective, update
from mixgrpo.models.compiled import compile_blocks, repeated_blocks
from mixgrpo.models.flux import FLUX
from mixgrpo.models.policy import DiffusersPolicy, speed_up
from mixgrpo.rollout import rollout
from mixgrpo.shapes.architecture import TEXT_LENGTH, flux_pipeline
from mixgrpo.types import TextEmbedding

BLOCKS = 6
# Graphs for one batch size: of double blocks; of the first single one, and of the others, whose
# inputs are slices.
GRAPHS = 3


class Compiler:
    """Keeps every graph that it is asked to compile."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(graph)
        return aot_eager(graph, inputs)


def make_policy(**knobs: Any) -> DiffusersPolicy:
    config = ModelConfig(
        height=64,
        width=64,
        text_length=TEXT_LENGTH,
        **{"compute_dtype": "float32", "gradient_checkpointing": False, **knobs},
    )
    policy = DiffusersPolicy(FLUX, flux_pipeline(), config, CPU)
    policy.make_trainable(seed=0)
    return policy


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor, TextEmbedding]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 16, 64, generator=generator)
    tokens = torch.randn(batch, TEXT_LENGTH, 128, generator=generator)
    text = TextEmbedding(tokens, torch.randn(batch, 64, generator=generator))
    return x, torch.linspace(0.3, 0.9, batch), text


def evaluate(policy: DiffusersPolicy, batch: int = 2) -> torch.Tensor:
    return policy.velocity(policy.module)(*inputs(batch))


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "knobs",
    [{}, {"gradient_checkpointing": True}, {"train": "lora", "compute_dtype": "bfloat16"}],
    ids=["full", "checkpointing", "lora in bfloat16"],
)
def test_outputs_and_gradients_are_those_of_the_blocks(knobs: dict[str, Any]) -> None:
    plain, compiled, compiler = make_policy(**knobs), make_policy(**knobs), Compiler()
    if "train" in knobs:
        for policy in (plain, compiled):
            perturbed(policy.module, 0.02)
    compile_blocks(compiled.module, compiler)
    with torch.no_grad():
        without = evaluate(compiled)
    assert not without.requires_grad
    made = len(compiler.graphs)
    assert 2 <= made <= GRAPHS < BLOCKS
    outputs = [evaluate(policy) for policy in (plain, compiled)]
    assert torch.equal(outputs[1], without)
    assert len(compiler.graphs) == made  # not one more for gradients
    for output in outputs:
        output.square().sum().backward()
    tolerance = 1e-5 if "train" not in knobs else 2e-2
    assert relative_error(outputs[1].detach(), outputs[0].detach()) < tolerance
    found, expected = (
        gradient_of([p for p in policy.module.parameters() if p.requires_grad])
        for policy in (compiled, plain)
    )
    assert expected.norm() > 0
    assert relative_error(found, expected) < tolerance


def test_the_ratio_is_1_before_the_first_update() -> None:
    policy, compiler = make_policy(), Compiler()
    compile_blocks(policy.module, compiler)
    velocity = policy.velocity(policy.module)
    plan = small_plan(steps=5, start=1, size=2)
    noise = small_noise(prompts=(0,), samples=4, shape=(16, 64))
    trajectory = rollout(velocity, inputs(1)[2], plan, noise, micro_batch=2)
    made = len(compiler.graphs)
    metrics = update(
        Recording(policy.module), velocity, trajectory, torch.tensor([1.0, -1.0, 0.5, -0.5]),
        Objective(plan.transition, log_ratio, clip=1e-4),
        UpdateConfig(optimizer_steps=1, micro_batch=2),
    )  # fmt: skip
    assert metrics["ratio_error_on_policy"] < 1e-5
    assert metrics["grad_norm"] > 0
    # The steps up to the window have a batch of 1, those behind of 2; the update's 5 = 2 + 2 + 1.
    assert made <= 2 * GRAPHS
    assert len(compiler.graphs) == made


def test_a_copy_keeps_its_own_weights() -> None:
    """As the reference policy of a KL does."""
    policy = make_policy()
    compile_blocks(policy.module, "eager")
    velocity = policy.velocity(copy.deepcopy(policy.module))
    with torch.no_grad():
        before, own = velocity(*inputs(2)), evaluate(policy)
        perturbed(policy.module, 0.05)
        assert torch.equal(velocity(*inputs(2)), before)
        assert relative_error(evaluate(policy), own) > 0.01


# ---- the knobs


def test_the_knobs_reach_the_model(world: Any) -> None:
    try:
        policy = world.policy(
            model__compile="aot_eager", model__attention="_native_math", model__tf32=True
        )
        blocks = list(repeated_blocks(policy.module))
        assert len(blocks) == 6
        assert all("forward" in vars(block) for block in blocks)
        assert {str(block.attn.processor._attention_backend.value) for block in blocks} == {
            "_native_math"
        }
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        policy.module.set_attention_backend("native")  # diffusers remembers the last one
        torch.backends.cuda.matmul.allow_tf32 = False


def test_nothing_is_compiled_unless_it_is_asked_for(world: Any) -> None:
    policy = world.policy()
    assert not any("forward" in vars(block) for block in repeated_blocks(policy.module))
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_backend_that_is_not_usable_is_named() -> None:
    with pytest.raises(ValueError, match=r"model.attention is 'flash', which cannot be used here"):
        speed_up(make_policy().module, ModelConfig(attention="flash"))


def test_bfloat16_weights_are_trained_and_frozen_ones_stay(world: Any) -> None:
    knobs = {"model__weights": "bfloat16_stochastic", "model__compute_dtype": "bfloat16"}
    full = world.policy(**knobs)
    assert {p.dtype for p in full.module.parameters()} == {torch.bfloat16}
    lora = world.policy(**knobs, model__train="lora")
    assert {p.dtype for p in lora.module.parameters() if p.requires_grad} == {torch.bfloat16}
    predicted = evaluate(full)
    predicted.sum().backward()
    assert predicted.dtype == torch.float32
    assert all(p.grad.dtype == torch.bfloat16 for p in full.module.parameters())
