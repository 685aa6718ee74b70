"""Less memory is moved than by the libraries' own forward passes, and the outputs are the same."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fake_gpu import GPU, fake_gpu
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from small import CPU, gradient_of, perturbed, relative_error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixgrpo.config import ModelConfig
from mixgrpo.models.adapters import streamline, switched_off
from mixgrpo.models.flux import FLUX
from mixgrpo.models.policy import DiffusersPolicy
from mixgrpo.shapes.architecture import TEXT_LENGTH, flux_pipeline
from mixgrpo.types import TextEmbedding

BLOCKS = (2, 4)  # double and single ones of the small transformer
HOOKED = ("_forward_hooks", "_forward_pre_hooks")


def make_policy(train: str, dtype: str) -> DiffusersPolicy:
    config = ModelConfig(
        height=64,
        width=64,
        text_length=TEXT_LENGTH,
        train=train,  # type: ignore[arg-type]
        compute_dtype=dtype,  # type: ignore[arg-type]
        gradient_checkpointing=False,
    )
    pipeline = flux_pipeline()
    if train == "lora":
        nn.Module.to(pipeline.transformer, getattr(torch, dtype))
    policy = DiffusersPolicy(FLUX, pipeline, config, CPU)
    policy.make_trainable(seed=0)
    adapters = [p for n, p in policy.module.named_parameters() if ".lora_" in n]
    perturbed(nn.ParameterList(adapters), 0.02)
    return policy


def as_in_the_libraries(module: nn.Module) -> nn.Module:
    """A copy with peft's forward pass of adapters, and without casts of this repository's."""
    plain = copy.deepcopy(module)
    for part in plain.modules():
        if isinstance(part, Linear):
            del part.forward
        kind = type(part).__name__
        if kind.startswith("AdaLayerNormZero") or kind == "FeedForward":
            for hooks in HOOKED:
                getattr(part, hooks).clear()
    return plain


def evaluate(policy: DiffusersPolicy, module: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 16, 64), (2, TEXT_LENGTH, 128), (2, 64))
    drawn = (torch.randn(shape, generator=generator) for shape in shapes)
    x, tokens, pooled = (values.to(policy.device, non_blocking=True) for values in drawn)
    sigma = torch.tensor([0.3, 0.8]).to(policy.device, non_blocking=True)
    return policy.velocity(module)(x, sigma, TextEmbedding(tokens, pooled))


class Casts(TorchDispatchMode):
    """Counts the casts of activations to bfloat16 by their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        is_cast = func.overloadpacket is torch.ops.aten._to_copy
        if is_cast and found.dtype == torch.bfloat16 and found.ndim == 3:
            self.shapes[tuple(found.shape)] += 1
        return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_outputs_are_the_libraries(train: str, dtype: str) -> None:
    """To the last bit: the adapters' scale is 2, which multiplies without rounding."""
    policy = make_policy(train, dtype)
    plain = as_in_the_libraries(policy.module)
    with torch.no_grad():
        assert torch.equal(evaluate(policy, policy.module), evaluate(policy, plain))
        with switched_off(policy.module), switched_off(plain):
            base = evaluate(policy, policy.module)
            assert torch.equal(base, evaluate(policy, plain))
        if train == "lora":
            assert not torch.equal(base, evaluate(policy, plain)), "the adapters have an effect"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_gradients_are_the_libraries(train: str, dtype: str, tolerance: float) -> None:
    """In bfloat16, the gradients that products send back to a norm are summed in bfloat16."""
    policy = make_policy(train, dtype)
    modules = (policy.module, as_in_the_libraries(policy.module))
    for module in modules:
        evaluate(policy, module).square().sum().backward()
    found, expected = (gradient_of(list(module.parameters())) for module in modules)
    assert expected.norm() > 0
    assert relative_error(found, expected) < tolerance


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.7])
def test_the_adapters_scale_is_followed(scale: float) -> None:
    policy = make_policy("lora", "float32")
    plain = as_in_the_libraries(policy.module)
    for module in (policy.module, plain):
        module.set_adapters(["default"], weights=[scale])  # type: ignore[operator]
    with torch.no_grad():
        found, expected = evaluate(policy, policy.module), evaluate(policy, plain)
        with switched_off(policy.module):
            base = evaluate(policy, policy.module)
    assert relative_error(found, expected) < 1e-6
    assert torch.equal(found, base) == (scale == 0.0)


@pytest.mark.parametrize("knobs", [{"use_dora": True}, {"lora_dropout": 0.5}])
def test_other_kinds_of_adapters_keep_the_librarys_forward_pass(knobs: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], **knobs), model)
    streamline(adapted)
    assert "forward" not in vars(adapted[0])
    assert not adapted[0].cast_input_dtype_enabled


def test_merged_adapters_are_not_added_again() -> None:
    policy = make_policy("lora", "float32")
    with torch.no_grad():
        expected = evaluate(policy, policy.module)
        for part in policy.module.modules():
            if isinstance(part, Linear):
                part.merge()
        assert relative_error(evaluate(policy, policy.module), expected) < 1e-5


def test_a_layer_without_the_active_adapter_is_its_base() -> None:
    """As when a second LoRA adapts fewer layers."""
    policy = make_policy("lora", "float32")
    with torch.no_grad(), switched_off(policy.module):
        base = evaluate(policy, policy.module)
    for part in policy.module.modules():
        if isinstance(part, Linear):
            part._active_adapter = ["other"]
    with torch.no_grad():
        assert torch.equal(evaluate(policy, policy.module), base)


def test_a_copy_has_its_own_adapters() -> None:
    """As the engines' and the references' copies have."""
    policy = make_policy("lora", "float32")
    copied = copy.deepcopy(policy.module)
    with torch.no_grad():
        before = evaluate(policy, copied)
        for name, parameter in policy.module.named_parameters():
            if ".lora_B" in name:
                parameter.zero_()
        assert torch.equal(evaluate(policy, copied), before)
        assert not torch.equal(evaluate(policy, policy.module), before)


def test_what_several_products_read_is_cast_once() -> None:
    """Per double block and stream: the norm's outputs and the feed-forward's inputs; per single
    block: the norm's outputs, for the three projections, the feed-forward and four adapters. Only
    on a GPU do norms return float32 under autocast."""
    policy = make_policy("lora", "bfloat16")
    plain = as_in_the_libraries(policy.module)
    counts = []
    with fake_gpu() as gpu:
        policy.device = GPU
        for module in (policy.module, plain):
            with torch.no_grad(), Casts() as casts:
                evaluate(policy, gpu.place(module))
            counts.append(casts.shapes)
    width, (double, single) = 128, BLOCKS
    joint = (2, 16 + TEXT_LENGTH, width)
    assert counts[0][joint] == single
    assert counts[1][joint] == single * 8
    # Images and texts have 16 tokens each. Norm and feed-forward; three projections and one.
    alone = (2, 16, width)
    assert counts[1][alone] - counts[0][alone] == double * 2 * ((6 + 2) - (1 + 1))
