"""FLUX.1-dev at its real size without its weights, and our sampling against diffusers' own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tiny_world import CPU

from mixgrpo.config import ModelConfig
from mixgrpo.files.weight_files import check_fits, read_shapes
from mixgrpo.files.weight_sets import NAME, find_shards
from mixgrpo.inference.config import InferenceConfig, SampledModelConfig
from mixgrpo.inference.memory import estimate, explain
from mixgrpo.maths.schedule import dynamic_shift, make_sigmas
from mixgrpo.models.flux import FLUX
from mixgrpo.models.policy import DiffusersPolicy
from mixgrpo.rollout import sample_ode
from mixgrpo.types import TextEmbedding

# FLUX.1-dev's published transformer/config.json
TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
# ... and scheduler/scheduler_config.json
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
PARAMETERS = 11_901_408_320
META = torch.device("meta")
TEXTS = ["a red circle on a gray background", "a blue cross on a black background"]


def names() -> Iterator[str]:
    """The published file's keys, written down block by block."""
    both = ("weight", "bias")
    attention = ["to_q", "to_k", "to_v"]
    beside = ["add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"]
    feed_forward = ["net.0.proj", "net.2"]
    double = [f"attn.{name}" for name in attention + beside]
    double += [f"{ff}.{name}" for ff in ("ff", "ff_context") for name in feed_forward]
    double += ["norm1.linear", "norm1_context.linear"]
    double_norms = [f"attn.norm_{name}.weight" for name in ("q", "k", "added_q", "added_k")]
    single = [f"attn.{name}" for name in attention] + ["proj_mlp", "proj_out", "norm.linear"]
    for i in range(19):
        yield from (f"transformer_blocks.{i}.{name}.{end}" for name in double for end in both)
        yield from (f"transformer_blocks.{i}.{name}" for name in double_norms)
    for i in range(38):
        yield from (
            f"single_transformer_blocks.{i}.{name}.{end}" for name in single for end in both
        )
        yield from (f"single_transformer_blocks.{i}.attn.norm_{n}.weight" for n in ("q", "k"))
    embedders = [f"time_text_embed.{kind}_embedder.linear_{i}"
                 for kind in ("timestep", "guidance", "text") for i in (1, 2)]  # fmt: skip
    outer = [*embedders, "context_embedder", "x_embedder", "norm_out.linear", "proj_out"]
    yield from (f"{name}.{end}" for name in outer for end in both)


def flux_dev(world: Any, **knobs: Any) -> DiffusersPolicy:
    """The policy with FLUX.1-dev's transformer, on the meta device, made trainable."""
    pipeline = world.policy().pipeline
    config = ModelConfig(**{"path": "unused", "height": 1024, "width": 1024, **knobs})
    with META:
        dtype = torch.float32 if config.train == "full" else torch.bfloat16
        pipeline.transformer = FluxTransformer2DModel(**TRANSFORMER).to(dtype)
        policy = DiffusersPolicy(FLUX, pipeline, config, META)
        policy.make_trainable(seed=0)
    return policy


def trained(policy: DiffusersPolicy) -> dict[str, torch.Tensor]:
    return {name: p for name, p in policy.module.named_parameters() if p.requires_grad}


# ---- its real size


def test_full_training_trains_every_weight_under_its_published_name(world):
    policy = flux_dev(world)
    assert set(trained(policy)) == set(policy.module.state_dict()) == set(names())
    assert len(list(names())) == 1160
    assert sum(p.numel() for p in trained(policy).values()) == PARAMETERS
    assert {p.dtype for p in trained(policy).values()} == {torch.float32}
    assert policy.latent_shape == (4096, 64)


@pytest.mark.parametrize(
    ("targets", "modules", "inputs_and_outputs"),
    [
        # A double block: 8 projections 3072 -> 3072; a single block: 3.
        ("attention", 19 * 8 + 38 * 3, (19 * 8 + 38 * 3) * (3072 + 3072)),
        # Also 3072 -> 12288 -> 3072 twice, and 3072 -> 12288 and 15360 -> 3072.
        (
            "all",
            19 * 12 + 38 * 5,
            (19 * 8 + 38 * 3) * 6144 + 19 * 4 * 15360 + 38 * (15360 + 18432),
        ),
    ],
)
def test_lora_trains_so_many_weights_and_no_other(world, targets, modules, inputs_and_outputs):
    policy = flux_dev(world, train="lora", lora_rank=16, lora_targets=targets)
    found = trained(policy)
    assert all(".lora_A." in name or ".lora_B." in name for name in found)
    assert len(found) == 2 * modules
    assert sum(p.numel() for p in found.values()) == 16 * inputs_and_outputs
    assert {p.dtype for p in found.values()} == {torch.float32}
    frozen = [p for p in policy.module.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) == PARAMETERS
    assert {p.dtype for p in frozen} == {torch.bfloat16}


