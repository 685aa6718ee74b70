"""The plan's formulas against numbers worked out by hand, and against models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from peft import LoraConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixgrpo.commands import main
from mixgrpo.commands.plan import parse
from mixgrpo.config import Config, ModelConfig, RewardConfig
from mixgrpo.files.weight_sets import NAME
from mixgrpo.inference.config import InferenceConfig, SampledModelConfig
from mixgrpo.inference.memory import estimate
from mixgrpo.models.adapters import streamline
from mixgrpo.models.family import Setup
from mixgrpo.models.flux import FLUX, Flux
from mixgrpo.planning.branches import Branches
from mixgrpo.planning.decoder import decoder_of
from mixgrpo.planning.device_memory import CONTEXT, DeviceMemory, device_memory
from mixgrpo.planning.memory import trained_weights, training_memory
from mixgrpo.planning.network import Network, Products, Size, Trained, network_of
from mixgrpo.planning.operations import operations_per_picture, seconds
from mixgrpo.planning.parts import PUBLISHED
from mixgrpo.planning.plan import (
    Question,
    Row,
    advice,
    pace,
    remedies,
    report,
    rows,
    table,
    with_knobs,
)
from mixgrpo.planning.settings import settings_of
from mixgrpo.planning.spread import Spread, spreads
from mixgrpo.types import TextEmbedding

README = Path(__file__).parent.parent / "mixgrpo" / "engines" / "README.md"
ENCODERS = FLUX.published.encoders
VAE = 83_819_683  # FLUX.1-dev's parameters of other parts
P = 11_901_408_320  # FLUX.1-dev's parameters
SMALL = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 48,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 12, 12),
}


def recipe(**knobs: Any) -> Config:
    """The published recipe's sizes, without the model's folder."""
    config = Config(rewards={"hpsv2": RewardConfig("hpsv2")})
    config.model.path = "nowhere"
    config.update.micro_batch = config.sampling.micro_batch = config.sampling.decode_batch = 3
    return with_knobs(config, {name.replace("__", "."): value for name, value in knobs.items()})


def memory(spread: Spread, gpus: int = 32, **knobs: Any) -> DeviceMemory:
    return device_memory(recipe(**knobs), spread, gpus)


def named(name: str, gpus: int = 32) -> Spread:
    return next(spread for spread in spreads(gpus, 8) if spread.name == name)


# ---- parameters and operations


@pytest.fixture(scope="module")
def dev() -> Network:
    """FLUX.1-dev."""
    return network_of(recipe().model)


SIZE = Size(720, 720, 512)  # 2025 + 512 tokens
WIDTH = 2537 * 3072  # values that have one number for each channel of each token


def test_flux_devs_parameters_by_hand(dev: Network) -> None:
    """D = 3072: a D x D layer has 9,440,256 weights and biases, D x 4D 37,761,024 and so on."""
    double = 2 * (56_641_536 + 4 * 9_440_256 + 256 + 37_761_024 + 37_751_808)
    single = 28_320_768 + 3 * 9_440_256 + 256 + 37_761_024 + 47_188_992
    assert dev.largest_block == double
    assert dev.outside == 64_124_992
    assert dev.parameters == P == 19 * double + 38 * single + 64_124_992
    assert dev.unused == 0
    assert sum(dev.adapted(16, "attention")) == 16 * 266 * 6144
    all_layers = 266 * 6144 + 76 * 15360 + 38 * (15360 + 18432)
    assert sum(dev.adapted(16, "all")) == 16 * all_layers
    assert max(dev.adapted(16, "all")) == 16 * 5 * 3072  # the last projection of a single block


@pytest.mark.parametrize("guidance", [True, False])
def test_parameters_and_operations_are_the_models(guidance: bool) -> None:
    """Counted by torch in the whole network, not in two blocks of each kind."""
    config = {**SMALL, "num_layers": 4, "guidance_embeds": guidance}
    model = FluxTransformer2DModel(**config)
    found = Network(FLUX, config)
    with FlopCounterMode(display=False) as counter:
        forward(model, 40, 24, batch=1)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    products = found.products(Size(80, 128, 24))
    assert products.weights == counter.get_total_flops()  # which knows no attention on a CPU
    assert products.attention == 7 * 4 * (40 + 24) ** 2 * 128


def test_flux_devs_operations_by_hand(dev: Network) -> None:
    """57 blocks of 24 S D^2 + 4 S^2 D for S = 2025 + 512 tokens, and 0.1% beside."""
    found = dev.products(SIZE)
    assert found.attention == 57 * 4 * 2537**2 * 3072
    assert found.weights == pytest.approx(57 * 24 * 2537 * 3072**2, rel=2e-3)
    assert found.total == pytest.approx(37.3e12, rel=2e-3)
    assert dev.products(Size(1024, 1024, 512)).total == 74_384_653_418_496


def test_operations_of_an_iteration_by_hand() -> None:
    products = Products(weights=10, attention=1)
    full = operations_per_picture(products, 2, 3, True, recomputed=1, with_reference=False)
    assert full == 2 * 11 + 3 * (11 + 11 + 22)
    lora = operations_per_picture(products, 2, 3, False, recomputed=0.5, with_reference=True)
    assert lora == 2 * 11 + 3 * (11 * 2.5 + 12)
    half = operations_per_picture(products, 2, 3, True, 1, with_reference=False, differentiated=0.5)
    assert half == 2 * 11 + 3 * (11 + (11 + 22) / 2)
    assert seconds(2e15, share=0.4, peak=1000) == 5


def test_the_pace_by_hand(dev: Network) -> None:
    """32 prompts x 12 pictures on 32 GPUs: 12 pictures each, 2 forward passes for a backward."""
    one = dev.products(SIZE).total
    found = pace(recipe(), rollout=20, update=3, gpus=32, share=0.5, peak=1000)
    assert found.operations == 12 * (20 * one + 3 * 4 * one)
    assert found.seconds == found.operations / 5e14
    twice = pace(recipe(), rollout=20, update=3, gpus=16, share=0.5, peak=1000)
    assert twice.seconds == 2 * found.seconds
    half = {"guidance__scale": 4.0, "guidance__unconditional_gradient": False}
    guided = pace(recipe(**half), rollout=40, update=6, gpus=32, share=0.5, peak=1000)
    assert guided.operations == 12 * (40 * one + 3 * one + 3 * 4 * one)


def test_another_models_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    text = json.dumps({"_class_name": "QwenImageTransformer2DModel"})
    (tmp_path / "transformer" / "config.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"of a QwenImageTr.*, but FLUX has a FluxTransformer2DMod"
    ):
        network_of(ModelConfig(path=str(tmp_path)))


# ---- activations


def forward(model: Any, image: int, text: int, batch: int) -> None:
    """Evaluates a small FLUX."""
    model(
        hidden_states=torch.randn(batch, image, 64),
        timestep=torch.ones(batch),
        guidance=torch.ones(batch) if model.config.guidance_embeds else None,
        pooled_projections=torch.randn(batch, 48),
        encoder_hidden_states=torch.randn(batch, text, 96),
        txt_ids=torch.zeros(text, 3),
        img_ids=torch.zeros(image, 3),
    )


def saved_bytes(model: Any, evaluate: Callable[[], None], dtype: torch.dtype) -> int:
    """Of all tensors that autograd keeps in a forward pass; weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        evaluate()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# Bytes of each width that a double and a single block keep on a CPU and not on a GPU. On a CPU,
