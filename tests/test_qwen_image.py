"""Qwen-Image against plain diffusers: sampling, text, decoding, schedules, names, precision."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from small import CPU, Recording, perturbed, small_noise, small_plan
from small_qwen import SCHEDULER, qwen_pipeline
from torch import Tensor

from mixgrpo.config import EncoderConfig, ModelConfig, PreprocessConfig, UpdateConfig
from mixgrpo.maths.schedule import flash_sigmas, make_sigmas, shift_time
from mixgrpo.maths.transitions import log_ratio
from mixgrpo.methods.grpo import Objective, update
from mixgrpo.models.compiled import compile_blocks
from mixgrpo.models.guidance import Guidance
from mixgrpo.models.policy import DiffusersPolicy, speed_up
from mixgrpo.models.qwen_image import QWEN_IMAGE
from mixgrpo.models.text import TextEncoders
from mixgrpo.rollout import rollout, sample_ode
from mixgrpo.text.preprocess import preprocess
from mixgrpo.types import TextEmbedding, Window

META = torch.device("meta")
# 9 and 13 tokens, with those behind the prompt
TEXTS = [
    "a red circle on a gray background",
    "a blue square left of a red cross on a white background",
]
PARAMETERS = 20_430_401_088


def policy_of(pipeline: QwenImagePipeline, **knobs: Any) -> DiffusersPolicy:
    given = {
        "path": "unused",
        "compute_dtype": "float32",
        "height": 64,
        "width": 64,
        "text_length": 64,
        "gradient_checkpointing": False,
        "lora_rank": 2,
        "lora_alpha": 4,
    }
    return DiffusersPolicy(QWEN_IMAGE, pipeline, ModelConfig(**{**given, **knobs}), CPU)


def trained(layers: int = 2, **knobs: Any) -> DiffusersPolicy:
    """A policy to train, the adapters of which are not zero."""
    policy = policy_of(qwen_pipeline(layers=layers), **knobs)
    policy.make_trainable(seed=0)
    if knobs.get("train") == "lora":
        perturbed(policy.module, 0.02)
    return policy


@pytest.fixture(scope="module")
def base() -> DiffusersPolicy:
    """Not to be changed."""
    return policy_of(qwen_pipeline())


@pytest.fixture(scope="module")
def plain() -> QwenImagePipeline:
    """The same weights, which our code never touches."""
    return qwen_pipeline()


def guided_text(policy: DiffusersPolicy, prompts: Sequence[str] = TEXTS) -> TextEmbedding:
    return replace(policy.encode(prompts), negative=policy.encode([QWEN_IMAGE.negative]))


def noise_of(policy: DiffusersPolicy, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(count, *policy.latent_shape, generator=generator)


def our_latents(policy: DiffusersPolicy, steps: int, scale: float, prompts: Sequence[str]):
    spacing = QWEN_IMAGE.spacing(SCHEDULER, policy.latent_shape[0], steps)
    return sample_ode(
        policy.velocity(policy.module, Guidance(scale)),
        noise_of(policy, len(prompts)),
        guided_text(policy, prompts),
        make_sigmas(steps, spacing),
        micro_batch=8,
    )


def their_images(
    pipeline: QwenImagePipeline, policy: DiffusersPolicy, steps: int, scale: float,
    prompts: Sequence[str], output: str,
) -> Tensor:  # fmt: skip
    return pipeline(
        prompt=list(prompts),
        negative_prompt=[" "] * len(prompts) if scale > 1 else None,
        true_cfg_scale=scale,
        latents=noise_of(policy, len(prompts)),
        num_inference_steps=steps,
        height=policy.config.height,
        width=policy.config.width,
        max_sequence_length=policy.config.text_length,
        output_type=output,
    ).images


# ---- sampling is the pipeline's


@pytest.mark.parametrize(
    ("scale", "steps", "prompts"),
    [(1.0, 10, TEXTS), (4.0, 10, TEXTS), (4.0, 50, TEXTS), (4.0, 10, TEXTS[:1])],
)
def test_latents_are_the_pipelines(base, plain, scale, steps, prompts):
    ours = our_latents(base, steps, scale, prompts)
    theirs = their_images(plain, base, steps, scale, prompts, "latent")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - noise_of(base, len(prompts))).abs().max() > 1
    assert theirs.abs().max() < 50


def test_a_negative_prompt_matters_and_so_do_the_prompts(base):
    plain, guided = (our_latents(base, 4, scale, TEXTS) for scale in (1.0, 4.0))
    assert (plain - guided).abs().max() > 0.05
    assert (plain - our_latents(base, 4, 1.0, TEXTS[::-1])).abs().max() > 0.05


@pytest.mark.parametrize(("side", "steps"), [(512, 10), (1024, 2)])
def test_latents_of_large_pictures_are_the_pipelines(side, steps):
    """With one block, for the tokens of 512 and of 1024 pixels."""
    policy = policy_of(qwen_pipeline(layers=1), height=side, width=side)
    assert policy.latent_shape == ((side // 16) ** 2, 64)
    ours = our_latents(policy, steps, 4.0, TEXTS[:1])
    theirs = their_images(qwen_pipeline(layers=1), policy, steps, 4.0, TEXTS[:1], "latent")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_pictures_that_are_not_square(plain):
    policy = policy_of(qwen_pipeline(), height=96, width=48)
    ours = policy.decode(our_latents(policy, 4, 4.0, TEXTS))
    theirs = their_images(plain, policy, 4, 4.0, TEXTS, "pt")
    assert ours.shape == (2, 3, 96, 48)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_decoding_is_the_pipelines(base, plain):
    theirs = their_images(plain, base, 4, 4.0, TEXTS, "pt")
    ours = base.decode(our_latents(base, 4, 4.0, TEXTS))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert ours.std() > 0.01
    vae = base.pipeline.vae.config  # as published, and not the identity
    assert (vae.latents_mean[0], vae.latents_std[0]) == (-0.7571, 2.8184)


def test_guidance_keeps_each_tokens_norm():
    generator = torch.Generator().manual_seed(0)
    c, u = torch.randn(2, 2, 3, 64, generator=generator)
    y = u + 4 * (c - u)
    found = QWEN_IMAGE.guide(c, u, 4.0)
    torch.testing.assert_close(found.norm(dim=-1), c.norm(dim=-1))
    torch.testing.assert_close(
        found, y * c.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True)
    )
    torch.testing.assert_close(QWEN_IMAGE.guide(c, u, 1.0), c)
    nothing = torch.zeros(1, 1, 64)
    assert torch.equal(QWEN_IMAGE.guide(nothing, nothing, 4.0), nothing)


# ---- schedules


def of_scheduler(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int, u: Any) -> Tensor:
    """As the pipeline asks for them."""
    config = scheduler.config
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(config[key] for key in keys))
    scheduler.set_timesteps(sigmas=u, mu=mu if config["use_dynamic_shifting"] else None)
    return scheduler.sigmas


@pytest.mark.parametrize("side", [512, 1024, 1328])
@pytest.mark.parametrize("steps", [10, 25, 50])
def test_schedules_are_the_schedulers(side, steps):
    tokens = QWEN_IMAGE.tokens(side, side)
    theirs = of_scheduler(
        FlowMatchEulerDiscreteScheduler(**SCHEDULER), tokens, np.linspace(1, 1 / steps, steps)
    )
    for settings in (SCHEDULER, {}):  # a folder without a scheduler has the published one
        ours = make_sigmas(steps, QWEN_IMAGE.spacing(settings, tokens, steps))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert ours[-2] == pytest.approx(0.02, abs=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dynamic_shifting": False, "shift": 3.0},
        {"use_dynamic_shifting": False},
        {"use_dynamic_shifting": True},
        {**SCHEDULER, "shift_terminal": None},
        {**SCHEDULER, "shift_terminal": 0},
        {**SCHEDULER, "time_shift_type": "linear"},
        {**SCHEDULER, "max_shift": 1.5, "shift_terminal": 0.1},
    ],
)
def test_other_schedulers_in_the_folder_are_followed(settings):
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    theirs = of_scheduler(scheduler, 1024, np.linspace(1, 0.1, 10))
    ours = make_sigmas(10, QWEN_IMAGE.spacing(settings, 1024, 10))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("max_shift", "x", "is not a number"),
        ("max_shift", 1e9, "makes the shift inf"),
        ("shift_terminal", "x", "is not a number"),
        ("shift_terminal", 1.0, "is not between 0 and 1"),
        ("base_image_seq_len", None, "is not a number"),
        ("base_image_seq_len", 8192, "leaves no range"),
        ("use_karras_sigmas", True, "spaces the steps in another way"),
    ],
)
def test_a_damaged_scheduler_is_named(key, value, reason):
    with pytest.raises(ValueError, match=rf"{key} {value!r}, which {reason}; fetch"):
        QWEN_IMAGE.spacing({**SCHEDULER, key: value}, 1024, 10)


def test_flashs_tail_has_the_base_schedules_stretch():
    spacing, window = QWEN_IMAGE.spacing(SCHEDULER, 1024, 10), Window(2, 4)
    base, flash = make_sigmas(10, spacing), flash_sigmas(10, spacing, window, 0.5)
    assert torch.equal(flash[:5], base[:5])
    u = torch.tensor([0.6 * (1 - i / 3) for i in range(1, 3)])  # 3 steps for 6
    bare = shift_time(torch.cat([u, torch.tensor([0.9, 0.1])]), spacing.shift)
    factor = (1 - base[1]) / (1 - bare[2])
    torch.testing.assert_close(flash[5:7], 1 - (1 - bare[:2]) * factor)
    assert factor == pytest.approx(0.98 / (1 - bare[3]))
    assert flash[-1] == 0


# ---- text


def test_text_is_the_pipelines(base, plain):
    found = base.encode(TEXTS)
    tokens, mask = plain.encode_prompt(TEXTS, device=CPU, max_sequence_length=64)
    torch.testing.assert_close(found.tokens, tokens, rtol=0, atol=1e-5)
    assert found.lengths.tolist() == mask.sum(1).tolist() == [7 + 5, 12 + 5]
    assert found.pooled is None
    assert (tokens[0, :12] - tokens[1, :12]).abs().max() > 0.1


def test_prompts_are_embedded_each_for_itself(base):
    together, alone = base.encode(TEXTS), [base.encode([text]) for text in TEXTS]
    for row, text in enumerate(alone):
        length = int(together.lengths[row])
        assert text.lengths is None
        assert torch.equal(text.tokens[0], together.tokens[row, :length])
        assert not together.tokens[row, length:].any()
    assert base.encode([TEXTS[0]] * 2).lengths is None
    assert base.encode([" "]).tokens.shape == (1, 1 + 5, 64)


def test_long_prompts_are_cut_and_counted(base):
    words = "a red circle"
    count = [len(base.encode([text]).tokens[0]) for text in (words, TEXTS[1])]
    assert QWEN_IMAGE.count_tokens(base.pipeline.tokenizer, [words, TEXTS[1]]) == count
    assert count == [3 + 5, 12 + 5]
    text = TextEncoders(QWEN_IMAGE, base.pipeline, 8, CPU, "device")
    cut = text.encode(TEXTS)
    assert cut.tokens.shape == (2, 8, 64)
    assert cut.lengths is None
    assert torch.equal(cut.tokens[:1], base.encode(TEXTS[:1]).tokens[:, :8])
    assert text.count_truncated([words, *TEXTS]) == 2


def test_stored_text_is_the_encoders_own(qwen_world, tmp_path):
    from mixgrpo.assembly import make_stored_text

    config = qwen_world.config(tmp_path, model__text_length=24)
    model = EncoderConfig(path=str(qwen_world.model), text_length=24)
    files = [str(qwen_world.prompts), str(qwen_world.validation_prompts)]
    output = str(tmp_path / "stored")
    preprocess(
        PreprocessConfig(
            prompts_files=files, output=output, model=model, dtype="float32", shard_size=3,
            progress=False,
        )
    )  # fmt: skip
    config.text.mode, config.text.embeddings = "embeddings", output
    prompts = [*qwen_world.prompts.read_text().splitlines(), " "]
    stored = make_stored_text(config, prompts, CPU)
    policy = DiffusersPolicy.load(config.model, CPU, 7)
    for some in (prompts, prompts[:1], [" "], prompts[3:5]):
        found, expected = stored.encode(some), policy.encode(some)
        assert torch.equal(found.tokens, expected.tokens)
        assert (found.lengths is None) == (expected.lengths is None)
        assert torch.equal(found.true_lengths, expected.true_lengths)
    assert TextEncoders.bytes_per_prompt(config.model) == 24 * 64 * 4


def test_padding_changes_nothing(base):
    """However much there is, and whatever it holds; as it does when no mask is given."""
    text = base.encode(TEXTS)
    velocity, (x, sigma) = base.velocity(base.module), inputs(base)
    with torch.no_grad():
        found = velocity(x, sigma, text)
        for row in range(2):
            at = slice(row, row + 1)
            alone = velocity(x[at], sigma[at], base.encode([TEXTS[row]]))
            torch.testing.assert_close(found[at], alone, rtol=0, atol=1e-5)
        filled = text.tokens.clone()
        filled[0, int(text.lengths[0]) :] = 100.0
        assert torch.equal(velocity(x, sigma, replace(text, tokens=filled)), found)
        seen = velocity(x, sigma, TextEmbedding(filled))
    assert (seen - found).abs().max() > 1e-3


def test_compiled_blocks_see_few_lengths_of_texts(base):
    """Each would be compiled anew."""
    policy, seen = policy_of(qwen_pipeline(), compile="aot_eager"), set()
    policy.module.transformer_blocks[0].register_forward_pre_hook(
        lambda module, args, given: seen.add(tuple(given["encoder_hidden_states"].shape)),
        with_kwargs=True,
    )
    with torch.no_grad():
        for text in (base.encode(TEXTS), base.encode(TEXTS[:1] * 2)):
            found, expected = (p.velocity(p.module)(*inputs(p), text) for p in (policy, base))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert seen == {(2, 128, 64)}


def inputs(policy: DiffusersPolicy) -> tuple[Tensor, Tensor]:
    return noise_of(policy), torch.tensor([0.3, 0.9])


@pytest.mark.parametrize(
    "load",
    [
        lambda c: DiffusersPolicy.load(c, CPU, 0),
        lambda c: DiffusersPolicy.frozen(c, CPU),
        lambda c: TextEncoders.load(c, CPU),
        TextEncoders.identify,
    ],
    ids=["training", "sampling", "encoding", "identifying"],
)
def test_longer_texts_than_the_pipelines_are_refused(qwen_world, load):
    config = ModelConfig(path=str(qwen_world.model), text_length=1025)
    with pytest.raises(
        ValueError,
        match=r"text_length is 1025, but Qwen-Image reads at most 1024 tokens; set --model\.",
    ):
        load(config)
    load(replace(config, text_length=1024, compute_dtype="float32"))


@pytest.mark.parametrize("attention", ["flash", "_native_flash"])
def test_attention_without_masks_is_refused(qwen_world, attention):
    config = ModelConfig(path=str(qwen_world.model), attention=attention)
    with pytest.raises(ValueError, match=rf"'{attention}', which takes no masks, but Qwen-Image"):
        DiffusersPolicy.load(config, CPU, 0)


@pytest.mark.parametrize("attention", ["_native_math", "flex"])
def test_attention_backends_mask_too(base, attention):
    policy = policy_of(qwen_pipeline())
    try:
        speed_up(policy.module, ModelConfig(attention=attention))
        given = (*inputs(base), base.encode(TEXTS))
        with torch.no_grad():
            found, expected = (p.velocity(p.module)(*given) for p in (policy, base))
    finally:
        policy.module.set_attention_backend("native")  # diffusers remembers the last one
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# ---- its real size


def names() -> Iterator[str]:
    """The published transformer's keys, written down block by block."""
    both = ("weight", "bias")
    attention = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0",
                 "to_add_out")  # fmt: skip
    inside = [f"attn.{name}" for name in attention] + ["img_mod.1", "txt_mod.1"]
    inside += [f"{mlp}.net.{part}" for mlp in ("img_mlp", "txt_mlp") for part in ("0.proj", "2")]
    norms = ("q", "k", "added_q", "added_k")
    for i in range(60):
        yield from (f"transformer_blocks.{i}.{name}.{end}" for name in inside for end in both)
        yield from (f"transformer_blocks.{i}.attn.norm_{name}.weight" for name in norms)
    outer = ["img_in", "txt_in", "norm_out.linear", "proj_out"]
    outer += [f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)]
    yield from (f"{name}.{end}" for name in outer for end in both)
    yield "txt_norm.weight"


