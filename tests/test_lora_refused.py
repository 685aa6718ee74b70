"""LoRA files that are damaged, of another kind or unclear: one sentence, never a plain reading."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_world import FUSED, KOHYA, SPLIT, Form, behind, named, patterns, small_flux, underscored
from safetensors.torch import save_file
from torch import Tensor

from mixgrpo.files.weight_files import read_names
from mixgrpo.models.adapters import attach_lora
from mixgrpo.models.flux import FLUX
from mixgrpo.models.lora import Lora
from mixgrpo.models.lora_files import is_lora, read_lora

Q = "transformer_blocks.0.attn.to_q"
T = f"transformer.{Q}"
K = "lora_unet_double_blocks_0_img_attn_qkv"
Change = Callable[[dict[str, Any]], Any]


def load(path: Path) -> Lora:
    """As ``sample`` does: recognised, read, attached."""
    assert is_lora(read_names(path))
    lora = read_lora(path)
    attach_lora(FLUX, small_flux(), lora, 1.0)
    return lora


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path.parent) in message
    assert len(message.split("; ")) > 1, "no remedy"
    return message


def diffusers() -> dict[str, Any]:
    return named(SPLIT, behind("transformer."), folded=True)


def kohya() -> dict[str, Any]:
    return named(FUSED, underscored("lora_unet_"), KOHYA, alpha=True)


def nan(weight: Tensor, value: float = float("nan")) -> Tensor:
    weight[1, 1] = value
    return weight


# ---- other kinds of adapters

OTHER_KINDS: list[tuple[str, Change, str]] = [
    ("DoRA", lambda s: s.update({f"{T}.dora_scale": torch.ones(128, 1)}), "is DoRA ("),
    ("PEFT DoRA", lambda s: s.update({f"{T}.lora_magnitude_vector": torch.ones(128)}), "is DoRA ("),
    (
        "PEFT DoRA of a module",
        lambda s: s.update({f"{T}.lora_magnitude_vector.default.weight": torch.ones(128)}),
        "is DoRA (",
    ),
    ("LoKr", lambda s: s.update({f"{K}.lokr_w1": torch.ones(4, 4)}), "is LoKr ("),
    ("LoHa", lambda s: s.update({f"{K}.hada_w1_a": torch.ones(4, 4)}), "is LoHa ("),
    ("OFT", lambda s: s.update({f"{K}.oft_blocks": torch.ones(4, 4, 4)}), "is OFT ("),
    ("PEFT OFT", lambda s: s.update({f"{T}.oft_R.weight": torch.ones(4, 4)}), "is OFT ("),
    ("BOFT", lambda s: s.update({f"{T}.boft_R": torch.ones(4, 4)}), "is OFT ("),
    ("(IA)3", lambda s: s.update({f"{T}.ia3_l": torch.ones(1, 4)}), "is (IA)3 ("),
    ("LyCORIS (IA)3", lambda s: s.update({f"{K}.on_input": torch.tensor(True)}), "is (IA)3 ("),
    ("VeRA", lambda s: s.update({f"{T}.vera_lambda_b": torch.ones(4)}), "is VeRA ("),
    ("AdaLoRA", lambda s: s.update({f"{T}.lora_E": torch.ones(4, 1)}), "is AdaLoRA ("),
    ("GLoRA", lambda s: s.update({f"{K}.a1.weight": torch.ones(4, 4)}), "is GLoRA ("),
    ("Tucker", lambda s: s.update({f"{K}.lora_mid.weight": torch.ones(2, 2, 3, 3)}), "Tucker"),
    ("bias", lambda s: s.update({f"{T}.lora_B.bias": torch.ones(128)}), "a LoRA with biases ("),
    ("kohya bias", lambda s: s.update({f"{K}.lora_up.bias": torch.ones(128)}), "with biases ("),
    ("diff", lambda s: s.update({f"{K}.diff": torch.ones(128, 128)}), "full differences"),
    ("diff_b", lambda s: s.update({f"{K}.diff_b": torch.zeros(128)}), "full differences"),
    ("norm", lambda s: s.update({f"{K}.w_norm": torch.ones(128)}), "full differences"),
    (
        "whole layers",
        lambda s: s.update({"base_model.model.proj_out.modules_to_save.weight": torch.ones(2, 2)}),
        "with whole layers beside the adapters (",
    ),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in OTHER_KINDS],
                         ids=[case[0] for case in OTHER_KINDS])  # fmt: skip
@pytest.mark.parametrize("alone", [True, False])
def test_other_kinds_of_adapters(tmp_path, change, message, alone):
    state = {} if alone else diffusers()
    change(state)
    said = refusal(Form({}, state).write(tmp_path))
    assert message in said
    assert "only plain LoRA is read here; merge the adapters" in said


# ---- tensors

BAD_TENSORS: list[tuple[str, Change, str]] = [
    ("NaN", lambda s: nan(s[f"{T}.lora_A.weight"]), f"{T}.lora_A.weight in"),
    ("infinity", lambda s: nan(s[f"{T}.lora_B.weight"], float("inf")), "holds NaN or infinity"),
    (
        "too large for float32",
        lambda s: nan(s.setdefault(f"{Q}.lora_A.weight", torch.ones(2, 128).double()), 1e300),
        "holds NaN or infinity",
    ),
    ("no second half", lambda s: s.pop(f"{T}.lora_B.weight"), "the other half"),
    ("no first half", lambda s: s.pop(f"{T}.lora_A.weight"), f"the adapter of {T} is missing"),
    (
        "halves that do not match",
        lambda s: s.update({f"{T}.lora_A.weight": torch.ones(4, 128)}),
        f"the halves of the adapter of {T} do not match: [4, 128] and [128, 2]",
    ),
    (
        "the halves exchanged",
        lambda s: s.update({f"{T}.lora_A.weight": s[f"{T}.lora_B.weight"],
                            f"{T}.lora_B.weight": s[f"{T}.lora_A.weight"].clone()}),
        "takes 2 inputs, but the model's",
    ),
    (
        "rank 0",
        lambda s: s.update({f"{T}.lora_A.weight": torch.ones(0, 128),
                            f"{T}.lora_B.weight": torch.ones(128, 0)}),
        "is [0, 128], not a matrix with numbers in it",
    ),
    ("zero size", lambda s: s.update({f"{T}.lora_A.weight": torch.ones(2, 0)}), "is [2, 0], not a"),
    ("a vector", lambda s: s.update({f"{T}.lora_A.weight": torch.ones(128)}), "is [128], not a"),
    (
        "a convolution",
        lambda s: s.update({f"{T}.lora_A.weight": torch.ones(2, 128, 1, 1)}),
        "is [2, 128, 1, 1], not a matrix",
    ),
    (
        "whole numbers",
        lambda s: s.update({f"{T}.lora_A.weight": torch.ones(2, 128, dtype=torch.int8)}),
        "is of type torch.int8, not a matrix of floating-point numbers",
    ),
    (
        "the scale of an 8-bit format",
        lambda s: s.update({f"{T}.lora_A.scale_weight": torch.ones(1)}),
        f"{T}.lora_A.scale_weight is neither a half of an adapter nor its alpha",
    ),
    (
        "base weights",
        lambda s: s.update({f"{T}.base_layer.weight": torch.ones(128, 128)}),
        "base_layer.weight is neither a half",
    ),
    (
        "an embedding",
        lambda s: s.update({"bundle_emb.me.clip_l": torch.ones(1, 4)}),
        "bundle_emb.me.clip_l is neither a half",
    ),
    (
        "two prefixes",
        lambda s: s.update({f"diffusion_model.{Q}.lora_A.weight": torch.ones(2, 128),
                            f"diffusion_model.{Q}.lora_B.weight": torch.ones(128, 2)}),
        f"holds two adapters of {Q}, diffusion_model.{Q} and {T};",
    ),
    (
        "fused and split",
        lambda s: s.update({f"{K}.lora_down.weight": torch.ones(2, 128),
                            f"{K}.lora_up.weight": torch.ones(384, 2)}),
        f"holds two adapters of {Q}, {K} and {T};",
    ),
    (
        "two adapters by name",
        lambda s: s.update({f"{T}.lora_A.one.weight": torch.ones(2, 128)}),
        f"holds two adapters of {T};",
    ),
    (
        "halves by two conventions",
        lambda s: s.update({f"{T}.lora_down.weight": torch.ones(2, 128)}),
        f"holds two adapters of {T};",
    ),
    (
        "halves under two prefixes",
        lambda s: s.update({f"{Q}.lora_B.weight": s.pop(f"{T}.lora_B.weight")}),
        "the other half of the adapter of",
    ),
    ("alpha 0", lambda s: s.update({f"{T}.alpha": torch.tensor(0.0)}), f"{T}.alpha in"),
    ("alpha -0", lambda s: s.update({f"{T}.alpha": torch.tensor(-0.0)}), "others as the rank"),
    ("alpha NaN", lambda s: s.update({f"{T}.alpha": torch.tensor(float("nan"))}), "not a finite"),
    ("alpha inf", lambda s: s.update({f"{T}.alpha": torch.tensor(float("inf"))}), "not a finite"),
    ("two alphas", lambda s: s.update({f"{T}.alpha": torch.ones(2)}), "is not a finite number"),
    ("no alpha's value", lambda s: s.update({f"{T}.alpha": torch.ones(0)}), "is not a finite"),
    (
        "the alpha of no adapter",
        lambda s: s.update({f"{T.replace('0', '1')}.alpha": torch.tensor(1.0)}),
        "has an alpha, but no adapter",
    ),
    (
        "a name of two lines",
        lambda s: s.update({f"{T}\nerror: .lora_A.weight": torch.ones(2, 128)}),
        "it names a tensor 'transformer.transformer_blocks.0.attn.to_q\\nerror: .lora_A.weight'",
    ),
    (
        "another model",
        lambda s: s.update({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.ones(2, 4),
                            "lora_unet_input_blocks_4_1_proj_in.lora_up.weight": torch.ones(4, 2)}),
        "changes lora_unet_input_blocks_4_1_proj_in, and FLUX has no such layer",
    ),
    (
        "more blocks",
        lambda s: s.update({f"{T.replace('0', '18')}.lora_A.weight": torch.ones(2, 128),
                            f"{T.replace('0', '18')}.lora_B.weight": torch.ones(128, 2)}),
        "it changes transformer_blocks.18.attn.to_q, which the model does not have",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in BAD_TENSORS],
                         ids=[case[0] for case in BAD_TENSORS])  # fmt: skip
def test_tensors_that_are_no_lora_of_the_model(tmp_path, change, message):
    state = diffusers()
    change(state)
    assert message in refusal(Form({}, state).write(tmp_path))


@pytest.mark.parametrize("layer", ["double_blocks_0_img_attn_qkv", "single_blocks_0_linear1"])
def test_kohya_of_another_width(tmp_path, layer):
    state = {f"lora_unet_{layer}.lora_down.weight": torch.ones(2, 3072),
             f"lora_unet_{layer}.lora_up.weight": torch.ones(21504, 2)}  # fmt: skip
    said = refusal(Form({}, state).write(tmp_path))
    assert f"lora_unet_{layer} takes 3072 inputs, but the model's" in said
    state[f"lora_unet_{layer}.lora_down.weight"] = torch.ones(2, 128)
    said = refusal(Form({}, state).write(tmp_path))
    assert "has 21504 outputs, but the model needs" in said


def test_negative_alphas_and_alphas_of_other_types(tmp_path):
    """A negative alpha subtracts; diffusers' converter would never return."""
    for value in (-3.0, torch.tensor(-3), torch.tensor([-3.0]), torch.tensor(-3.0).bfloat16()):
        state = {**kohya(), f"{K}.alpha": value}
        lora = load(Form({}, state, file="lora.pt").write(tmp_path))
        assert lora.adapters[K].scale == -1


