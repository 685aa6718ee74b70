"""The plan's formulas against numbers worked out by hand."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SHAPE, SmallNet, small_text
from torch import Tensor

from mixgrpo.commands import main
from mixgrpo.commands.plan import parse
from mixgrpo.config import Config, RewardConfig
from mixgrpo.files.weight_sets import NAME
from mixgrpo.inference.config import InferenceConfig, SampledModelConfig
from mixgrpo.inference.memory import estimate
from mixgrpo.models.flux import FLUX
from mixgrpo.models.guidance import Guidance, guided
from mixgrpo.planning.branches import Branches
from mixgrpo.planning.device_memory import CONTEXT, DeviceMemory, device_memory
from mixgrpo.planning.memory import trained_weights, training_memory
from mixgrpo.planning.network import Network, Size, network_of
from mixgrpo.planning.operations import Products, operations_per_picture, seconds
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
from mixgrpo.types import TextEmbedding

README = Path(__file__).parent.parent / "mixgrpo" / "engines" / "README.md"
ENCODERS = FLUX.published.encoders
VAE, P = 83_819_683, 11_901_408_320  # parameters of FLUX.1-dev's VAE and transformer
SIZE = Size(720, 720, 512)  # 2025 + 512 tokens
WIDTH = 2537 * 3072  # values that have one number for each channel of each token


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


@pytest.fixture(scope="module")
def dev() -> Network:
    """FLUX.1-dev."""
    return network_of(recipe().model)


# ---- operations


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
        ({}, Branches(1, 1, 1, 1.0, 0)),
        ({"scale": 4.0}, Branches(1, 1, 2, 1.0, 1)),
        ({"scale": 4.0, "batched": True}, Branches(2, 2, 2, 1.0, 0)),
        ({"scale": 4.0, "unconditional_gradient": False}, Branches(1, 1, 1, 0.5, 0)),
        ({"scale": 4.0, "batched": True, "update_scale": 1.0}, Branches(2, 1, 1, 1.0, 0)),
        ({"validation_scale": 4.0, "batched": True}, Branches(2, 1, 1, 1.0, 0)),
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


@pytest.mark.parametrize(("engine", "value"), [("ddp", 4), ("fsdp", 2), ("zero2", 2)])
def test_the_gradient_of_one_branch_waits_for_the_other(engine: str, value: int) -> None:
    """Whole, in the dtype of what the products see; nothing waits in one batch."""
    plain, apart, batched = (
        memory(named(engine), **knobs).gradients
        for knobs in (
            {},
            {"guidance__scale": 4.0},
            {"guidance__scale": 4.0, "guidance__batched": True},
        )
    )
    assert apart - plain == value * P
    assert batched == plain
    (found,) = rows(recipe(guidance__scale=4.0), [1], 8)[:1]
    saved = {r.knob: r.saved for r in remedies(recipe(guidance__scale=4.0), found)}
    assert 0 < saved["--guidance.batched true"] <= 4 * P


@pytest.mark.parametrize("batched", [False, True])
def test_autograd_adds_the_branches_before_an_engine_sees_them(batched: bool) -> None:
    """What the estimate of waiting gradients rests on."""
    net, order = SmallNet(), []
    text = replace(small_text(2), negative=small_text(1, seed=9))

    def velocity(x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
        x = x.detach().requires_grad_()
        x.register_hook(lambda _: order.append("branch"))
        return net(x, sigma, text)

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: order.append("weight"))
    guide = guided(velocity, FLUX.guide, Guidance(4.0, batched))
    guide(torch.ones(2, *SHAPE), torch.full((2,), 0.5), text).square().sum().backward()
    assert [order.count(name) for name in ("weight", "branch")] == [4, 1 if batched else 2]
    assert order[0] == ("weight" if batched else "branch")


def test_sampling_with_guidance_in_one_batch(world: Any) -> None:
    config = InferenceConfig(model=SampledModelConfig(path=str(world.model)))
    plain = estimate(config)
    config.guidance.scale = 4.0
    assert estimate(config) == plain
    config.guidance.batched = True
    assert estimate(config) == replace(plain, evaluation=2 * plain.evaluation)


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


def test_the_report_on_another_family(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model.family", "qwen_image", "--model.path", "no", "--guidance.scale", "4"]
    assert main(["plan", "--recipe", "flux_mixgrpo", *words]) == 0
    printed = capsys.readouterr().out
    assert "for Qwen-Image (no does not exist): 20.43B parameters, 720x720" in printed
    assert "38.08 + 6.67 evaluations per image" in printed  # both branches


@pytest.mark.parametrize("command", ["plan", "schedule"])
def test_guidance_that_a_family_does_not_have(command: str, capfd: Any) -> None:
    words = ["--model.family", "flux", "--model.path", "no", "--guidance.update_scale", "4"]
    assert main([command, "--recipe", "flux_mixgrpo", *words]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "guidance.update_scale is 4, but FLUX has no classifier-free guidance" in line


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