@pytest.fixture(scope="module")
def published() -> QwenImageTransformer2DModel:
    """The transformer by its published configuration, which is diffusers' default."""
    with META:
        return QwenImageTransformer2DModel()


def test_it_has_the_published_weights(published):
    assert sum(p.numel() for p in published.parameters()) == PARAMETERS
    assert set(published.state_dict()) == set(names())
    assert len(list(names())) == 1933


@pytest.mark.parametrize(("kind", "count", "weights"), [("attention", 478, None),
                                                        ("all", 716, 424_673_280)])  # fmt: skip
def test_the_targets_fit_it(published, kind, count, weights):
    linear = {n: m for n, m in published.named_modules() if isinstance(m, torch.nn.Linear)}
    matched = {n: m for n, m in linear.items() if re.fullmatch(QWEN_IMAGE.lora_targets[kind], n)}
    assert len(matched) == 60 * (8 if kind == "attention" else 12)
    used = [n for n in matched if QWEN_IMAGE.uses(n + ".weight", published.config)]
    assert len(used) == count
    if weights:  # of rank 64, as counted for verl-omni's recipe, which adapts the last block too
        assert sum(64 * (m.in_features + m.out_features) for m in matched.values()) == weights
    frozen = [p.numel() for n, p in published.named_parameters()
              if not QWEN_IMAGE.uses(n, published.config)]  # fmt: skip
    assert sum(frozen) == 3072 * 3072 * 2 + 2 * 3072 + 128 + 2 * 3072 * 12288 + 3072 + 12288