# ---- settings

BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA', and only LORA is read here"),
    ({"peft_type": None}, "peft_type is None"),
    ({"use_dora": True}, "use_dora is True, which is not read here; merge the adapters"),
    ({"lora_bias": True}, "lora_bias is True"),
    ({"bias": "lora_only"}, "bias is 'lora_only'"),
    ({"modules_to_save": ["proj_out"]}, "modules_to_save is ['proj_out']"),
    ({"layer_replication": [[0, 1]]}, "layer_replication is [[0, 1]]"),
    ({"target_parameters": ["a"]}, "target_parameters is ['a']"),
    ({"use_qalora": True}, "use_qalora is True"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices is [1]"),
    ({"of_a_later_version": 3}, "of_a_later_version is 3, which is not read here"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
    ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    ({"init_lora_weights": ["gaussian"]}, "init_lora_weights is ['gaussian']"),
    ({"r": 5, "rank_pattern": {}}, "the rank 5, but its weights have rank 2"),
    ({"r": 0}, "r is 0, not a whole number above 0"),
    ({"r": "2"}, "r is '2', not a whole number above 0"),
    ({"r": 2.5}, "r is 2.5, not a"),
    ({"r": True}, "r is True, not a"),
    ({"r": None}, "r is None, not a"),
    ({"lora_alpha": float("nan")}, "is not valid JSON (NaN is not a number"),
    ({"lora_alpha": 0}, "lora_alpha is 0, not a"),
    ({"lora_alpha": 10**400}, "is too large"),
    ({"lora_alpha": 1e31}, "lora_alpha is 1e+31, not a number other than 0"),
    ({"r": 10**400, "rank_pattern": {}}, "is too large"),
    ({"lora_alpha": "16"}, "lora_alpha is '16', not a"),
    ({"rank_pattern": [2]}, "rank_pattern is [2], not numbers by layers"),
    ({"rank_pattern": {"a": "b"}}, "rank_pattern is {'a': 'b'}"),
    ({"alpha_pattern": {"to_q": None}}, "alpha_pattern is {'to_q': None}"),
    ({"rank_pattern": {"(": 2}}, "holds a pattern that is not valid"),
]


@pytest.mark.parametrize(("given", "message"), BAD_SETTINGS)
def test_settings_of_something_else(tmp_path, given, message):
    settings = {**patterns(SPLIT), **given}
    peft = named(SPLIT, behind("base_model.model."))
    assert message in refusal(Form({}, peft, {}, settings).write(tmp_path / "peft"))
    header = {f"transformer.{key}": value for key, value in settings.items()}
    said = refusal(Form({}, diffusers(), header).write(tmp_path / "header"))
    assert message in said
    assert "lora_adapter_metadata in the header of" in said


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"a"', "null", "[" * 100_000, "\udcff", "{}"])
def test_settings_that_cannot_be_read(tmp_path, text):
    path = Form({}, named(SPLIT, behind("base_model.model."))).write(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "save the adapters again" in refusal(path)
    if text not in ("\udcff", "{}"):
        save_file(diffusers(), path, metadata={"lora_adapter_metadata": text})
        assert "lora_adapter_metadata in the header of" in refusal(path)


def test_settings_that_are_no_file(tmp_path):
    path = Form({}, named(SPLIT, behind("base_model.model."))).write(tmp_path)
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(ValueError, match=r"adapter_config\.json is a FIFO, not a regular file"):
        load(path)


def test_a_lora_by_peft_without_its_settings(tmp_path):
    """Its strength stands nowhere else; at strength 1 it could be half of what was trained."""
    default = (".lora_A.default.weight", ".lora_B.default.weight")
    for state in (
        named(SPLIT, behind("base_model.model.")),
        named(SPLIT, behind("transformer.base_model.model.")),
        named(SPLIT, behind("module.base_model.model.transformer.")),
        named(SPLIT, behind(""), default),
        named(SPLIT, behind("transformer."), default),
    ):
        said = refusal(Form({}, state).write(tmp_path))
        assert "lora_alpha / r in adapter_config.json, but that file is not beside it; put" in said
    (tmp_path / "adapter_config.json").write_text(json.dumps(patterns(SPLIT)))
    assert load(tmp_path / "lora.safetensors").notes == ()


def test_alphas_and_settings_that_contradict_each_other(tmp_path):
    state = named(SPLIT, behind("transformer."), alpha=True)
    header = {f"transformer.{key}": value for key, value in patterns(SPLIT).items()}
    load(Form({}, state, header).write(tmp_path))
    state[f"{T}.alpha"] = torch.tensor(9.0)
    said = refusal(Form({}, state, header).write(tmp_path))
    assert f"the alpha of {T} gives it the strength 4.5, but lora_adapter_metadata" in said
    assert "the strength 1.5; remove the wrong one" in said


# ---- what is left aside is told

TEXT = "lora_te1_text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize("layer", [TEXT, TEXT.replace("te1", "te2"), TEXT.replace("te1", "te"),
                                   "text_encoder.text_model.encoder.layers.0.mlp.fc1",
                                   "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
                                   "text_encoders.t5xxl.transformer.shared"])  # fmt: skip
