"""Model folders and checkpoints: every form that loads, and one clear error for each that fails."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import load_file, save_file

from mixgrpo.rewards import build_reward
from mixgrpo.rewards.imagereward import ImageRewardModel, VisionSize, to_imagereward_keys
from mixgrpo.rewards.imagereward_model import from_imagereward_keys
from mixgrpo.rewards.open_clip_models import _preprocess
from mixgrpo.rewards.registry import check_call

from . import tiny

Folders = dict[str, Path]
IMAGES = tiny.images(2, tiny.SIZE, tiny.SIZE)
TEXTS = tiny.TEXTS[:2]
WEIGHTS = {
    "hpsv2": "open_clip_model.safetensors",
    "clip_score": "open_clip_model.safetensors",
    "pickscore": "model.safetensors",
    "imagereward": "ImageReward.safetensors",
}


@pytest.fixture
def copy(folders: Folders, tmp_path: Path) -> Folders:
    """The tiny folders again, to be damaged."""
    return {name: shutil.copytree(path, tmp_path / name) for name, path in folders.items()}


def build(name: str, folder: Path, **options: Any) -> Any:
    return build_reward(name, {"model": str(folder), **options})


# --- forms that load ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hpsv2", "clip_score", "imagereward"])
@pytest.mark.parametrize("form", ["safetensors", "pt", "state_dict", "module."])
def test_checkpoint_elsewhere_in_any_form(name: str, form: str, copy: Folders) -> None:
    inside = copy[name] / WEIGHTS[name]
    expected = build(name, copy[name])(IMAGES, TEXTS)
    state: dict[str, Any] = load_file(inside)
    path = copy[name].parent / ("weights.safetensors" if form == "safetensors" else "weights.pt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "module.":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if form == "state_dict" else state, path)
    inside.unlink()
    scores = build(name, copy[name], checkpoint=str(path))(IMAGES, TEXTS)
    assert torch.equal(scores, expected)


@pytest.fixture
def architecture(tmp_path: Path) -> Iterator[str]:
    """A tiny architecture in open_clip's own list, with CLIP's own tokenizer."""
    config = tiny.open_clip_config(49408)["model_cfg"]
    del config["text_cfg"]["hf_tokenizer_name"]
    path = tmp_path / "tiny-arch.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    yield "tiny-arch"
    open_clip.factory._MODEL_CONFIG_PATHS.remove(path)
    open_clip.factory._MODEL_CONFIGS.pop("tiny-arch")


def test_an_architecture_with_the_published_form_of_checkpoint(
    architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = open_clip.create_model(architecture).eval()
    path = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": {k: v.half() for k, v in model.state_dict().items()}}, path)
    model.load_state_dict(torch.load(path)["state_dict"])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        reward = build_reward("hpsv2", {"model": architecture, "checkpoint": str(path)})
    assert not caplog.records  # no word of random weights
    pixels = image_transform_v2(
        PreprocessCfg(size=tiny.SIZE), is_train=False
    )  # a square image of the model's size: only normalised
    batch = torch.stack([pixels(tiny.to_pil(image)) for image in IMAGES])
    tokens = open_clip.tokenize(TEXTS, context_length=16)
    with torch.no_grad():
        image = model.encode_image(batch, normalize=True)
        expected = (image * model.encode_text(tokens, normalize=True)).sum(-1)
    torch.testing.assert_close(reward(IMAGES, TEXTS), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture_name", "resize_mode"),
    [("ViT-H-14-378-quickgelu", "squash"), ("ViT-H-14", "shortest")],
)
def test_an_architecture_takes_the_preprocessing_of_its_published_weights(
    architecture_name: str, resize_mode: str
) -> None:
    defaults = {**vars(PreprocessCfg()), "size": 378}
    module = SimpleNamespace(visual=SimpleNamespace(preprocess_cfg=defaults))
    settings = _preprocess(module, None, architecture_name)
    assert settings["resize_mode"] == resize_mode
    assert settings["size"] == (378, 378)


@pytest.mark.parametrize("name", ["hpsv2", "clip_score", "pickscore", "imagereward"])
def test_tokenizer_in_another_folder(name: str, copy: Folders) -> None:
    expected = build(name, copy[name])(IMAGES, TEXTS)
    elsewhere = copy[name].parent / "tokenizer"
    elsewhere.mkdir()
    kept = {"config.json", "med_config.json", "vision_config.json", "open_clip_config.json"}
    for file in copy[name].iterdir():
        if file.name not in kept | {WEIGHTS[name]}:
            file.rename(elsewhere / file.name)
    option = "processor" if name == "pickscore" else "tokenizer"
    scores = build(name, copy[name], **{option: str(elsewhere)})(IMAGES, TEXTS)
    assert torch.equal(scores, expected)


def test_pickscore_files_of_the_published_generation(copy: Folders) -> None:
    """PickScore_v1 and its processor are older than transformers' present forms."""
    folder = copy["pickscore"]
    images = tiny.images(2, 48, 40)
    expected = build("pickscore", folder)(images, TEXTS)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"size": tiny.SIZE, "crop_size": tiny.SIZE}  # numbers, not dicts
    settings["feature_extractor_type"] = "CLIPFeatureExtractor"
    del settings["image_processor_type"]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2  # stands for the largest token of a text
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(build("pickscore", folder)(images, TEXTS), expected)