# ---- what is trained


@pytest.mark.parametrize("knobs", [{}, {"train": "lora"},
                                   {"train": "lora", "lora_targets": "attention"}])  # fmt: skip
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_trained_weight_gets_a_gradient(knobs, checkpointing):
    policy = trained(**knobs, gradient_checkpointing=checkpointing)
    velocity = policy.velocity(policy.module, Guidance(4.0))
    velocity(*inputs(policy), guided_text(policy)).square().mean().backward()
    for name, parameter in policy.module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
    last = {n.removesuffix(".lora_A.default") for n, _ in policy.module.named_modules()
            if n.startswith("transformer_blocks.1.") and n.endswith(".lora_A.default")}  # fmt: skip
    assert not any("to_add_out" in name or "txt_mlp" in name for name in last)
    if knobs:
        assert "transformer_blocks.1.attn.add_k_proj" in last


def test_no_prediction_depends_on_what_is_frozen():
    policy = trained()
    frozen = {n: p for n, p in policy.module.named_parameters() if not p.requires_grad}
    assert len(frozen) == 9
    assert all(name.startswith("transformer_blocks.1.") for name in frozen)
    velocity, given = policy.velocity(policy.module), (*inputs(policy), policy.encode(TEXTS))
    with torch.no_grad():
        before = velocity(*given)
        for weight in frozen.values():
            weight.add_(1.0)
        assert torch.equal(velocity(*given), before)