def test_adapters_of_a_text_encoder_are_told_of(tmp_path, layer):
    text = {f"{layer}{end}": torch.ones(3, 3) for end in (*KOHYA, ".dora_scale")}
    lora = load(Form({}, {**kohya(), **text}).write(tmp_path))
    (note,) = lora.notes
    assert f"also changes a text encoder (tensors such as {layer}.dora_scale); that" in note
    assert lora.adapters.keys() == {"lora_unet_" + name.replace(".", "_") for name in FUSED}
    said = refusal(Form({}, text).write(tmp_path))
    assert "changes only a text encoder" in said


def test_a_strength_that_is_assumed_is_told_of(tmp_path):
    path = Form({}, named(SPLIT, behind(""), folded=True)).write(tmp_path)
    assert load(path).notes == (
        f"{path} names no alpha of proj_out and 7 more; strength 1 (alpha = rank) is assumed",
    )
    state = named(SPLIT, behind("transformer."), alpha=True)
    del state[f"{T}.alpha"]
    path = Form({}, state).write(tmp_path)
    lora = load(path)
    assert lora.notes == (f"{path} names no alpha of {T}; strength 1 (alpha = rank) is assumed",)
    assert lora.adapters[T].scale == 1
    assert load(Form({}, diffusers()).write(tmp_path)).notes == ()


