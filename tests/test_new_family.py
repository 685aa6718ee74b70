"""A family that is one file and one line of the registry: everything else takes it as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from new_family import SD3
from tiny_world import CPU, PROMPTS, QUICK, World, saved_tensors, train_here
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from mixgrpo.assembly import make_negative
from mixgrpo.config import ModelConfig, PreprocessConfig
from mixgrpo.doctor.model import check_model
from mixgrpo.engines.shards import load_buffers
from mixgrpo.inference.config import InferenceConfig
from mixgrpo.inference.sample import sample
from mixgrpo.maths.schedule import make_sigmas
from mixgrpo.models.guidance import Guidance
from mixgrpo.models.policy import DiffusersPolicy
from mixgrpo.models.registry import FAMILIES, Entry
from mixgrpo.models.spacing import spacing_of
from mixgrpo.noise import Noise
from mixgrpo.rollout import sample_ode
from mixgrpo.shapes.architecture import (
    TEXT_LENGTH,
    _t5,
    _vae,
    clip_text_sizes,
    clip_words,
    t5_words,
)
from mixgrpo.text.negative import GuidedText
from mixgrpo.text.preprocess import preprocess

SCALE = 4.5


@pytest.fixture(scope="module")
def sd3() -> Iterator[None]:
    with mock.patch.dict(FAMILIES, sd3=Entry("SD3Transformer2DModel", "new_family:SD3")):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder, untrained: two blocks, the first with the second attention of SD3.5."""
    torch.manual_seed(0)
    clip, t5 = clip_words(), t5_words()
    transformer = SD3Transformer2DModel(
        **{"sample_size": 8, "patch_size": 2, "in_channels": 16, "out_channels": 16},
        **{"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 4},
        **{"joint_attention_dim": 128, "caption_projection_dim": 128},
        **{"pooled_projection_dim": 128, "pos_embed_max_size": 8},
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    vae = _vae()
    vae.register_to_config(shift_factor=0.1, scaling_factor=0.4)
    texts = [
        CLIPTextModelWithProjection(CLIPTextConfig(**clip_text_sizes(clip, width=64)))
        for _ in range(2)
    ]
    pipeline = StableDiffusion3Pipeline(
        *(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae),
        *(texts[0], clip, texts[1], clip, _t5(t5), t5),
    )
    path = tmp_path_factory.mktemp("sd3")
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def world(model: Path, world: World) -> World:
    class Here(World):
        @property
        def model(self) -> Path:
            return model

    return Here(world.root)


def knobs(model: Path) -> ModelConfig:
    return ModelConfig(
        path=str(model),
        compute_dtype="float32",
        height=64,
        width=64,
        text_length=TEXT_LENGTH,
        gradient_checkpointing=False,
    )


@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_latents_and_pictures_are_the_pipelines(sd3: None, model: Path, scale: float) -> None:
    policy = DiffusersPolicy.frozen(knobs(model), CPU)
    noise = Noise(3, 0, [0, 1], 1, policy.latent_shape, True, CPU).initial()
    text = GuidedText(policy, SD3.negative).encode(PROMPTS[:2], [{}, {}])
    velocity = policy.velocity(policy.module, Guidance(scale))
    sigmas = make_sigmas(6, spacing_of(policy.config, 0.0, 6))
    with torch.no_grad():
        found = sample_ode(velocity, noise, text, sigmas, 2)
        expected = policy.pipeline(
            *([*PROMPTS[:2]],),
            num_inference_steps=6,
            guidance_scale=scale,
            height=64,
            width=64,
            latents=noise.transpose(1, 2).unflatten(2, (8, 8)),
            max_sequence_length=TEXT_LENGTH,
            output_type="latent",
        ).images
        torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)
        pictures = policy.pipeline.image_processor.postprocess(
            SD3.decode(policy.pipeline, found, 64, 64), output_type="pt"
        )
    torch.testing.assert_close(policy.decode(found), pictures, rtol=0, atol=1e-6)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_it_trains_and_is_exported(sd3: None, world: World, tmp_path: Path, train: str) -> None:
    """With guidance, stored embeddings, and what was trained sampled by the command."""
    files = [str(world.prompts), str(world.validation_prompts)]
    encoding = PreprocessConfig(files, str(tmp_path / "text"), dtype="float32", progress=False)
    encoding.model.path, encoding.model.text_length = str(world.model), TEXT_LENGTH
    preprocess(encoding)
    config = world.config(
        tmp_path / "run", **{**QUICK, "model__train": train}, guidance__scale=SCALE,
        text__mode="embeddings", text__embeddings=str(tmp_path / "text"),
    )  # fmt: skip
    assert make_negative(config) == ""
    assert all(line.level == "ok" for line in check_model(config, 1))
    folder = train_here(config)
    drawn = InferenceConfig(
        prompts_file=files[1], folder=str(tmp_path / "pictures"), checkpoint=str(folder / "model"),
        steps=2, progress=False,
    )  # fmt: skip
    drawn.model = replace(
        drawn.model, path=str(world.model), compute_dtype="float32", height=64, width=64,
        text_length=TEXT_LENGTH,
    )  # fmt: skip
    drawn.guidance.scale = SCALE
    assert len(list(sample(drawn).glob("*.png"))) == 3
    assert saved_tensors(next((folder / "checkpoints").glob("iteration_*")))


def test_what_is_loaded_without_memory_is_what_is_loaded(sd3: None, model: Path) -> None:
    """Weights in parts from the files; buffers, which no file of an engine's holds, as well."""
    config = replace(knobs(model), train="lora", lora_rank=2)
    empty = DiffusersPolicy.load(config, CPU, seed=1, empty=True)
    whole = DiffusersPolicy.load(config, CPU, seed=1).module
    assert empty.stored is not None
    for name, tensor in whole.state_dict().items():
        assert torch.equal(empty.stored[name][...], tensor), name
    load_buffers(empty.module, empty.stored, CPU)
    [(name, buffer)] = empty.module.named_buffers()
    assert torch.equal(buffer, whole.get_buffer(name))