OBJECTIVE = {"transition": small_plan().transition, "log_ratio": log_ratio, "clip": 1e-4}


@pytest.mark.parametrize("form", ["eager", "compiled", "checkpointed", "batched"])
def test_the_ratio_is_one_before_the_first_update(form):
    layers = 1 if form == "compiled" else 2
    policy = trained(layers, train="lora", gradient_checkpointing=form == "checkpointed")
    guidance = Guidance(4.0, batched=form == "batched")
    if form == "compiled":  # without guidance, all batches have one shape: compiling takes long
        torch._dynamo.reset()
        compile_blocks(policy.module, "aot_eager")
        guidance = Guidance()
    velocity = policy.velocity(policy.module, guidance)
    plan, noise = small_plan(steps=3, start=0, size=1), small_noise(samples=2, shape=(16, 64))
    trajectory = rollout(velocity, guided_text(policy), plan, noise, micro_batch=2)
    metrics = update(
        Recording(policy.module),
        velocity,
        trajectory,
        torch.tensor([1.0, -1.0, 0.5, -0.5]),
        Objective(**OBJECTIVE),
        UpdateConfig(optimizer_steps=1, micro_batch=2),
    )
    assert metrics["ratio_error_on_policy"] < 1e-6
    assert metrics["grad_norm"] > 0