def test_a_whole_evaluation_at_1024_pixels_fits_together(world):
    """Every matrix product of the 57 blocks has matching shapes, text of 512 tokens included."""
    policy = flux_dev(world, compute_dtype="float32")
    policy.device = CPU  # the one whose autocast is left off; there is none for meta
    text = TextEmbedding(torch.empty(2, 512, 4096, device=META), torch.empty(2, 768, device=META))
    x, sigma = torch.empty(2, 4096, 64, device=META), torch.empty(2, device=META)
    with torch.no_grad():
        assert policy.velocity(policy.module)(x, sigma, text).shape == x.shape


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Iterator[Path]:
    """A file with the head of the published lone file; its 24 GB are a hole on the disk."""
    with META:
        state = FluxTransformer2DModel(**TRANSFORMER).state_dict()
    head, place = {}, 0
    for name, weight in state.items():
        end = place + 2 * weight.numel()
        shape = list(weight.shape)
        head[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, end]}
        place = end
    folder = tmp_path_factory.mktemp("published") / "transformer"
    folder.mkdir()
    text = json.dumps(head).encode()
    with (folder / NAME).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)
    (folder / "config.json").write_text(json.dumps(TRANSFORMER))
    yield folder
    (folder / NAME).unlink()


def test_the_published_lone_file_fits(world, published):
    shapes = read_shapes(find_shards(published / NAME))
    assert set(shapes) == set(names())
    own = flux_dev(world).module.state_dict()
    check_fits(own, shapes, published)
    lost = "single_transformer_blocks.37.proj_out.bias"
    with pytest.raises(ValueError, match=f"missing: {lost};"):
        check_fits(own, {k: v for k, v in shapes.items() if k != lost}, published)


def test_the_memory_that_it_takes(world, published):
    """The folder has no VAE, so the published one is counted."""
    model = SampledModelConfig(family="flux", path=str(published.parent))
    config = InferenceConfig(model, micro_batch=1)
    needed = estimate(config)
    assert needed.weights == 2 * PARAMETERS
    assert needed.evaluation == pytest.approx((4096 + 512) * 3072 * 20 * 2, rel=0.02)
    assert needed.decoding == pytest.approx(1024 * 1024 * 256 * 5 * 2, rel=0.02)
    said = explain(config, 24 * 2**30)
    assert "24.0 GiB are not enough: sampling needs about 22.2 GiB for weights in bfloat16" in said
    assert "bfloat16, 0.5 GiB" in said


# ---- our sampling against FluxPipeline's own


def test_our_velocity_is_what_the_pipeline_evaluates(world):
    """Same inputs in every one of its steps, same output."""
    policy = world.policy()
    pipeline = FluxPipeline.from_pretrained(world.model)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    pipeline.transformer.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((kwargs, out[0])), with_kwargs=True
    )
    call = {"height": 64, "width": 64, "max_sequence_length": 16, "guidance_scale": 3.5}
    generator = torch.Generator().manual_seed(3)
    pipeline(prompt=TEXTS, num_inference_steps=4, generator=generator, **call)
    assert len(seen) == 4
    text = policy.encode(TEXTS)
    for given, expected in seen:
        with torch.no_grad():
            velocity = policy.velocity(policy.module)
            ours = velocity(given["hidden_states"], given["timestep"], text)
        torch.testing.assert_close(text.tokens, given["encoder_hidden_states"], rtol=0, atol=1e-6)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        assert expected.abs().max() > 0.1


def small_transformer() -> FluxTransformer2DModel:
    """One block of each kind: 4096 tokens on a CPU."""
    torch.manual_seed(5)
    shape = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32}
    texts = {"joint_attention_dim": 128, "pooled_projection_dim": 64}
    heads = {"num_attention_heads": 2, "axes_dims_rope": (8, 12, 12), "guidance_embeds": True}
    return FluxTransformer2DModel(in_channels=64, **shape, **texts, **heads)


def test_sampling_1024_pixels_with_the_dynamic_shift_is_the_pipelines(world):
    pipeline = world.policy().pipeline
    pipeline.transformer = small_transformer().eval()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4096, 64, generator=torch.Generator().manual_seed(6))
    steps, size = 4, {"height": 1024, "width": 1024}
    theirs = pipeline(
        prompt=TEXTS[:1], latents=noise.clone(), num_inference_steps=steps, guidance_scale=3.5,
        max_sequence_length=16, output_type="latent", **size,
    ).images  # fmt: skip
    config = ModelConfig(path="unused", compute_dtype="float32", text_length=16, **size)
    policy = DiffusersPolicy(FLUX, pipeline, config, CPU)
    assert policy.latent_shape == (4096, 64)
    sigmas = make_sigmas(steps, dynamic_shift(4096))
    ours = sample_ode(policy.velocity(policy.module), noise, policy.encode(TEXTS[:1]), sigmas, 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - noise).abs().max() > 0.1


def test_a_pipeline_in_shards_loads_with_float32_master_weights(world, tmp_path):
    whole = world.policy()
    whole.pipeline.save_pretrained(tmp_path, max_shard_size="2MB")
    assert len(list((tmp_path / "transformer").glob("*-of-*.safetensors"))) > 1
    assert (tmp_path / "transformer" / f"{NAME}.index.json").is_file()
    policy = world.policy(model__path=str(tmp_path), model__compute_dtype="bfloat16")
    loaded = policy.module.state_dict()
    for name, weight in whole.module.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], weight)
    assert policy.pipeline.text_encoder_2.dtype == policy.pipeline.vae.dtype == torch.bfloat16
