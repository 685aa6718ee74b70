"""The FLUX policy against plain diffusers: exports, adapters, what reaches the transformer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from tiny_world import CPU, QUICK, ROOT, checkpoint_folder, saved_tensors, train_here

from mixgrpo import checkpoint as checkpoints
from mixgrpo.config import ModelConfig
from mixgrpo.maths.schedule import make_sigmas
from mixgrpo.models.flux import FLUX
from mixgrpo.models.policy import DiffusersPolicy
from mixgrpo.noise import Noise
from mixgrpo.rollout import sample_ode

TEXTS = [
    "a red circle on a gray background",
    "a blue cross above a green square on a black background",
]
STEPS = 6
GUIDANCE = 3.5


def noise_for(policy: DiffusersPolicy) -> torch.Tensor:
    return Noise(11, 0, [0, 1], 1, policy.latent_shape, True, CPU).initial()


def our_pictures(policy: DiffusersPolicy) -> torch.Tensor:
    latents = sample_ode(
        policy.velocity(policy.module),
        noise_for(policy),
        policy.encode(TEXTS),
        make_sigmas(STEPS, 3.0),
        micro_batch=8,
    )
    return policy.decode(latents)


def diffusers_pictures(pipeline: FluxPipeline, policy: DiffusersPolicy) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=TEXTS,
        latents=noise_for(policy),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        height=64,
        width=64,
        max_sequence_length=16,
        output_type="pt",
    ).images


@pytest.fixture(scope="module")
def base(world) -> DiffusersPolicy:
    """Not to be changed."""
    return world.policy()


@pytest.fixture(scope="module")
def base_pictures(base) -> torch.Tensor:
    return our_pictures(base)


@pytest.fixture
def fresh(world) -> DiffusersPolicy:
    return world.policy()


# ---- what a run exports


def test_a_full_run_loads_in_plain_diffusers_and_draws_the_same(straight, fresh, base_pictures):
    weights = saved_tensors(checkpoint_folder(straight, 4))
    fresh.module.load_state_dict(weights)
    ours = our_pictures(fresh)
    pipeline = FluxPipeline.from_pretrained(straight / "model")
    torch.testing.assert_close(diffusers_pictures(pipeline, fresh), ours, rtol=0, atol=1e-5)
    assert (ours - base_pictures).abs().max() > 1e-3, "training must have changed the pictures"
    assert ours.std() > 0.01


def test_an_exported_folder_is_a_model_folder(straight, world):
    again = DiffusersPolicy.load(
        world.config(straight, model__path=str(straight / "model")).model, CPU, 7
    )
    saved = saved_tensors(checkpoint_folder(straight, 4))
    for name, weight in again.module.named_parameters():
        assert torch.equal(weight, saved[name])


@pytest.mark.parametrize("targets", ["all", "attention"])
def test_a_lora_run_loads_through_load_lora_weights(world, folder, base_pictures, targets):
    knobs = {**QUICK, "model__lora_targets": targets, "update__learning_rate": 1e-2}
    train_here(world.config(folder, **knobs))
    policy = world.policy(**knobs)
    saved = saved_tensors(checkpoints.latest(folder / "checkpoints"))
    missing, unexpected = policy.module.load_state_dict(saved, strict=False)
    assert not unexpected
    assert not any("lora" in name for name in missing)
    ours = our_pictures(policy)
    assert (ours - base_pictures).abs().max() > 1e-3, "training must have changed the pictures"

    pipeline = FluxPipeline.from_pretrained(world.model)
    pipeline.load_lora_weights(folder / "model")
    torch.testing.assert_close(diffusers_pictures(pipeline, policy), ours, rtol=0, atol=1e-5)
    size = sum(file.stat().st_size for file in (folder / "model").rglob("*") if file.is_file())
    assert size < 2e6, "a LoRA run exports its adapters alone"


# ---- where adapters go

DOUBLE_ATTENTION = [
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
                 "to_add_out")
]  # fmt: skip
DOUBLE_FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
SINGLE_ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v"]
SINGLE_FEED_FORWARD = ["proj_mlp", "proj_out"]


def wanted_targets(kind: str, double: int, single: int) -> set[str]:
    in_double, in_single = DOUBLE_ATTENTION, SINGLE_ATTENTION
    if kind == "all":
        in_double = in_double + DOUBLE_FEED_FORWARD
        in_single = in_single + SINGLE_FEED_FORWARD
    return {f"transformer_blocks.{i}.{name}" for i in range(double) for name in in_double} | {
        f"single_transformer_blocks.{i}.{name}" for i in range(single) for name in in_single
    }


@pytest.mark.parametrize("kind", ["attention", "all"])
def test_adapters_sit_on_the_wanted_projections_and_no_other(world, kind):
    policy = world.policy(model__train="lora", model__lora_rank=2, model__lora_targets=kind)
    adapted = {n.removesuffix(".lora_A.default") for n, _ in policy.module.named_modules()
               if n.endswith(".lora_A.default")}  # fmt: skip
    assert adapted == wanted_targets(kind, double=2, single=4)
    trained = {name for name, p in policy.module.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)


@pytest.fixture(scope="module")
def flux_dev() -> FluxTransformer2DModel:
    """FLUX.1-dev's transformer by its published configuration, without memory."""
    with torch.device("meta"):
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        )