def test_samples_that_share_their_noise_are_as_if_alone(base):
    velocity, text = base.velocity(base.module, Guidance(4.0)), guided_text(base)
    plan, noise = small_plan(steps=4, start=1, size=2), small_noise(samples=2, shape=(16, 64))
    shared = rollout(velocity, text, plan, noise, micro_batch=4)
    alone = rollout(velocity, text, plan, replace(noise, shared=False), micro_batch=1)
    for row, prompt in enumerate((0, 1)):
        one = replace(noise, prompts=(prompt,))
        only = rollout(velocity, text[row : row + 1], plan, one, micro_batch=1)
        torch.testing.assert_close(
            only.final, shared.final[2 * row : 2 * row + 2], rtol=0, atol=1e-5
        )
    assert shared.evaluations < alone.evaluations
    assert (shared.final[0] - shared.final[1]).abs().max() > 1e-2


# ---- precision, and the module without memory


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_sigma_reaches_the_transformer_untruncated(compute):
    policy, seen = trained(train="lora", compute_dtype=compute), []
    policy.module.to(getattr(torch, compute))
    policy.module.time_text_embed.time_proj.register_forward_pre_hook(
        lambda module, given: seen.append(given[0].clone())
    )
    x, sigma = noise_of(policy), torch.tensor([0.123456789, 0.98765432])
    with torch.no_grad():
        v = policy.velocity(policy.module)(x, sigma, policy.encode(TEXTS))
    (found,) = seen
    assert found.dtype == v.dtype == torch.float32
    assert torch.equal(found, sigma)


