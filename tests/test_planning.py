"""The plan's formulas against numbers worked out by hand, and against models."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from mixgrpo.commands import main
from mixgrpo.commands.plan import parse
from mixgrpo.config import Config, RewardConfig
from mixgrpo.files.weight_sets import NAME
from mixgrpo.inference.config import InferenceConfig, SampledModelConfig
from mixgrpo.inference.memory import estimate
from mixgrpo.models.adapters import streamline
from mixgrpo.models.flux import FLUX
from mixgrpo.planning.activations import Precision, double_block_bytes, kept_bytes
from mixgrpo.planning.device_memory import CONTEXT, DeviceMemory, device_memory, first_width
from mixgrpo.planning.flux_size import FluxSize, Products
from mixgrpo.planning.memory import trained_weights, training_memory
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
from mixgrpo.planning.spread import Spread, spreads

README = Path(__file__).parent.parent / "mixgrpo" / "engines" / "README.md"
DEV = FluxSize()
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


def test_flux_devs_parameters_by_hand() -> None:
    """D = 3072: a D x D layer has 9,440,256 weights and biases, D x 4D 37,761,024 and so on."""
    assert DEV.width == 3072
    assert DEV.double_block == 2 * (56_641_536 + 4 * 9_440_256 + 256 + 37_761_024 + 37_751_808)
    assert DEV.single_block == 28_320_768 + 3 * 9_440_256 + 256 + 37_761_024 + 47_188_992
    assert DEV.outside == 64_124_992
    assert DEV.parameters == P
    assert DEV.adapters(16, "attention") == 16 * 266 * 6144
    assert DEV.adapters(16, "all") == 16 * (266 * 6144 + 76 * 15360 + 38 * (15360 + 18432))


@pytest.mark.parametrize("guidance", [True, False])
def test_parameters_and_operations_are_the_models(guidance: bool) -> None:
    """Counted on the meta device. Attention on the CPU's meta kernel counts its two products."""
    config = {**SMALL, "guidance_embeds": guidance}
    size, image, text = FluxSize.from_config(config), 40, 24
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
        with FlopCounterMode(display=False) as counter:
            model(
                hidden_states=torch.empty(1, image, 64),
                timestep=torch.empty(1),
                guidance=torch.empty(1) if guidance else None,
                pooled_projections=torch.empty(1, 48),
                encoder_hidden_states=torch.empty(1, text, 96),
                txt_ids=torch.empty(text, 3),
                img_ids=torch.empty(image, 3),
            )
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.products(image, text).total == counter.get_total_flops()


def test_flux_devs_operations_by_hand() -> None:
    """57 blocks of 24 S D^2 + 4 S^2 D for S = 2025 + 512 tokens, and 0.1% beside."""
    found = DEV.products(2025, 512)
    assert found.attention == 57 * 4 * 2537**2 * 3072
    assert found.weights == pytest.approx(57 * 24 * 2537 * 3072**2, rel=2e-3)
    assert found.total == pytest.approx(37.3e12, rel=2e-3)
    assert DEV.products(4096, 512).total == pytest.approx(74.4e12, rel=2e-3)


def test_operations_of_an_iteration_by_hand() -> None:
    products = Products(weights=10, attention=1)
    full = operations_per_picture(products, 2, 3, True, recomputed=1, with_reference=False)
    assert full == 2 * 11 + 3 * (11 + 11 + 22)
    lora = operations_per_picture(products, 2, 3, False, recomputed=0.5, with_reference=True)
    assert lora == 2 * 11 + 3 * (11 * 2.5 + 12)
    assert seconds(2e15, share=0.4, peak=1000) == 5


def test_the_pace_by_hand() -> None:
    """32 prompts x 12 pictures on 32 GPUs: 12 pictures each, 2 forward passes for a backward."""
    one = DEV.products(2025, 512).total
    found = pace(recipe(), rollout=20, update=3, gpus=32, share=0.5, peak=1000)
    assert found.operations == 12 * (20 * one + 3 * 4 * one)
    assert found.seconds == found.operations / 5e14
    twice = pace(recipe(), rollout=20, update=3, gpus=16, share=0.5, peak=1000)
    assert twice.seconds == 2 * found.seconds


def test_another_models_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    text = json.dumps({"_class_name": "QwenImageTransformer2DModel"})
    (tmp_path / "transformer" / "config.json").write_text(text)
    with pytest.raises(ValueError, match="only for FluxTransformer2DModel, but this is a Qwen"):
        FluxSize.of_folder(tmp_path)


# ---- activations


