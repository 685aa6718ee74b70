"""What plans count in networks without memory, against numbers worked out by hand and models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from new_family import SD3, StableDiffusion3
from peft import LoraConfig
from small_qwen import qwen_transformer
from torch.utils.flop_counter import FlopCounterMode

from mixgrpo.config import ModelConfig
from mixgrpo.models.adapters import streamline
from mixgrpo.models.family import Setup
from mixgrpo.models.flux import FLUX
from mixgrpo.models.qwen_image import QWEN_IMAGE
from mixgrpo.planning.decoder import decoder_of
from mixgrpo.planning.network import Network, Size, Trained, network_of
from mixgrpo.planning.settings import settings_of
from mixgrpo.types import TextEmbedding

NOWHERE = ModelConfig(path="nowhere")  # FLUX.1-dev's sizes
SIZE = Size(720, 720, 512)  # 2025 + 512 tokens
WIDTH = 2537 * 3072  # values that have one number for each channel of each token
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


@pytest.fixture(scope="module")
def dev() -> Network:
    """FLUX.1-dev."""
    return network_of(NOWHERE)


# ---- parameters and operations


def test_flux_devs_parameters_by_hand(dev: Network) -> None:
    """D = 3072: a D x D layer has 9,440,256 weights and biases, D x 4D 37,761,024 and so on."""
    double = 2 * (56_641_536 + 4 * 9_440_256 + 256 + 37_761_024 + 37_751_808)
    single = 28_320_768 + 3 * 9_440_256 + 256 + 37_761_024 + 47_188_992
    assert dev.largest_block == double
    assert dev.outside == 64_124_992
    assert dev.parameters == 11_901_408_320 == 19 * double + 38 * single + 64_124_992
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


def saved_bytes(model: Any, evaluate: Callable[[], Any], dtype: torch.dtype) -> int:
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
    """Most is alive while a single block rotates q and k: four widths of the feed-forward and six
    others in bfloat16, three in float32, and the embedded inputs; 15% are added."""
    assert dev.evaluation(SIZE, "bfloat16") == pytest.approx(1.15 * 34.7 * WIDTH, rel=1e-3)
    # In the decoder, three maps of 256 channels at full size, and two as working memory.
    decoding = decoder_of(NOWHERE).activations(720, 720, 64, "bfloat16")
    assert decoding == pytest.approx(5 * 720 * 720 * 256 * 2, rel=2e-3)


# ---- other families


def test_qwen_images_numbers() -> None:
    """60 blocks of 24 S D^2 + 4 S^2 D for S = 1024 + 64 tokens, and modulations."""
    network = network_of(replace(NOWHERE, family="qwen_image"))
    assert network.parameters == 20_430_401_088
    # Of the last block, the feed-forward of the text, its queries, and its attention's output.
    feed_forward = 3072 * 4 * 3072 * 2 + 5 * 3072
    assert network.unused == feed_forward + 2 * (3072**2 + 3072) + 128
    found = network.products(Size(512, 512, 64))
    assert found.attention == 60 * 4 * 1088**2 * 3072
    assert found.weights == pytest.approx(60 * 24 * 1088 * 3072**2, rel=5e-3)
    assert found.total == pytest.approx(15.7e12, rel=2e-3)
    assert network.products(Size(1024, 1024, 64)).total == pytest.approx(69.3e12, rel=1e-3)
    decoder = decoder_of(replace(NOWHERE, family="qwen_image"))
    assert decoder.parameters == 126_892_531


def test_what_a_small_qwen_image_keeps_is_measured() -> None:
    torch.manual_seed(0)
    model, size = qwen_transformer(layers=4), Size(128, 128, 24)
    network = Network(QWEN_IMAGE, model.config)
    setup = Setup(model.config, size.height, size.width, 1.0)
    text = TextEmbedding(torch.randn(2, size.text_length, model.config.joint_attention_dim))
    x, sigma = torch.randn(2, 64, model.config.in_channels), torch.ones(2)
    evaluate = partial(QWEN_IMAGE.predict, model, x, sigma, text, setup)
    kept = network.kept(size, Trained("full", 1, "all", "float32", "float32"))
    assert saved_bytes(model, evaluate, torch.float32) == pytest.approx(2 * kept.peak(0), rel=0.01)


class Other(StableDiffusion3):
    """Blocks of several kinds, patches by a convolution; one layer has no effect."""

    def unused_weights(self, transformer: Mapping[str, Any]) -> list[str]:
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
    # In the last block the text has no output.
    assert len(network.adapted(2, "all")) == 2 * (6 * 8 - 1 - 1 + 3 * 4)

    def evaluate(size: Size = size) -> None:
        setup = Setup(model.config, size.height, size.width, 1.0)
        x = torch.randn(2, size.height * size.width // 64, 16)
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


def test_sd3s_numbers() -> None:
    network = Network(SD3, SD3.published.settings["transformer"])
    assert network.parameters == 2_243_171_520
    # 333 tokens of a prompt: 77 of the CLIPs, 256 of T5.
    assert network.products(Size(512, 512, 333)).total == pytest.approx(2.44e12, rel=2e-3)


# ---- settings


def test_another_models_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    text = json.dumps({"_class_name": "QwenImageTransformer2DModel"})
    (tmp_path / "transformer" / "config.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"of a QwenImageTr.*, but FLUX has a FluxTransformer2DMod"
    ):
        network_of(ModelConfig(path=str(tmp_path)))


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


@pytest.mark.parametrize(
    "settings",
    [{"num_layers": "many"}, {"num_layers": 0, "num_single_layers": 0}, {"axes_dims_rope": [2]}],
)
def test_settings_that_make_no_network(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^transformer/config.json .* cannot be used .*; fetch"):
        Network(FLUX, {**SMALL, **settings}).products(Size(32, 32, 8))
