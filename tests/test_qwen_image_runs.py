"""Runs of a small Qwen-Image from end to end, its LoRA files, and folders that cannot be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import QwenImagePipeline
from safetensors.torch import load_file, save_file
from small_qwen import qwen_pipeline
from tiny_world import (
    CPU,
    QUICK,
    World,
    checkpoint_folder,
    copy_run,
    refused_folder,
    same,
    saved_tensors,
    train_here,
    training_records,
    without_times,
)
from torch import Tensor, nn

from mixgrpo.commands import main
from mixgrpo.config import ModelConfig
from mixgrpo.doctor.model import check_model
from mixgrpo.inference.config import InferenceConfig, SampledGuidanceConfig, SampledModelConfig
from mixgrpo.inference.sample import sample
from mixgrpo.models.adapters import attach_lora
from mixgrpo.models.flux import FLUX
from mixgrpo.models.folder import check_folder
from mixgrpo.models.lora_files import read_lora
from mixgrpo.models.policy import DiffusersPolicy
from mixgrpo.models.qwen_image import QWEN_IMAGE
from mixgrpo.models.registry import family_of
from mixgrpo.types import TextEmbedding

TWO = {
    **QUICK,
    "run__iterations": 2,
    "validation__every": 1,
    "validation__steps": 2,
    "checkpoint__every": 1,
    "checkpoint__keep": 0,
    "update__learning_rate": 1e-2,
    "model__gradient_checkpointing": True,
}


@pytest.fixture(autouse=True)
def no_gpu() -> Iterator[None]:
    with mock.patch("torch.cuda.is_available", return_value=False):
        yield


def given(policy: DiffusersPolicy) -> tuple[Tensor, Tensor, TextEmbedding]:
    x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.3, 0.9]), policy.encode(["a red circle", "a blue square on a cross"])


def velocity_of(policy: DiffusersPolicy, module: nn.Module | None = None) -> Tensor:
    with torch.no_grad():
        return policy.velocity(module or policy.module)(*given(policy))


def base_of(world: World) -> DiffusersPolicy:
    return DiffusersPolicy.frozen(world.config(world.root).model, CPU)


def of_pipeline(pipeline: QwenImagePipeline, policy: DiffusersPolicy) -> Tensor:
    """The velocity that plain diffusers predicts."""
    x, sigma, text = given(policy)
    mask = torch.arange(text.tokens.shape[1]) < text.lengths[:, None]
    with torch.no_grad():
        return pipeline.transformer(
            hidden_states=x,
            timestep=sigma,
            encoder_hidden_states=text.tokens,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, 4, 4)]] * 2,
            return_dict=False,
        )[0]


# ---- runs


@pytest.fixture(scope="module")
def lora_run(qwen_world, tmp_path_factory) -> Path:
    return train_here(qwen_world.config(tmp_path_factory.mktemp("qwen") / "run", **TWO))


@pytest.fixture(scope="module")
def full_run(qwen_world, tmp_path_factory) -> Path:
    knobs = {
        **TWO,
        "model__train": "full",
        "run__iterations": 1,
        "validation__every": 0,
        "ema__decay": 0.5,
    }
    folder = tmp_path_factory.mktemp("qwen_full") / "run"
    return train_here(qwen_world.config(folder, **knobs))


def test_a_run_trains(lora_run, qwen_world):
    found = training_records(lora_run)
    assert [record["iteration"] for record in found] == [1, 2]
    assert all(record["update/ratio_error_on_policy"] < 1e-5 for record in found)
    assert all(record["update/grad_norm"] > 0 for record in found)
    # Guidance: the first step of the window once for each prompt, all with two passes.
    assert found[0]["rollout/evaluations_per_image"] == 2 * (2 + 8 * 4) / 8
    weights = saved_tensors(checkpoint_folder(lora_run, 2))
    trained = [name for name in weights if ".lora_B." in name and weights[name].any()]
    assert len(trained) == len(weights) / 2 == 2 * 12 - 4


def test_a_resumed_run_is_the_uninterrupted_one(lora_run, qwen_world, folder):
    copy_run(lora_run, folder, 1)
    train_here(qwen_world.config(folder, **TWO, run__resume=True))
    for part in ("model", "optimizer"):
        found, expected = (
            saved_tensors(checkpoint_folder(run, 2), part) for run in (folder, lora_run)
        )
        assert same(found, expected)
    assert without_times(training_records(folder)) == without_times(training_records(lora_run))


def test_a_lora_run_loads_in_plain_diffusers_and_here(lora_run, qwen_world, capfd):
    trained = DiffusersPolicy.load(qwen_world.config(lora_run, **TWO).model, CPU, 7)
    saved = saved_tensors(checkpoint_folder(lora_run, 2))
    _, unexpected = trained.module.load_state_dict(saved, strict=False)
    assert not unexpected
    expected = velocity_of(trained)

    pipeline = QwenImagePipeline.from_pretrained(qwen_world.model)
    plain = of_pipeline(pipeline, trained)
    pipeline.load_lora_weights(lora_run / "model")
    torch.testing.assert_close(of_pipeline(pipeline, trained), expected, rtol=0, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3
    assert "missing" not in capfd.readouterr().err

    read = base_of(qwen_world)
    attach_lora(QWEN_IMAGE, read.module, read_lora(lora_run / "model" / LORA), 1.0)
    torch.testing.assert_close(velocity_of(read), expected, rtol=0, atol=1e-5)


def test_a_full_run_loads_in_plain_diffusers(full_run, qwen_world):
    base = base_of(qwen_world).module.state_dict()
    saved = saved_tensors(checkpoint_folder(full_run, 1))
    pipeline = QwenImagePipeline.from_pretrained(full_run / "model")
    found = pipeline.transformer.state_dict()
    assert found.keys() == base.keys()
    assert len(base) - len(saved) == 9
    for name, weight in found.items():
        assert torch.equal(weight, saved.get(name, base[name]))
        assert torch.equal(weight, base[name]) == (name not in saved)
    again = DiffusersPolicy.frozen(
        ModelConfig(path=str(full_run / "model"), compute_dtype="float32"), CPU
    )
    assert family_of(again.config) is QWEN_IMAGE
    for part in ("vae", "tokenizer", "scheduler", "text_encoder"):
        assert {p.name for p in (full_run / "model" / part).iterdir()} == {
            p.name for p in (qwen_world.model / part).iterdir()
        }


def pictures(world: World, folder: Path, **knobs: Any) -> dict[str, bytes]:
    model = SampledModelConfig(
        path=str(world.model), compute_dtype="float32", height=64, width=64, text_length=24
    )
    config = InferenceConfig(
        model=model,
        guidance=SampledGuidanceConfig(scale=4.0),
        prompts_file=str(world.validation_prompts),
        folder=str(folder),
        steps=3,
        shift=0.0,
        threads=1,
        progress=False,
    )
    found = sample(replace(config, **knobs))
    return {path.name: path.read_bytes() for path in found.glob("*.png")}


def test_samples_of_a_checkpoint_are_those_of_what_it_exports(
    full_run, lora_run, qwen_world, tmp_path
):
    base = pictures(qwen_world, tmp_path / "base")
    assert len(base) == 3
    for run, iteration in ((full_run, 1), (lora_run, 2)):
        name = run.parent.name
        saved, exported = (
            pictures(qwen_world, tmp_path / f"{name}_{index}", checkpoint=str(checkpoint))
            for index, checkpoint in enumerate((checkpoint_folder(run, iteration), run / "model"))
        )
        assert saved == exported
        assert saved != base
    average = {"checkpoint": str(checkpoint_folder(full_run, 1)), "weights": "ema"}
    assert pictures(qwen_world, tmp_path / "average", **average) not in (base, saved)


def test_pictures_are_evaluated(qwen_world, tmp_path, capsys):
    pictures(qwen_world, tmp_path / "pictures")
    words = ["evaluate", f"base={tmp_path / 'pictures'}", "--output", str(tmp_path / "found")]
    rewards = {"redness": {"kind": "tiny_world:redness"}}
    assert main([*words, "--rewards", json.dumps(rewards)]) == 0
    assert "redness" in (tmp_path / "found" / "table.md").read_text()


def test_the_doctor_finds_nothing_to_mend(qwen_world, tmp_path, capsys):
    words = qwen_world.arguments(tmp_path / "run", **TWO)[1:]
    assert main(["doctor", *words]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "text_encoder: 0.1M weights" in said
    assert "none longer than 24 tokens" in said


def test_the_doctor_refuses_texts_that_are_too_long(qwen_world, tmp_path):
    config = qwen_world.config(tmp_path, model__text_length=1025)
    (line,) = (line for line in check_model(config, 1) if line.level == "error")
    assert "reads at most 1024 tokens" in line.text
    assert line.remedy == "set --model.text_length to 1024 or less"


# ---- LoRA files

LORA = "pytorch_lora_weights.safetensors"
LAYERS = {
    "transformer_blocks.0.attn.to_q": (64, 64),
    "transformer_blocks.1.attn.to_out.0": (64, 64),
    "transformer_blocks.0.attn.add_k_proj": (64, 64),
    "transformer_blocks.0.attn.to_add_out": (64, 64),
    "transformer_blocks.1.img_mlp.net.0.proj": (256, 64),
    "transformer_blocks.0.txt_mlp.net.2": (64, 256),
    "transformer_blocks.0.img_mod.1": (384, 64),
    "img_in": (64, 64),
    "norm_out.linear": (128, 64),
    "time_text_embed.timestep_embedder.linear_1": (64, 256),
}
HALVES = {"diffusers": ("lora_A", "lora_B"), "kohya": ("lora_down", "lora_up")}
FORMS: dict[str, tuple[Callable[[str], str], str]] = {
    "diffusers": (lambda name: f"transformer.{name}", "diffusers"),
    "bare": (lambda name: name, "kohya"),
    "comfyui": (lambda name: f"diffusion_model.{name}", "diffusers"),
    "kohya": (lambda name: "lora_unet_" + name.replace(".", "_"), "kohya"),
}


def made() -> dict[str, tuple[Tensor, Tensor]]:
    draw = torch.randn
    generator = torch.Generator().manual_seed(4)
    return {
        name: (draw(2, into, generator=generator) / 8, draw(out, 2, generator=generator) / 8)
        for name, (out, into) in LAYERS.items()
    }


def write(path: Path, called: Callable[[str], str], halves: str) -> Path:
    """Adapters of alpha 3 and rank 2."""
    state = {}
    for name, (down, up) in made().items():
        for half, weight in zip(HALVES[halves], (down, up), strict=True):
            state[f"{called(name)}.{half}.weight"] = weight.contiguous()
        state[f"{called(name)}.alpha"] = torch.tensor(3.0)
    save_file(state, path)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_changes_each_layer_as_its_numbers_say(form, tmp_path):
    path = write(tmp_path / "lora.safetensors", *FORMS[form])
    plain, pipeline = qwen_pipeline().transformer, qwen_pipeline()
    attach_lora(QWEN_IMAGE, pipeline.transformer, read_lora(path), 0.5)
    pipeline.transformer.fuse_lora()
    found = {n.replace(".base_layer", ""): w for n, w in pipeline.transformer.named_parameters()}
    for name, weight in plain.named_parameters():
        down, up = made().get(name.removesuffix(".weight"), (None, None))
        expected = weight if down is None else weight + 0.5 * 3 / 2 * up @ down
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)


def test_names_of_every_layer():
    modules = dict(qwen_pipeline().transformer.named_modules())
    from mixgrpo.models.adapters import fitted
    from mixgrpo.models.lora import Adapter, Lora

    linear = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    assert len(linear) == 2 * 14 + 6
    for called, _ in FORMS.values():
        adapters = {
            called(name): Adapter(torch.ones(1, m.in_features), torch.ones(m.out_features, 1), 1.0)
            for name, m in linear.items()
        }
        assert set(fitted(QWEN_IMAGE, Lora(adapters, Path("x")), modules)) == set(linear)


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_of_qwen_image_is_refused_by_flux(form, tmp_path, world):
    path = write(tmp_path / "lora.safetensors", *FORMS[form])
    with pytest.raises(ValueError, match="is a LoRA for Qwen-Image, but the model is FLUX"):
        attach_lora(FLUX, world.policy().module, read_lora(path), 1.0)


@pytest.mark.parametrize(
    "name",
    ["transformer.single_transformer_blocks.0.attn.to_q", "lora_unet_double_blocks_0_img_attn_qkv",
     "diffusion_model.single_blocks.3.linear1"],
)  # fmt: skip
def test_a_lora_of_flux_is_refused_by_qwen_image(name, tmp_path):
    state = {
        f"{name}.lora_down.weight": torch.ones(1, 64),
        f"{name}.lora_up.weight": torch.ones(64, 1),
    }
    save_file(state, tmp_path / "lora.safetensors")
    lora = read_lora(tmp_path / "lora.safetensors")
    with pytest.raises(
        ValueError,
        match=r"is a LoRA for FLUX, but the model is Qwen-Image \(it changes .*; give a LoRA",
    ):
        attach_lora(QWEN_IMAGE, qwen_pipeline().transformer, lora, 1.0)


# ---- model folders


def settings(file: str, **values: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        content = {**json.loads((model / file).read_text()), **values}
        (model / file).write_text(json.dumps(content))

    return change


def without(part: str) -> Callable[[Path], None]:
    return lambda model: shutil.rmtree(model / part)


def text_setting(**values: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / "text_encoder" / "config.json"
        content = json.loads(path.read_text())
        content["text_config"].update(values)
        path.write_text(json.dumps(content))

    return change


def lacking(part: str, name: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (path,) = (model / part).glob("*.safetensors")
        state = load_file(path)
        del state[name]
        save_file(state, path, metadata={"format": "pt"})

    return change


def without_blocks(model: Path) -> None:
    (path,) = (model / "transformer").glob("*.safetensors")
    state = {k: v for k, v in load_file(path).items() if not k.startswith("transformer_blocks.")}
    save_file(state, path, metadata={"format": "pt"})
    settings(NET, num_layers=0)(model)


NET, VAE = "transformer/config.json", "vae/config.json"
BROKEN: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    **{f"no_{part}": (without(part), [part]) for part in QWEN_IMAGE.parts},
    "no_head": (lacking("text_encoder", "lm_head.weight"), ["missing: lm_head.weight;"]),
    "no_layer": (lacking("text_encoder", "model.norm.weight"),
                 ["missing: model.language_model.norm.weight;"]),
    "transformer_lacks_one": (lacking("transformer", "txt_norm.weight"), ["missing: txt_norm."]),
    "narrower": (settings(NET, joint_attention_dim=32), ["transformer", "of another size"]),
    "wide_latents": (settings(VAE, z_dim=8), ["vae", "of another size"]),
    "edits": (settings(NET, zero_cond_t=True), ["zero_cond_t True", "more than a prompt"]),
    "no_blocks": (without_blocks, ["num_layers 0", "fetch it again"]),
    "distilled": (settings(NET, guidance_embeds=True), ["guidance_embeds True"]),
    "axes": (settings(NET, axes_dims_rope=[8, 8, 8]), ["axes_dims_rope [8, 8, 8]"]),
    "no_mean": (settings(VAE, latents_mean=None), ["latents_mean None", "fetch it again"]),
    "short_std": (settings(VAE, latents_std=[1.0]), ["latents_std [1.0]", "list of 16 positive"]),
    "long_std": (settings(VAE, latents_std=[0.123456] * 17), ["..., but it must be a list of 16"]),
    "std_of_zero": (settings(VAE, latents_std=[0.0] * 16), ["latents_std [0.0, "]),
    "vocabulary": (text_setting(vocab_size=600), ["of another size"]),
    "positions": (text_setting(rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                                "mrope_section": [1, 1, 1]}),
                  ["mrope_section [1, 1, 1]", "fetch it again"]),
    "another_end": (text_setting(eos_token_id=7), ["ends a text by token ", "expects 7"]),
    "no_length": (settings("tokenizer/tokenizer_config.json", model_max_length="x"),
                  ["model_max_length 'x'"]),
    "text_config": (text_setting(hidden_size="x"), ["no model can be created"]),
    "ddim": (settings("scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
             ["of a DDIMScheduler"]),
    "no_tokenizer": (settings("model_index.json", tokenizer=None),
                     ["model_index.json has tokenizer None", "fetch it again"]),
    "other_vae": (settings("model_index.json", vae=["diffusers", "AutoencoderKL"]),
                  ["AutoencoderKL instead of", "Qwen-Image pipeline folder"]),
}  # fmt: skip


@pytest.fixture
def model(qwen_world, tmp_path) -> Path:
    return Path(shutil.copytree(qwen_world.model, tmp_path / "model"))


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder(fault, model, qwen_world):
    change, words = BROKEN[fault]
    change(model)
    config = qwen_world.config(model / "run", model__path=str(model))
    message = refused_folder(QWEN_IMAGE, model, config)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "change",
    [
        # As published: a longer length of the tokenizer's than the encoder's own.
        settings("tokenizer/tokenizer_config.json", model_max_length=131072),
        text_setting(max_position_embeddings=100),
        text_setting(eos_token_id=[7, 2]),
        lambda model: (model / "vae" / "config.json").write_text(
            json.dumps({
                key: value for key, value in json.loads((model / VAE).read_text()).items()
                if not key.startswith("latents_")
            })
        ),
        # As published: the text's values beside the vision's.
        lambda model: flattened(model / "text_encoder" / "config.json"),
    ],
    ids=["length", "positions", "ends", "own_statistics", "flat"],
)  # fmt: skip
def test_a_folder_that_loads(change, model, qwen_world):
    assert qwen_pipeline().tokenizer.eos_token_id == 2
    change(model)
    config = replace(qwen_world.config(model).model, path=str(model))
    found, expected = DiffusersPolicy.frozen(config, CPU), base_of(qwen_world)
    assert torch.equal(velocity_of(found), velocity_of(expected))


def flattened(path: Path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **content.pop("text_config")}))


def test_families_are_not_taken_for_each_other(world, qwen_world):
    for name, path in (
        ("flux", qwen_world.model),
        ("qwen_image", world.model),
    ):
        config = ModelConfig(path=str(path), family=name)
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            DiffusersPolicy.load(config, CPU, 0)
        assert "\n" not in str(caught.value)
        assert f"{str(path)!r} (model.path) is a model of the family" in str(caught.value)
    for family, path in ((FLUX, qwen_world.model), (QWEN_IMAGE, world.model)):
        with pytest.raises(ValueError, match=f"set --model.path to a diffusers {family.title} pip"):
            check_folder(family, path)