def test_casting_once_changes_no_output(monkeypatch):
    found = []
    for cast in (True, False):
        if not cast:
            monkeypatch.setattr("mixgrpo.models.qwen_image.cast_once", lambda *_: None)
        policy = trained(compute_dtype="bfloat16", train="lora")
        with torch.no_grad():
            found.append(policy.velocity(policy.module)(*inputs(policy), policy.encode(TEXTS)))
    assert torch.equal(*found)


def test_built_without_memory_and_filled_it_is_the_loaded_one(qwen_world):
    config = qwen_world.config(qwen_world.root).model
    loaded = DiffusersPolicy.load(config, CPU, 7)
    empty = DiffusersPolicy.load(config, CPU, 7, empty=True)
    assert {p.device for p in empty.module.parameters()} == {META}
    assert not list(empty.module.buffers())
    rope = empty.module.pos_embed
    assert rope.pos_freqs.device == rope.neg_freqs.device == CPU
    empty.module.to_empty(device=CPU)
    with torch.no_grad():
        for name, parameter in empty.module.named_parameters():
            parameter.copy_(empty.stored[name][:])
        found, expected = (
            policy.velocity(policy.module)(*inputs(policy), policy.encode(TEXTS))
            for policy in (empty, loaded)
        )
    assert torch.equal(found, expected)


def test_a_copy_has_rotary_tables_of_its_own(base):
    untrained = trained().untrained()
    assert untrained.pos_embed.pos_freqs.device == CPU
    with torch.no_grad():
        given = (*inputs(base), base.encode(TEXTS))
        assert torch.equal(base.velocity(untrained)(*given), base.velocity(base.module)(*given))
