"""Model folders that lack something or are put together wrongly: one sentence, before loading."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from tiny_world import CPU, World, refused_folder

from mixgrpo.commands import main
from mixgrpo.config import Config, ModelConfig
from mixgrpo.models.export_files import export_weights
from mixgrpo.models.flux import FLUX
from mixgrpo.models.policy import DiffusersPolicy
from mixgrpo.models.text import TextEncoders

T5, CLIP, NET, VAE = "text_encoder_2", "text_encoder", "transformer", "vae"
Change = Callable[[Path], None]


@pytest.fixture
def model(world: World, tmp_path: Path) -> Path:
    """The world's model folder, whose files are links."""
    for source in world.model.rglob("*"):
        copy = tmp_path / "model" / source.relative_to(world.model)
        if source.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(source)
    return tmp_path / "model"


def put(path: Path, content: bytes | str) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def weights(model: Path, part: str) -> Path:
    return next((model / part).glob("*.safetensors"))


def change_weights(part: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    def run(model: Path) -> None:
        path = weights(model, part)
        state = change(load_file(path))
        path.unlink()
        save_file(state, path, metadata={"format": "pt"})

    return run


def without_one(part: str, name: str) -> Change:
    return change_weights(part, lambda s: {key: value for key, value in s.items() if key != name})


def as_dtype(part: str, dtype: torch.dtype) -> Change:
    return change_weights(part, lambda s: {key: value.to(dtype) for key, value in s.items()})


def exchanged(source: str, target: str) -> Change:
    """The weights of one part in place of another's."""
    return lambda model: put(weights(model, target), weights(model, source).read_bytes())


def called(part: str, name: str) -> Change:
    return lambda model: weights(model, part).rename(model / part / name) and None  # type: ignore[func-returns-value]


def settings(file: str, **values: Any) -> Change:
    def run(model: Path) -> None:
        content = {**json.loads((model / file).read_text()), **values}
        put(model / file, json.dumps(content))

    return run


def changed_axes(*axes: Any) -> Change:
    """Another value of the transformer's axes_dims_rope, or none."""

    def run(model: Path) -> None:
        content = json.loads((model / NET / "config.json").read_text())
        del content["axes_dims_rope"]
        content.update(dict(zip(["axes_dims_rope"], axes, strict=False)))
        put(model / NET / "config.json", json.dumps(content))

    return run


def containing(file: str, content: bytes | str) -> Change:
    return lambda model: put(model / file, content)


def as_fifo(file: str) -> Change:
    def run(model: Path) -> None:
        (model / file).unlink()
        os.mkfifo(model / file)

    return run


def folder_for(source: str, target: str) -> Change:
    def run(model: Path) -> None:
        shutil.rmtree(model / target)
        shutil.copytree(model / source, model / target)

    return run


def emptied(part: str) -> Change:
    def run(model: Path) -> None:
        shutil.rmtree(model / part)
        (model / part).mkdir()

    return run


def as_file(part: str) -> Change:
    def run(model: Path) -> None:
        shutil.rmtree(model / part)
        (model / part).write_text("a file")

    return run


def two_variants(model: Path) -> None:
    called(VAE, "diffusion_pytorch_model.fp16.safetensors")(model)
    called(CLIP, "model.bf16.safetensors")(model)


def as_pytorch(model: Path) -> None:
    state = load_file(weights(model, T5))
    weights(model, T5).unlink()
    torch.save(state, model / T5 / "pytorch_model.bin")


def with_an_index(model: Path) -> None:
    put(model / NET / "diffusion_pytorch_model.safetensors.index.json", '{"weight_map": {}}')


NORM = "encoder.block.1.layer.1.layer_norm.weight"
TOKENIZER = "tokenizer/tokenizer_config.json"
INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
BROKEN: dict[str, tuple[Change, list[str]]] = {
    "clip_for_t5": (exchanged(CLIP, T5), [T5, "missing: shared.weight", "a CLIP text encoder"]),
    "t5_for_clip": (exchanged(T5, CLIP), [CLIP, "missing", "a T5 text encoder"]),
    "vae_for_transformer": (exchanged(VAE, NET), [NET, "missing", "a VAE"]),
    "t5_lacks_one": (without_one(T5, NORM), [T5, f"missing: {NORM};", "complete weights"]),
    "transformer_lacks_one": (without_one(NET, "proj_out.bias"), ["missing: proj_out.bias;"]),
    "vae_lacks_one": (without_one(VAE, "decoder.conv_in.bias"), ["missing: decoder.conv_in.bias"]),
    "clip_lacks_one": (without_one(CLIP, "final_layer_norm.bias"), ["missing: final_layer_norm"]),
    "no_weights": (change_weights(NET, lambda s: {}), ["missing:", "and 137 more"]),
    "prefixed": (change_weights(T5, lambda s: {f"module.{k}": v for k, v in s.items()}),
                 ["missing: shared.weight", "unexpected: module."]),
    "integers": (as_dtype(T5, torch.int8), ["not floating-point: shared.weight (int8)"]),
    "narrower_transformer": (settings(f"{NET}/config.json", attention_head_dim=16),
                             [NET, "of another size", "instead of"]),
    "narrower_t5": (settings(f"{T5}/config.json", d_model=64), [T5, "of another size"]),
    "more_layers": (settings(f"{T5}/config.json", num_layers=3), ["missing: encoder.block.2."]),
    "fewer_layers": (settings(f"{T5}/config.json", num_layers=1), ["unexpected: encoder.block.1."]),
    "words_for_numbers": (settings(f"{NET}/config.json", num_layers="two"), ["no model can be"]),
    "negative": (settings(f"{NET}/config.json", num_attention_heads=-1), ["no model can be"]),
    "no_heads": (settings(f"{CLIP}/config.json", num_attention_heads=7), ["no model can be"]),
    "null": (settings(f"{CLIP}/config.json", hidden_size=None), ["no model can be"]),
    "config_is_a_list": (containing(f"{VAE}/config.json", "[]"), ["holds a list"]),
    "config_cut": (containing(f"{T5}/config.json", "{"), ["config.json is not valid JSON"]),
    "config_not_text": (containing(f"{T5}/config.json", b"\xff\xfe"), ["config.json is not"]),
    "no_shift": (settings(f"{VAE}/config.json", shift_factor=None), ["shift_factor None"]),
    "no_scale": (settings(f"{VAE}/config.json", scaling_factor=0.0), ["scaling_factor 0.0"]),
    "sd3": (settings(INDEX, _class_name="StableDiffusion3Pipeline",
                     transformer=["diffusers", "SD3Transformer2DModel"]),
            ["StableDiffusion3Pipeline", "SD3Transformer2DModel instead of", "--model.path"]),
    "qwen_image": (settings(INDEX, _class_name="QwenImagePipeline",
                            text_encoder=["transformers", "Qwen2_5_VLForConditionalGeneration"]),
                   ["QwenImagePipeline", "--model.path"]),
    "ltx": (settings(INDEX, _class_name="LTXPipeline", vae=["diffusers", "AutoencoderKLLTXVideo"]),
            ["LTXPipeline", "AutoencoderKLLTXVideo"]),
    "own_code": (settings(INDEX, transformer=["mine", "FluxTransformer2DModel"]), ["mine.Flux"]),
    "without_t5": (settings(INDEX, text_encoder_2=[None, None]), ["text_encoder_2 is None"]),
    "index_of_nothing": (containing(INDEX, "{}"), ["transformer is None"]),
    "index_is_a_list": (containing(INDEX, "[]"), ["holds a list"]),
    "index_empty": (containing(INDEX, ""), ["model_index.json is not valid JSON"]),
    "ddim": (settings(INDEX, scheduler=["diffusers", "DDIMScheduler"]), ["DDIMScheduler"]),
    "ddim_config": (settings(SCHEDULER, _class_name="DDIMScheduler"), ["of a DDIMScheduler"]),
    "no_scheduler_config": (lambda m: (m / SCHEDULER).unlink(), [SCHEDULER, "is missing"]),
    "unknown_tokenizer": (settings(INDEX, tokenizer=["transformers", "Nothing"]), ["tokenizer"]),
    "t5_tokenizer_for_clip": (folder_for("tokenizer_2", "tokenizer"),
                              ["the tokenizer in", "embedding has 131"]),
    "clip_tokenizer_for_t5": (folder_for("tokenizer", "tokenizer_2"), ["/tokenizer_2"]),
    "another_embedding": (settings(f"{CLIP}/config.json", eos_token_id=7),
                          ["ends a text by token 130, but text_encoder expects 7"]),
    "empty_tokenizer": (emptied("tokenizer"), ["/tokenizer", "fetch"]),
    "empty_tokenizer_2": (emptied("tokenizer_2"), ["tokenizer_2 has ", "embedding has", "fetch"]),
    "tokenizer_cut": (containing("tokenizer/tokenizer.json", "{"),
                      ["cannot be read (", "; fetch the tokenizer of text_encoder"]),
    "no_tokenizer_config": (lambda m: (m / TOKENIZER).unlink(), ["tokenizer", "; fetch the tok"]),
    **{
        f"length_{length}": (settings(TOKENIZER, model_max_length=length),
                             [f"model_max_length {int(1e30) if length is None else length!r} ",
                              "of at most", "; fetch the tokenizer of text_encoder"])
        for length in ("x", -1, 0, 8.0, True, None, 10**30, 10**4)
    },
    "length_of_t5": (settings("tokenizer_2/tokenizer_config.json", model_max_length="x"),
                     ["model_max_length 'x'", "; fetch the tokenizer of text_encoder_2"]),
    "no_padding": (settings(TOKENIZER, pad_token=None), ["no padding token; fetch the tokenizer"]),
    **{
        f"quantised_{part}": (settings(f"{part}/config.json", quantization_config={
                                  "quant_method": "bitsandbytes", "load_in_4bit": True}),
                              [part, "quantization_config", "; give the weights before"])
        for part in (NET, VAE, CLIP, T5)
    },
    "no_axes": (changed_axes(), ["axes_dims_rope [16, 56, 56]", "; fetch it again"]),
    **{
        f"axes_{axes}": (changed_axes(axes), [NET, "axes_dims_rope", "; fetch it again"])
        for axes in (None, "x", [2, 2, 2], [4, 6, 7], [9, 11, 12], [32], [-8, 20, 20], [0, 16, 16],
                     [8.0, 12, 12], [[8], 12, 12], {}, 32)
    },
    "web_page": (containing(f"{NET}/diffusion_pytorch_model.safetensors", "<html>Login</html>"),
                 ["a web page"]),
    "lfs": (containing(f"{T5}/model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
            ["git-LFS"]),
    "shard": (called(T5, "model-00001-of-00002.safetensors"), ["number 2 is missing"]),
    "shards_without_index": (called(T5, "model-00001-of-00001.safetensors"), ["index.json"]),
    "other_name": (called(VAE, "ae.safetensors"), ["ae.safetensors", "rename"]),
    "diffusers_name_in_t5": (called(T5, "diffusion_pytorch_model.safetensors"), ["rename"]),
    "two_variants": (two_variants, ["several variants (bf16, fp16)"]),
    "whole_and_index": (with_an_index, ["holds both"]),
    "pytorch": (as_pytorch, ["pytorch_model.bin", "safe_serialization=True"]),
    "fifo_config": (as_fifo(f"{T5}/config.json"), ["a FIFO"]),
    "fifo_weights": (as_fifo(f"{NET}/diffusion_pytorch_model.safetensors"), ["a FIFO"]),
    "fifo_index": (as_fifo(INDEX), ["a FIFO"]),
    "fifo_tokenizer": (as_fifo("tokenizer_2/tokenizer.json"), ["a FIFO"]),
    "fifo_scheduler": (as_fifo(SCHEDULER), ["a FIFO"]),
    "file_for_folder": (as_file(VAE), ["vae is not a folder"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder(fault: str, model: Path) -> None:
    change, words = BROKEN[fault]
    change(model)
    message = refused_folder(FLUX, model, config_of(model))
    assert str(model) in message
    for word in words:
        assert word in message


def in_shards(part: str, name: str, index: str) -> Change:
    def run(model: Path) -> None:
        state = load_file(weights(model, part))
        weights(model, part).unlink()
        places = {key: name.format(1 + number % 2) for number, key in enumerate(state)}
        for file in set(places.values()):
            inside = {key: state[key] for key in state if places[key] == file}
            save_file(inside, model / part / file, metadata={"format": "pt"})
        put(model / part / index, json.dumps({"metadata": {}, "weight_map": places}))

    return run


def config_of(model: Path) -> Config:
    return Config(model=ModelConfig(path=str(model)))


def small(model: Path) -> ModelConfig:
    return ModelConfig(path=str(model), compute_dtype="float32", height=64, width=64)


def export(config: ModelConfig) -> None:
    state = load_file(weights(Path(config.path), NET))
    folder = Path(config.path).parent / "exported"
    export_weights(folder, config, state, lambda names: [state[name] for name in names])


LOADINGS: dict[str, Callable[[ModelConfig], object]] = {
    "training": lambda c: DiffusersPolicy.load(c, CPU, 0),
    "offloaded": lambda c: DiffusersPolicy.load(c, CPU, 0, text_placement="offload"),
    "sharded": lambda c: DiffusersPolicy.load(c, CPU, 0, empty=True),
    "sampling": lambda c: DiffusersPolicy.frozen(c, CPU),
    "preprocessing": lambda c: TextEncoders.load(c, CPU),
    "exporting": export,
}


@pytest.mark.parametrize("loading", LOADINGS)
def test_every_loading_checks_the_folder(loading: str, model: Path) -> None:
    LOADINGS[loading](small(model))
    without_one(T5, NORM)(model)
    with pytest.raises(ValueError, match=rf"{T5} does not fit the model: missing: {NORM};"):
        LOADINGS[loading](small(model))


def test_text_encoders_alone_are_enough_to_encode(model: Path) -> None:
    for part in (NET, VAE, "scheduler"):
        shutil.rmtree(model / part)
    assert TextEncoders.load(small(model), CPU).count_truncated(["red"]) == 0


EXPORTED: dict[str, Change] = {
    "variant": called(NET, "diffusion_pytorch_model.fp16.safetensors"),
    "shards_of_a_variant": in_shards(
        NET,
        "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
    ),
    "another_part": called(VAE, "diffusion_pytorch_model.bf16.safetensors"),
    "shards_of_another_part": in_shards(
        T5, "model.bf16-0000{}-of-00002.safetensors", "model.safetensors.index.bf16.json"
    ),
}


@pytest.mark.parametrize("form", EXPORTED)
def test_an_export_needs_no_variant_to_be_named(form: str, model: Path, world: World) -> None:
    EXPORTED[form](model)
    state = load_file(weights(world.model, NET))
    folder = model.parent / "exported"
    export_weights(folder, small(model), state, lambda names: [state[name] for name in names])
    assert not [path for path in folder.rglob("*") if "16" in path.name]
    found = FluxPipeline.from_pretrained(folder, local_files_only=True)
    expected = FluxPipeline.from_pretrained(world.model, local_files_only=True)
    for part in (NET, VAE, CLIP, T5):
        own = getattr(found, part).state_dict()
        for name, value in getattr(expected, part).state_dict().items():
            assert torch.equal(own[name], value)


def test_stored_embeddings_need_no_text_encoder(model: Path) -> None:
    exchanged(CLIP, T5)(model)
    text: Any = object()
    assert DiffusersPolicy.load(small(model), CPU, 0, stored=text).text is text


@pytest.mark.parametrize("part", [NET, VAE, CLIP, T5])
def test_weights_that_are_not_finite(part: str, model: Path) -> None:
    def one_infinite(state: dict[str, Any]) -> dict[str, Any]:
        last = sorted(state)[-1]
        state[last].view(-1)[-1] = float("inf")
        return state

    change_weights(part, one_infinite)(model)
    with pytest.raises(ValueError, match=rf"{part} holds weights that are not finite, such as"):
        DiffusersPolicy.frozen(small(model), CPU)


WHOLE: dict[str, Change] = {
    "variant": called(NET, "diffusion_pytorch_model.fp16.safetensors"),
    "variant_of_t5": called(T5, "model.bf16.safetensors"),
    "float64": as_dtype(NET, torch.float64),
    "clip_as_once": change_weights(CLIP, lambda s: {f"text_model.{k}": v for k, v in s.items()}),
    "kontext": settings(INDEX, _class_name="FluxKontextPipeline",
                        image_encoder=["transformers", "CLIPVisionModelWithProjection"]),
}  # fmt: skip


@pytest.mark.parametrize("form", WHOLE)
def test_a_folder_that_loads(form: str, model: Path, world: World) -> None:
    WHOLE[form](model)
    found, expected = (
        DiffusersPolicy.frozen(small(model), CPU),
        DiffusersPolicy.frozen(small(world.model), CPU),
    )
    for part in (NET, VAE, CLIP, T5):
        own = getattr(found.pipeline, part).state_dict()
        for name, value in getattr(expected.pipeline, part).state_dict().items():
            assert torch.equal(own[name], value)


def test_sampling_makes_no_folder_for_a_broken_model(model: Path, world: World, capfd: Any) -> None:
    exchanged(CLIP, T5)(model)
    arguments = ["sample", "--model.path", str(model), "--prompts_file", str(world.prompts)]
    assert main([*arguments, "--folder", str(model.parent / "pictures")]) == 1
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error"))
    assert T5 in line
    assert not (model.parent / "pictures").exists()