def saved_bytes(model: Any, image: int, text: int, dtype: torch.dtype) -> int:
    """Of all tensors that autograd keeps in a forward pass of two pictures; weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model(
            hidden_states=torch.randn(2, image, 64),
            timestep=torch.ones(2),
            guidance=torch.ones(2),
            pooled_projections=torch.randn(2, 48),
            encoder_hidden_states=torch.randn(2, text, 96),
            txt_ids=torch.zeros(text, 3),
            img_ids=torch.zeros(image, 3),
        )
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# On a CPU norms of q and k keep two float32 values for each, and autocast leaves other norms alone.
ON_CPU = {torch.float32: Precision(4, 4, 8), torch.bfloat16: Precision(2, 2, 8)}


@pytest.mark.parametrize("dtype", list(ON_CPU))
@pytest.mark.parametrize("train", ["full", "lora"])
def test_what_a_forward_pass_keeps_is_measured(train: str, dtype: torch.dtype) -> None:
    """Within 4%: left out are values per token and head, and adapters' values of their rank.

    The difference of two lengths: what does not depend on them (casts of weights) is left out.
    """
    torch.manual_seed(0)
    model, size = FluxTransformer2DModel(**SMALL), FluxSize.from_config(SMALL)
    if train == "lora":
        model.to(dtype).requires_grad_(False)
        model.add_adapter(LoraConfig(r=1, target_modules=FLUX.lora_targets["all"]))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        streamline(model)
    found = saved_bytes(model, 192, 64, dtype) - saved_bytes(model, 64, 32, dtype)
    expected = [
        kept_bytes(size, image, text, 2, ON_CPU[dtype], train == "full", recompute_every=0)
        for image, text in ((192, 64), (64, 32))
    ]
    assert found == pytest.approx(expected[0] - expected[1], rel=0.04)


def test_with_checkpointing_each_block_keeps_its_input() -> None:
    found = []
    for singles in (1, 3):
        torch.manual_seed(0)
        model = FluxTransformer2DModel(**{**SMALL, "num_single_layers": singles})
        model.enable_gradient_checkpointing()
        model.train()
        found.append(saved_bytes(model, 192, 64, torch.float32))
    size, width = FluxSize.from_config(SMALL), 2 * (192 + 64) * 128
    assert found[1] - found[0] == pytest.approx(2 * 4 * width, rel=0.01)
    ends = 2 * 192 * 128 * 3 * 4
    # Beside that a backward pass has one block at a time anew; full: 25 widths of a double block.
    precision = ON_CPU[torch.float32]
    kept = kept_bytes(size, 192, 64, 2, precision, train_all=True, recompute_every=1)
    assert kept == 5 * 4 * width + ends + 25 * 4 * width
    half = kept_bytes(size, 192, 64, 2, precision, train_all=True, recompute_every=2)
    assert half == (3 * 4 + 25 * 4 + 21 * 4) * width + ends + 25 * 4 * width


def test_flux_devs_activations_by_hand() -> None:
    """In bfloat16 on a GPU, weights float32: 54 bytes in each single block, 66 in a double one."""
    precision = Precision.on_gpu(compute=2, weights=4)
    assert precision == Precision(product=2, norm=4, head_norm=8)
    kept = kept_bytes(DEV, 2025, 512, 3, precision, train_all=True, recompute_every=0)
    ends = 3 * 2025 * 3072 * (4 + 4 + 2)
    assert kept == 3 * 2537 * 3072 * (19 * 66 + 38 * 54) + ends
    checkpointed = kept_bytes(DEV, 2025, 512, 3, precision, train_all=True, recompute_every=1)
    assert checkpointed == 3 * 2537 * 3072 * (57 * 2 + 66) + ends


# ---- what is held


def test_full_training_on_one_gpu_by_hand() -> None:
    found = memory(named("single", 1), gpus=1, ema__decay=0.9, update__kl=0.1)
    assert found.weights == found.gradients == found.average == found.reference == 4 * P
    assert found.optimizer == 8 * P
    assert found.whole == 2 * 2 * DEV.double_block  # autocast's casts, of the blocks at work
    assert found.stepping == 0
    assert found.text == 2 * (PUBLISHED["text_encoder"] + PUBLISHED["text_encoder_2"])
    assert found.vae == 2 * PUBLISHED["vae"]
    assert found.rewards == 4 * PUBLISHED["hpsv2"]
    assert found.states == 32 * 12 * (2 * 4 + 2) * 2025 * 64 * 4
    assert found.held == 20 * P + found.states + found.text + found.vae + found.rewards + CONTEXT
    assert found.peak == found.held + found.whole + 4 * P + found.kept


def test_spread_over_32_gpus_by_hand() -> None:
    two_blocks = 2 * DEV.double_block
    sharded = memory(named("fsdp"))
    assert sharded.weights == P * 4 // 32
    assert sharded.optimizer == P * 8 // 32
    assert sharded.whole == 2 * (two_blocks + DEV.outside)
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


def test_lora_by_hand() -> None:
    adapters = DEV.adapters(64, "all")
    found = memory(named("ddp"), model__train="lora", update__kl=0.1)
    assert found.weights == 2 * P + 4 * adapters
    assert (found.gradients, found.optimizer) == (4 * adapters, 8 * adapters)
    assert found.reference == 0
    assert found.whole == 2 * (2 * DEV.double_block * adapters // P)
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
    block = double_block_bytes(Precision.on_gpu(2, 2), train_all=True)
    assert compiled.evaluating - plain.evaluating == 12 * 2537 * 3072 * block
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
        ({"model__compute_dtype": "float32"}, "vae", 4 * PUBLISHED["vae"]),
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
    read = FluxSize.of_folder if part == "transformer" else first_width
    with pytest.raises(ValueError, match=rf"{path} {words}.*; fetch it again$"):
        read(tmp_path)


def test_a_width_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    for content in ("{}", '{"block_out_channels": []}', '{"block_out_channels": ["a"]}'):
        (tmp_path / "vae" / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config.json has block_out_channels .* fetch it"):
            first_width(tmp_path)


def test_a_part_without_weights_has_the_published_size(world: Any, tmp_path: Path) -> None:
    config = world.config(tmp_path)
    shutil.copytree(world.model, tmp_path / "model")
    config.model.path = str(tmp_path / "model")
    (tmp_path / "model" / "vae" / NAME).unlink()
    assert training_memory(config).vae == 4 * PUBLISHED["vae"]


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