@pytest.mark.parametrize(("kind", "count"), [("attention", 266), ("all", 418)])
def test_the_targets_fit_flux_1_dev(flux_dev, kind, count):
    assert sum(p.numel() for p in flux_dev.parameters()) == 11_901_408_320
    matched = {
        name
        for name, module in flux_dev.named_modules()
        if re.fullmatch(FLUX.lora_targets[kind], name)
    }
    assert matched == wanted_targets(kind, double=19, single=38)
    assert len(matched) == count
    linear = {n for n, module in flux_dev.named_modules() if isinstance(module, torch.nn.Linear)}
    assert matched <= linear
    assert "proj_out" not in matched


# ---- what the transformer and the decoder see


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_sigma_and_guidance_reach_the_transformer_untruncated(world, compute):
    policy = world.policy(model__compute_dtype=compute, model__guidance=2.71)
    seen = []
    policy.module.time_text_embed.register_forward_pre_hook(
        lambda module, given: seen.append((given[0].clone(), given[1].clone()))
    )
    sigmas = torch.tensor([0.123456789, 0.98765432])
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v = policy.velocity(policy.module)(x, sigmas, policy.encode(TEXTS))
    ((timestep, guidance),) = seen
    assert timestep.dtype == torch.float32
    assert torch.equal(timestep, sigmas * 1000)
    assert torch.equal(guidance, torch.full([2], 2.71) * 1000)
    assert v.dtype == torch.float32
    assert v.shape == x.shape


def test_guidance_matters(world, base):
    x, sigma = torch.ones(1, *base.latent_shape), torch.tensor([0.5])
    text = base.encode(TEXTS[:1])
    other = world.policy(model__guidance=1.0)
    with torch.no_grad():
        ours = base.velocity(base.module)(x, sigma, text)
        theirs = other.velocity(other.module)(x, sigma, text)
    assert not torch.equal(ours, theirs)


def test_decoding_undoes_the_shift_and_scale_of_the_latents(base):
    vae = base.pipeline.vae
    assert (vae.config.shift_factor, vae.config.scaling_factor) == (0.1, 0.4)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 16, 8, 8, generator=generator)  # [N, C, H/8, W/8]
    packed = FluxPipeline._pack_latents((z - 0.1) * 0.4, 2, 16, 8, 8)
    with torch.no_grad():
        expected = (vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(base.decode(packed), expected, rtol=0, atol=1e-5)
    assert base.decode(packed).dtype == torch.float32
    assert expected.std() > 0.01


def test_prompts_are_embedded_each_for_itself(base):
    together = base.encode(TEXTS)
    alone = base.encode(TEXTS[1:])
    torch.testing.assert_close(together.tokens[1:], alone.tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(together.pooled[1:], alone.pooled, rtol=0, atol=1e-6)
    assert together.tokens.shape == (2, 16, 128)


def test_720_pixels_are_2025_tokens(base):
    config = ModelConfig(path="unused", compute_dtype="float32", height=720, width=720)
    assert DiffusersPolicy(FLUX, base.pipeline, config, CPU).latent_shape == (2025, 64)


def test_truncated_prompts_are_counted(base):
    words = "red " * 15
    assert base.count_truncated([words.strip()]) == 0  # 15 words and the end token
    assert base.count_truncated([f"{words}circle", "a red circle", "blue " * 40]) == 2


# ---- folders that lack something


@pytest.mark.parametrize("part", ["model_index.json", *FLUX.parts])
def test_a_missing_part_is_named(world, tmp_path, part):
    for entry in world.model.iterdir():
        if entry.name != part:
            (tmp_path / entry.name).symlink_to(entry)
    config = ModelConfig(path=str(tmp_path), compute_dtype="float32", height=64, width=64)
    missing = re.escape(str(tmp_path / part))
    with pytest.raises(FileNotFoundError, match=rf"{missing}.*--model\.path"):
        DiffusersPolicy.load(config, CPU, seed=0)


def test_a_missing_folder_is_named():
    config = ModelConfig(path="no/such/folder")
    with pytest.raises(FileNotFoundError, match=r"'no/such/folder'.*--model\.path"):
        DiffusersPolicy.load(config, CPU, seed=0)


def test_the_shipped_model_has_every_part():
    folder = ROOT / "data" / "shapes" / "flux"
    assert all((folder / part).exists() for part in FLUX.parts)
    assert Path(folder / "model_index.json").is_file()