def test_imagereward_tokenizer_as_tokenizer_json(copy: Folders) -> None:
    from transformers import BertTokenizer

    folder = copy["imagereward"]
    expected = build("imagereward", folder)(IMAGES, TEXTS)
    tokenizer = BertTokenizer.from_pretrained(folder)
    (folder / "vocab.txt").unlink()
    tokenizer.save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()
    assert torch.equal(build("imagereward", folder)(IMAGES, TEXTS), expected)


def test_imagereward_ignores_what_the_published_file_holds_besides(copy: Folders) -> None:
    folder = copy["imagereward"]
    expected = build("imagereward", folder)(IMAGES, TEXTS)
    state = load_file(folder / WEIGHTS["imagereward"])
    state["blip.vision_proj.weight"] = torch.zeros(256, 32)
    state["blip.text_proj.bias"] = torch.zeros(256)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    (folder / WEIGHTS["imagereward"]).unlink()
    torch.save(state, folder / "ImageReward.pt")
    assert torch.equal(build("imagereward", folder)(IMAGES, TEXTS), expected)


def test_imagereward_key_names_there_and_back() -> None:
    own = ImageRewardModel(VisionSize(**tiny.VISION), tiny.MED).state_dict()
    published = to_imagereward_keys(own)
    for key in (
        "blip.visual_encoder.cls_token",
        "blip.visual_encoder.pos_embed",
        "blip.visual_encoder.patch_embed.proj.weight",
        "blip.visual_encoder.blocks.1.norm1.weight",
        "blip.visual_encoder.blocks.1.attn.qkv.bias",
        "blip.visual_encoder.blocks.1.attn.proj.weight",
        "blip.visual_encoder.blocks.1.norm2.bias",
        "blip.visual_encoder.blocks.1.mlp.fc2.weight",
        "blip.visual_encoder.norm.weight",
        "blip.text_encoder.embeddings.word_embeddings.weight",
        "blip.text_encoder.encoder.layer.2.crossattention.self.key.weight",
        "blip.text_encoder.encoder.layer.2.attention.output.LayerNorm.bias",
        "mlp.layers.7.bias",
    ):
        assert key in published
    assert all(key.startswith(("blip.", "mlp.layers.")) for key in published)
    back = from_imagereward_keys(published)
    assert list(back) == list(own)
    assert all(torch.equal(back[key], own[key]) for key in own)