# norms of q and k keep two float32 values for each; on a GPU, one in the dtype of the weights, if
# it is that of q and k. On a CPU, autocast leaves the other norms in bfloat16.
MORE_ON_CPU = {
    ("full", torch.float32): (2 * 4, 2 * 4),
    ("full", torch.bfloat16): (4 * -2, 2 * -2),
    ("lora", torch.float32): (0, 0),
    ("lora", torch.bfloat16): (2 * -2 + 2 * 2, 1 * -2 + 2 * 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", ["full", "lora"])
def test_what_a_forward_pass_keeps_is_measured(train: str, dtype: torch.dtype) -> None:
    """The difference of two lengths: what does not depend on them (casts of weights) is left
    out."""
    torch.manual_seed(0)
    model, network = FluxTransformer2DModel(**SMALL), Network(FLUX, SMALL)
    if train == "lora":
        model.to(dtype).requires_grad_(False)
        model.add_adapter(LoraConfig(r=1, target_modules=FLUX.lora_targets["all"]))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        streamline(model)
    compute = str(dtype).removeprefix("torch.")
    trained = Trained(train, 1, "all", "float32", compute)
    measured, counted = [], []
    for height, width, text in ((256, 192, 64), (128, 128, 32)):
        image = height * width // 256
        evaluate = partial(forward, model, image, text, batch=2)
        double, single = MORE_ON_CPU[train, dtype]
        more = 2 * (image + text) * 128 * (2 * double + 3 * single)
        measured.append(saved_bytes(model, evaluate, dtype) - more)
        counted.append(2 * network.kept(Size(height, width, text), trained).peak(0))
    assert measured[0] - measured[1] == pytest.approx(counted[0] - counted[1], rel=0.02)


def test_with_checkpointing_each_block_keeps_its_input() -> None:
    found = []
    for singles in (1, 3):
        torch.manual_seed(0)
        model = FluxTransformer2DModel(**{**SMALL, "num_single_layers": singles})
        model.enable_gradient_checkpointing()
        model.train()
        found.append(saved_bytes(model, partial(forward, model, 192, 64, batch=2), torch.float32))
    trained = Trained("full", 1, "all", "float32", "float32")
    kept = Network(FLUX, SMALL).kept(Size(256, 192, 64), trained)
    assert found[1] - found[0] == pytest.approx(2 * (kept.inputs[3] + kept.inputs[4]), rel=0.01)
    assert kept.inputs[4] == 4 * 256 * 128
    # Beside that a backward pass has one block at a time anew.
    most = max(kept.blocks)
    assert kept.peak(1) == kept.outside + sum(kept.inputs) + most
    two = kept.blocks[1] + kept.blocks[3]
    assert kept.peak(2) == kept.outside + sum(kept.inputs[::2]) + two + most


@pytest.mark.parametrize(
    ("train", "weights", "compute", "double", "single"),
    [
        ("full", "float32", "bfloat16", 66, 54),
        ("full", "bfloat16", "bfloat16", 54, 42),
        ("lora", "float32", "bfloat16", 42, 36),
        ("full", "float32", "float32", 92, 76),
        ("lora", "float32", "float32", 76, 68),
    ],
)
def test_flux_devs_activations_by_hand(
    train: str, weights: str, compute: str, double: int, single: int, dev: Network
) -> None:
    """Bytes of each width on a GPU, where autocast computes norms in float32, p in others.

    A double block with all weights trained: inputs and outputs of the two norms (4 x 4); q and k
    before their norms (2 x p, or 2 x 8 if weights are not cast beforehand); outputs of attention
    and feed-forward before their gates, q, k, v, the attention output and its copy, the inputs of
    the projections and of the feed-forward, four widths before and four after its activation
    (17 p).
    A single block has one norm and one gate, no copy, and five widths for the last projection. With
    adapters, outputs of norms and ungated outputs are not kept.
    """
    kept = dev.kept(SIZE, Trained(train, 1, "all", weights, compute))
    assert kept.blocks[1] == pytest.approx(double * WIDTH, rel=2e-3)
    assert kept.blocks[20] == pytest.approx(single * WIDTH, rel=2e-3)
    value = 4 if compute == "float32" else 2
    assert {kept.inputs[1], kept.inputs[56]} == {value * WIDTH}
    assert len(kept.blocks) == len(kept.inputs) == 57
    assert kept.outside < 12 * WIDTH


def test_flux_devs_evaluation_by_hand(dev: Network) -> None:
    """At the most, in rotating q and k in the single blocks: the residual, its norm, v, the new q
    and four widths in the feed-forward in bfloat16; q and k in float32, their halves and products;
    15% in addition."""
    assert dev.evaluation(SIZE, "bfloat16") == pytest.approx(1.15 * 34.7 * WIDTH, rel=1e-3)
    # In the decoder, three maps of 256 channels at full size, and two as working memory.
    decoding = decoder_of(recipe().model).activations(720, 720, 64, "bfloat16")
    assert decoding == pytest.approx(5 * 720 * 720 * 256 * 2, rel=2e-3)


# ---- what is held


def test_full_training_on_one_gpu_by_hand(dev: Network) -> None:
    found = memory(named("single", 1), gpus=1, ema__decay=0.9, update__kl=0.1)
    assert found.weights == found.gradients == found.average == found.reference == 4 * P
    assert found.optimizer == 8 * P
    assert found.whole == 2 * 2 * dev.largest_block  # autocast's casts, of the blocks at work
    assert found.stepping == 0
    assert found.text == 2 * sum(ENCODERS.values())
    assert found.vae == 2 * VAE
    assert found.rewards == 4 * PUBLISHED["hpsv2"]
    assert found.states == 32 * 12 * (2 * 4 + 2) * 2025 * 64 * 4
    assert found.held == 20 * P + found.states + found.text + found.vae + found.rewards + CONTEXT
    assert found.peak == found.held + found.whole + 4 * P + found.kept


def test_spread_over_32_gpus_by_hand(dev: Network) -> None:
    two_blocks = 2 * dev.largest_block
    sharded = memory(named("fsdp"))
    assert sharded.weights == P * 4 // 32
    assert sharded.optimizer == P * 8 // 32
    assert sharded.whole == 2 * (two_blocks + dev.outside)
    assert sharded.gradients == P * 4 // 32 + 4 * two_blocks
    once = memory(named("fsdp, gather once"))
    assert (once.weights, once.whole, once.gradients) == (P * 4 // 32, 2 * P, 4 * P)
    hybrid = memory(named("fsdp, hybrid"))
    assert (hybrid.weights, hybrid.optimizer) == (P * 4 // 8, P)
    away = memory(named("fsdp, offload"))
    assert (away.weights, away.optimizer, away.whole) == (0, 0, sharded.whole)
    zero2, zero3 = memory(named("zero2")), memory(named("zero3"))
    assert (zero2.weights, zero2.whole, zero2.optimizer) == (2 * P, 0, P * 12 // 32)
    assert (zero3.weights, zero3.whole) == (P * 2 // 32, sharded.whole)
    assert [s.name for s in spreads(8, 8)] == [
        *("ddp", "fsdp, gather once", "fsdp", "fsdp, offload", "zero2", "zero3")
    ]


def test_lora_by_hand(dev: Network) -> None:
    adapters = sum(dev.adapted(64, "all"))
    found = memory(named("ddp"), model__train="lora", update__kl=0.1)
    assert found.weights == 2 * P + 4 * adapters
    assert (found.gradients, found.optimizer) == (4 * adapters, 8 * adapters)
    assert found.reference == 0
    assert found.whole == 2 * (2 * dev.largest_block * adapters // P)
    for every, share in ((1, 0.0), (2, 0.5)):
        knobs = {"model__gradient_checkpointing": every > 1, "model__checkpoint_every": every}
        kept = memory(named("ddp"), model__train="lora", **knobs)
        if every == 1:  # nothing is recomputed, and backward passes need all casts
            assert kept.whole == 2 * adapters
        else:
            assert kept.whole == pytest.approx(2 * share * adapters, rel=0.1)


def test_a_compiled_block_keeps_what_its_backward_pass_would_need() -> None:
    plain, compiled = (
        memory(named("ddp"), model__compile=how, sampling__micro_batch=12, sampling__decode_batch=1)
        for how in ("off", "inductor")
    )
    more = compiled.evaluating - plain.evaluating
    assert more == pytest.approx(12 * WIDTH * 54, rel=5e-3)  # a double block
    assert compiled.kept == plain.kept


def test_an_optimizer_that_computes_in_float32_needs_room_for_its_largest_weight() -> None:
    knobs = {"update__optimizer": "adamw_8bit", "update__micro_batch": 1}
    found = memory(Spread("single"), gpus=1, **knobs)
    assert found.stepping == 10 * 4 * 3072 * 6 * 3072  # the modulation of a double block
    large = replace(found, stepping=2 * found.kept)
    assert large.peak - found.peak == large.stepping - max(found.kept, found.stepping)


@pytest.mark.parametrize(
    ("knobs", "part", "expected"),
    [
        ({"update__optimizer": "adamw_8bit"}, "optimizer", 2 * P),
        ({"model__weights": "bfloat16_stochastic"}, "weights", 2 * P),
        ({"model__weights": "bfloat16_stochastic"}, "gradients", 2 * P),
        ({"model__weights": "bfloat16_stochastic"}, "whole", 0),
        ({"text__placement": "offload"}, "text", 0),
        ({"text__mode": "embeddings"}, "text", 0),
        ({"scoring__placement": "cpu"}, "rewards", 0),
        ({"scoring__placement": "offload"}, "visiting", 4 * PUBLISHED["hpsv2"]),
        ({"model__compute_dtype": "float32"}, "vae", 4 * VAE),
    ],
)
def test_what_a_knob_does(knobs: dict[str, Any], part: str, expected: int) -> None:
    assert getattr(memory(Spread("single"), gpus=1, **knobs), part) == expected


def test_the_model_folder_is_counted_where_there_is_one(world: Any, tmp_path: Path) -> None:
    config = world.config(tmp_path)
    config.model.path = str(world.model)
    policy = world.policy()
    found = device_memory(config, Spread("single"), 1)
    counts = {
        "weights": policy.pipeline.transformer,
        "vae": policy.pipeline.vae,
        "text": torch.nn.ModuleList([policy.pipeline.text_encoder, policy.pipeline.text_encoder_2]),
    }
    for part, module in counts.items():
        assert getattr(found, part) == 4 * sum(p.numel() for p in module.parameters())
    assert training_memory(config) == found  # what the doctor and an out-of-memory error tell


@pytest.mark.parametrize("train", ["full", "lora"])
def test_only_the_weights_that_are_read_are_counted(train: str, world: Any, tmp_path: Path) -> None:
    """Not those of variants beside them."""
    config = world.config(tmp_path, model__train=train)
    sampled = InferenceConfig(model=SampledModelConfig(path=str(world.model)))
    expected = training_memory(config), trained_weights(config), estimate(sampled)
    config.model.path = sampled.model.path = str(tmp_path / "model")
    shutil.copytree(world.model, tmp_path / "model")
    for file in list((tmp_path / "model").rglob("*.safetensors")):
        shutil.copy2(file, file.with_suffix(".fp16.safetensors"))
    assert (training_memory(config), trained_weights(config), estimate(sampled)) == expected


@pytest.mark.parametrize("part", ["transformer", "vae"])
@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "is not valid JSON"), ("[]", "holds a list"), (" " * (64 * 2**20 + 1), "is larger")],
)
def test_settings_that_cannot_be_read(part: str, content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / part / "config.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path} {words}.*; fetch it again$"):
        settings_of(ModelConfig(path=str(tmp_path)), part)


@pytest.mark.parametrize(
    "content", ["{}", '{"block_out_channels": []}', '{"block_out_channels": ["a"]}']
)
def test_settings_that_make_no_decoder(content: str, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"^vae/config.json .* cannot be used .*; fetch it again$"):
        decoder_of(ModelConfig(path=str(tmp_path))).activations(64, 64, 64, "float32")


def test_settings_that_make_no_network() -> None:
    with pytest.raises(ValueError, match=r"^transformer/config.json .* cannot be used .*; fetch"):
        Network(FLUX, {**SMALL, "num_layers": "many"})


def test_a_part_without_weights_has_the_size_of_its_settings(world: Any, tmp_path: Path) -> None:
    config = world.config(tmp_path)
    shutil.copytree(world.model, tmp_path / "model")
    config.model.path = str(tmp_path / "model")
    whole = training_memory(config)
    (tmp_path / "model" / "vae" / NAME).unlink()
    assert training_memory(config) == whole
    (tmp_path / "model" / "text_encoder" / "model.safetensors").unlink()
    without = training_memory(config)
    assert without.text > 4 * ENCODERS["text_encoder"] > whole.text


# ---- guidance


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, Branches(1, 1, 1, 1.0)),
        ({"scale": 4.0}, Branches(1, 1, 2, 1.0)),
        ({"scale": 4.0, "batched": True}, Branches(2, 2, 2, 1.0)),
        ({"scale": 4.0, "unconditional_gradient": False}, Branches(1, 1, 1, 0.5)),
        ({"scale": 4.0, "batched": True, "update_scale": 1.0}, Branches(2, 1, 1, 1.0)),
        ({"validation_scale": 4.0, "batched": True}, Branches(2, 1, 1, 1.0)),
    ],
)
def test_branches_of_guidance(knobs: dict[str, Any], expected: Branches) -> None:
    config = recipe(**{f"guidance__{name}": value for name, value in knobs.items()})
    assert Branches.of(config) == expected


def test_guidance_keeps_both_branches(dev: Network) -> None:
    knobs = {"sampling__micro_batch": 12, "sampling__decode_batch": 1, "guidance__scale": 4.0}
    plain, apart, batched = (
        memory(named("fsdp"), **more)
        for more in ({**knobs, "guidance__scale": 1.0}, knobs, {**knobs, "guidance__batched": True})
    )
    sampled, evaluation = (n * dev.evaluation(SIZE, "bfloat16") for n in (12, 3))
    assert plain.evaluating == apart.evaluating == sampled
    assert batched.evaluating == 2 * sampled
    assert apart.kept - evaluation == 2 * (plain.kept - evaluation)
    assert batched.kept == 2 * plain.kept


# ---- another family


class Other(Flux):
    """Stable Diffusion 3's transformer: blocks of several kinds, patches by a convolution."""

    weighted: ClassVar[Any] = {"transformer": (SD3Transformer2DModel, None)}
    lora_targets: ClassVar[Any] = {"all": r"transformer_blocks\.\d+\.attn2?\.(to_q|to_k|to_v)"}

    def prepare(self, module: Any, dtype: torch.dtype) -> None:
        """Nothing is registered."""

    def latent_channels(self, transformer: Mapping[str, Any]) -> int:
        return 4 * int(transformer["in_channels"])

    def predict(
        self, module: Any, x: Tensor, sigma: Tensor, text: TextEmbedding, setup: Setup
    ) -> Tensor:
        rows = setup.height // 8
        predicted: Tensor = module(
            hidden_states=x.view(len(x), -1, rows, setup.width // 8),
            timestep=1000 * sigma,
            pooled_projections=text.pooled,
            encoder_hidden_states=text.tokens,
            return_dict=False,
        )[0]
        return predicted.view_as(x)

    def unused_weights(self, module: Any) -> list[str]:
        return ["transformer_blocks.5.attn.to_q"]


OTHER: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 16,
    "num_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 96,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 48,
    "out_channels": 16,
    "pos_embed_max_size": 64,
    "dual_attention_layers": (0, 1, 2),
}


def test_another_family() -> None:
    """Parameters, operations and what autograd keeps, as in the whole model on a CPU."""
    torch.manual_seed(0)
    model, family = SD3Transformer2DModel(**OTHER), Other()
    network, size = Network(family, OTHER), Size(128, 128, 24)
    names = [f"transformer_blocks.{i}" for i in (0, 1, 1, 3, 4, 5)]
    assert list(network.order) == names
    assert network.parameters == sum(p.numel() for p in model.parameters())
    trained = ModelConfig(train="full")
    assert network.unused == 128 * 128 + 128
    assert network.counts(trained) == (network.parameters - network.unused, network.unused)
    assert len(network.adapted(2, "all")) == 2 * (6 * 3 - 1 + 3 * 3)

    def evaluate(size: Size = size) -> None:
        setup = Setup(model.config, size.height, size.width, 1.0)
        x = torch.randn(2, size.height * size.width // 256, 64)
        text = TextEmbedding(torch.randn(2, size.text_length, 96), torch.randn(2, 48))
        family.predict(model, x, torch.ones(2), text, setup)

    with FlopCounterMode(display=False) as counter:
        evaluate()
    products = network.products(size)
    assert 2 * products.weights == counter.get_total_flops()  # which knows no attention on a CPU
    assert products.attention == 4 * 128 * (6 * (64 + 24) ** 2 + 3 * 64**2)
    kept = network.kept(size, Trained("full", 1, "all", "float32", "float32"))
    for parameter in model.transformer_blocks[5].attn.to_q.parameters():
        parameter.requires_grad_(False)
    assert saved_bytes(model, evaluate, torch.float32) == pytest.approx(2 * kept.peak(0), rel=0.01)


# ---- the plan


def test_advice_names_what_fits_or_what_would_help() -> None:
    config = recipe()
    found = rows(config, [1], 8)
    assert [row.train for row in found] == ["full", "lora"]
    (first, *others) = advice(config, found[:1], 80)
    assert first.startswith("full on 1 x 80 GiB: nothing fits; single exceeds it by ")
    assert "GiB less with --model.train lora (single)" in others[0]
    (first, *_) = advice(config, found[1:], 80)
    assert first == "lora on 1 x 80 GiB: fits with single"
    saved = {remedy.knob: remedy.saved for remedy in remedies(config, found[0])}
    assert saved["--update.optimizer adamw_8bit"] == 6 * P
    assert "--ema.decay 0.0" not in saved


def test_the_table_is_markdown() -> None:
    zeros = {field.name: 0 for field in fields(DeviceMemory)}
    row = Row("full", 8, Spread("ddp"), DeviceMemory(**{**zeros, "weights": 80 * 2**30}))
    head, rule, line = table([row], gpu_memory=80)
    assert head.count("|") == rule.count("|") == line.count("|")
    assert line.startswith("| full | 8 | ddp | 80.0 | 0.0 |")
    assert line.endswith("| 80.0 | yes |")
    assert list(table([row], gpu_memory=79))[-1].endswith("| no |")


def test_the_report_says_what_it_assumes() -> None:
    text = report(recipe(), Question(gpus=4, share=0.25), rollout=20, update=3)
    for part in (
        "FLUX.1-dev (nowhere does not exist): 11.90B parameters, 720x720",
        "20.00 + 3.00 evaluations per image (rollout + update) at 25% of 989 TFLOP/s",
        "full on   4 GPUs:",
        "full on 4 x 80 GiB: fits with fsdp",
    ):
        assert part in text


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "flux_mixgrpo", "--gpus", "16", "--model.path", "no"]) == 0
    printed = capsys.readouterr().out
    # Windows begin at steps 0 to 11, 25 iterations each: (l+1 + 12 (24-l)) / 12, 40 / 12.
    assert "19.04 + 3.33 evaluations per image" in printed
    assert "| full | 16 | fsdp |" in printed


def test_the_readmes_command(capsys: pytest.CaptureFixture[str]) -> None:
    readme = README.read_text()
    (command,) = (line for line in readme.splitlines() if line.startswith("python -m mixgrpo plan"))
    assert main(command.split()[3:]) == 0
    assert "| full | 32 | fsdp |" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["foo", "[1]", "4", "null"])
def test_a_rewards_dtype_that_cannot_be(dtype: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--recipe", "flux_mixgrpo", "--model.path", "no"]
    assert main([*words, "--rewards.hpsv2.options.dtype", dtype]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "rewards.hpsv2.options.dtype is" in line
    assert line.endswith("; set it to one of float32, bfloat16, float16")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus is '0'; it must be a positive whole number"),
        (["--gpus", "1.5"], "--gpus is '1.5'; it must be a positive whole number"),
        (["--peak", "fast"], "--peak is 'fast'; it must be a positive number"),
        (["--share", "40"], "--share is 40; it must be at most 1"),
        (["--gpu-memory"], "--gpu-memory needs a value"),
        (["--windo.size", "3"], "there is no knob windo.size; did you mean window.size?"),
    ],
)
def test_wrong_words_are_told(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(words)
    assert str(error.value) == message