# ---- files


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_file_is_not_run(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "lora.pt"
    torch.save({f"{T}.lora_A.weight": Malicious()}, path)
    assert "may run code" in refusal(path)
    path.write_bytes(pickle.dumps({f"{T}.lora_A.weight": Malicious()}, protocol))
    refusal(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".ckpt"])
@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"<html>", b"PK\3\4", b"\x80\2}q\0."])
def test_files_that_are_something_else(tmp_path, suffix, content):
    path = tmp_path / f"lora{suffix}"
    path.write_bytes(content)
    message = refusal(path)
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.99])
def test_truncated_files(tmp_path, suffix, keep):
    path = Form({}, diffusers(), file=f"lora{suffix}").write(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    assert str(path) in refusal(path)


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), {3: torch.ones(2)}, None, 3,
                                     {"state_dict": {1: 2}}])  # fmt: skip
def test_pickled_files_of_other_contents(tmp_path, content):
    torch.save(content, tmp_path / "lora.pt")
    assert "state dict (names to " in refusal(tmp_path / "lora.pt")


def test_pickled_values_that_are_no_tensors(tmp_path):
    for value in (3.5, "text", None, [1.0], torch.ones(2, 128).to_sparse(),
                  torch.ones(2, 128, dtype=torch.complex64), torch.ones(2, 128, device="meta"),
                  torch.quantize_per_tensor(torch.ones(2, 128), 1.0, 0, torch.quint8)):  # fmt: skip
        torch.save({**diffusers(), f"{T}.lora_A.weight": value}, tmp_path / "lora.bin")
        assert "not a matrix of floating-point numbers" in refusal(tmp_path / "lora.bin")
    for alpha in (10**400, "3", True, torch.ones((), device="meta"), torch.tensor(1j)):
        torch.save({**diffusers(), f"{T}.alpha": alpha}, tmp_path / "lora.bin")
        assert f"{T}.alpha in" in refusal(tmp_path / "lora.bin")
    torch.save({**diffusers(), "epoch": 3}, tmp_path / "lora.bin")
    assert "epoch is neither a half of an adapter" in refusal(tmp_path / "lora.bin")