def test_the_published_imagereward_has_its_published_sizes() -> None:
    med = {
        "vocab_size": 30524,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "encoder_width": 768,
    }
    with torch.device("meta"):
        state = ImageRewardModel(VisionSize(), med).state_dict()
    shapes = {key: tuple(value.shape) for key, value in to_imagereward_keys(state).items()}
    assert shapes["blip.visual_encoder.pos_embed"] == (1, 197, 1024)
    assert shapes["blip.visual_encoder.blocks.23.attn.qkv.weight"] == (3072, 1024)
    assert "blip.visual_encoder.blocks.24.norm1.weight" not in shapes
    assert shapes["blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"] == (
        768,
        1024,
    )
    heads = [shapes[f"mlp.layers.{index}.weight"] for index in (0, 2, 4, 6, 7)]
    assert heads == [(1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)]


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_missing_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{name}: no folder '.*nowhere'.*`model`"):
        build(name, tmp_path / "nowhere")


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_missing_weights(name: str, copy: Folders) -> None:
    (copy[name] / WEIGHTS[name]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: folder .* holds none of .*set the"):
        build(name, copy[name])


@pytest.mark.parametrize("name", ["hpsv2", "clip_score", "imagereward"])
def test_missing_checkpoint(name: str, folders: Folders) -> None:
    with pytest.raises(FileNotFoundError, match=f"{name}: no file 'gone.pt'.*`checkpoint` to its"):
        build(name, folders[name], checkpoint="gone.pt")


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_truncated_weights(name: str, copy: Folders) -> None:
    path = copy[name] / WEIGHTS[name]
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{path.name} is truncated: .*; download it again"):
        build(name, copy[name])


@pytest.mark.parametrize("name", ["hpsv2", "imagereward"])
@pytest.mark.parametrize(
    ("content", "message"),
    [("short", "that is truncated"), ("empty", "is empty"), ("text", "a git-LFS pointer")],
)
def test_broken_pt_file(name: str, content: str, message: str, copy: Folders) -> None:
    path = copy[name].parent / "broken.pt"
    torch.save(load_file(copy[name] / WEIGHTS[name]), path)
    whole = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    path.write_bytes({"short": whole[:-1000], "empty": b"", "text": pointer}[content])
    with pytest.raises(ValueError, match=rf"broken\.pt is .*{message}|broken\.pt {message}"):
        build(name, copy[name], checkpoint=str(path))


class Payload:
    """Code in a pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code ran",)


def test_code_in_a_checkpoint_does_not_run(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"weight": Payload()}, path)
    with pytest.raises(ValueError, match=r"evil\.pt cannot be read"):
        build("hpsv2", folders["hpsv2"], checkpoint=str(path))
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", list(WEIGHTS))
@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_weights_that_do_not_fit_the_model(name: str, fault: str, copy: Folders) -> None:
    path = copy[name] / WEIGHTS[name]
    state = load_file(path)
    key = next(key for key in state if key.endswith("fc1.bias") or key.endswith("c_fc.bias"))
    if fault == "missing":
        del state[key]
    elif fault == "unexpected":
        key = key.replace("bias", "scale")
        state[key] = torch.zeros(2)
    else:
        state[key] = torch.zeros(5)
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=str(copy[name])) as info:
        build(name, copy[name])
    word = {"mismatched": f"{key} [5] instead of ["}.get(fault, fault)
    assert word in str(info.value)
    assert key in str(info.value)


def test_a_file_without_a_state_dict(folders: Folders, tmp_path: Path) -> None:
    path = tmp_path / "numbers.pt"
    for content in ([1, 2], {"a": 1}, {}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"numbers\.pt holds (a list|no state dict)"):
            build("hpsv2", folders["hpsv2"], checkpoint=str(path))


def test_unknown_architecture_and_architecture_without_weights() -> None:
    with pytest.raises(ValueError, match=r"'ViT-H14' is neither .*nearest: .*ViT-H-14"):
        build_reward("hpsv2", {"model": "ViT-H14"})
    with pytest.raises(FileNotFoundError, match=r"hpsv2: .*'ViT-H-14' comes without .*checkpoint"):
        build_reward("hpsv2", {})


@pytest.mark.parametrize("name", ["pickscore", "imagereward"])
def test_folder_without_tokenizer(name: str, copy: Folders) -> None:
    for file in ("tokenizer.json", "vocab.txt"):
        (copy[name] / file).unlink(missing_ok=True)
    option = "processor" if name == "pickscore" else "tokenizer"
    with pytest.raises(FileNotFoundError, match=f"{name}: .*tokenizer.json.*`{option}`"):
        build(name, copy[name])


def test_open_clip_folder_that_forgets_its_tokenizer(copy: Folders) -> None:
    path = copy["hpsv2"] / "open_clip_config.json"
    config = json.loads(path.read_text())
    del config["model_cfg"]["text_cfg"]["hf_tokenizer_name"]
    path.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="has 49408 tokens, but the model's embedding has 18; set `hf_tok"
    ):
        build("hpsv2", copy["hpsv2"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize_mode": "stretch"}, "shortest, longest or squash, got 'stretch'"),
        ({"interpolation": "nearest"}, "bicubic or bilinear, got 'nearest'"),
    ],
)
def test_preprocessing_that_is_not_known(
    settings: dict[str, str], message: str, copy: Folders
) -> None:
    path = copy["clip_score"] / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["preprocess_cfg"].update(settings)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        build("clip_score", copy["clip_score"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vision_config.json", '{"patch": 8}', r"unknown keys \['patch'\]; it accepts image_size"),
        ("vision_config.json", '{"patch_size": 9}', "patch_size 9 must divide image_size 224"),
        ("vision_config.json", '{"heads": 3}', "heads 3 must divide width 1024"),
        ("vision_config.json", "[]", "holds a list, not a JSON object"),
        ("med_config.json", "{", "med_config.json is not valid JSON"),
        ("med_config.json", '{"hidden_size": 48}', "lacks vocab_size, intermediate_size"),
    ],
)
def test_imagereward_configurations_that_are_wrong(
    file: str, content: str, message: str, copy: Folders
) -> None:
    (copy["imagereward"] / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        build("imagereward", copy["imagereward"])


# --- damage that a library would not notice, or would not name -----------------------------------

SETTINGS = {
    "hpsv2": "open_clip_config.json",
    "clip_score": "open_clip_config.json",
    "pickscore": "config.json",
    "imagereward": "med_config.json",
}


def refused(name: str, folder: Path) -> str:
    """The one sentence that building the reward and checking its files both say."""
    target = check_call(name, {"model": str(folder)})
    messages = []
    for run in (build, lambda _, folder: target.check_files(model=str(folder))):
        with pytest.raises((ValueError, OSError)) as caught:
            run(name, folder)
        assert "\n" not in str(caught.value)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    return messages[0]


def tokenizer_files(folder: Path) -> list[Path]:
    return [path for name in ("tokenizer.json", "vocab.txt") if (path := folder / name).exists()]


@pytest.mark.parametrize("name", list(WEIGHTS))
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"<html>Login</html>"])
def test_a_damaged_tokenizer(name: str, content: bytes, copy: Folders) -> None:
    for file in tokenizer_files(copy[name]):
        file.write_bytes(content)
    message = refused(name, copy[name])
    assert f"{name}: the tokenizer in {copy[name]}" in message
    assert "set the reward's `" in message


def test_a_tokenizer_that_lacks_words_of_the_model(copy: Folders) -> None:
    vocabulary = copy["imagereward"] / "vocab.txt"
    vocabulary.write_text("\n".join(vocabulary.read_text().splitlines()[:6]) + "\n")
    assert "tokens, but the model's embedding has" in refused("imagereward", copy["imagereward"])


@pytest.mark.parametrize("name", list(WEIGHTS))
@pytest.mark.parametrize("which", ["weights", "settings", "tokenizer"])
def test_what_is_no_regular_file_is_not_opened(name: str, which: str, copy: Folders) -> None:
    files = {
        "weights": [copy[name] / WEIGHTS[name]],
        "settings": [copy[name] / SETTINGS[name]],
        "tokenizer": tokenizer_files(copy[name]),
    }
    for file in files[which]:
        file.unlink()
        os.mkfifo(file)
    assert f"{files[which][0]} is a FIFO, not a regular file" in refused(name, copy[name])


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_weights_that_are_not_finite(name: str, copy: Folders) -> None:
    path = copy[name] / WEIGHTS[name]
    state = load_file(path)
    state[sorted(state)[-1]].view(-1)[-1] = float("nan")
    save_file(state, path)
    with pytest.raises(ValueError, match=f"{path} holds weights that are not finite, such as"):
        build(name, copy[name])


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_weights_of_another_kind_are_named(name: str, copy: Folders) -> None:
    path = copy[name] / WEIGHTS[name]
    save_file({"a.lora_A.weight": torch.ones(2, 2)}, path)
    assert "it holds a LoRA, not full weights; give full weights" in refused(name, copy[name])
    path.write_bytes(b"GGUF" + bytes(60))
    assert f"{path} is a GGUF file" in refused(name, copy[name])
    path.unlink()
    path.symlink_to(".git/annex/objects/a/b")
    assert f"git annex get {path.name}" in refused(name, copy[name])
    path.unlink()
    path.mkdir()
    assert f"{path} is a folder, not a regular file" in refused(name, copy[name])


@pytest.mark.parametrize("parts", ["safetensors", "bin"])
def test_pickscore_in_several_files(parts: str, copy: Folders) -> None:
    folder = copy["pickscore"]
    expected = build("pickscore", folder)(IMAGES, TEXTS)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if parts == "safetensors" else "pytorch_model"
    save: Any = save_file if parts == "safetensors" else torch.save
    places: dict[str, str] = {}
    files = [f"{stem}-{number:05}-of-00002.{parts}" for number in (1, 2)]
    for number, file in enumerate(files):
        names = sorted(state)[number::2]
        save({key: state[key] for key in names}, folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{stem}.{parts}.index.json").write_text(json.dumps(index))
    assert torch.equal(build("pickscore", folder)(IMAGES, TEXTS), expected)
    (folder / files[1]).unlink()
    assert f"names {files[1]}, which does not exist" in refused("pickscore", folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"shortest_edge": "x"}}, "cannot be used"),
        ({"image_mean": [0.5, 0.5]}, "cannot be used"),
        ({"crop_size": {"height": 24, "width": 24}}, "make images of 24x24, but the model takes"),
    ],
)
def test_pickscore_settings_that_are_wrong(
    settings: dict[str, Any], message: str, copy: Folders
) -> None:
    path = copy["pickscore"] / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(ValueError, match=f"pickscore: the settings in {path} {message}"):
        build("pickscore", copy["pickscore"])
