"""LoRA files of every form that is in use: the change of each layer, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from lora_world import (
    KOHYA,
    SPLIT,
    Form,
    Made,
    behind,
    changes_of,
    forms,
    make,
    named,
    small_flux,
    underscored,
)
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from small import relative_error
from torch import Tensor

from mixgrpo.files.weight_files import read_names
from mixgrpo.models.adapters import attach_lora, fitted
from mixgrpo.models.flux import FLUX
from mixgrpo.models.flux_names import layers_of
from mixgrpo.models.lora_files import is_lora, read_lora

FORMS = forms()


def changes(module: torch.nn.Module) -> dict[str, Tensor]:
    """What merging the adapters would add to each layer, by PEFT's own arithmetic."""
    return {
        name: layer.get_delta_weight("tuned")
        for name, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }


def loaded(path: Path, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> dict[str, Tensor]:
    module = small_flux(dtype)
    attach_lora(FLUX, module, read_lora(path), scale)
    return changes(module)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], scale: float = 1) -> None:
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), scale * change, rtol=0, atol=1e-6)
        assert change.abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_changes_each_layer_as_its_numbers_say(name, dtype, tmp_path):
    path = FORMS[name].write(tmp_path)
    assert is_lora(read_names(path))
    assert_close(loaded(path, dtype), changes_of(FORMS[name].made))
    assert_close(loaded(path, dtype, 0.5), changes_of(FORMS[name].made), 0.5)


def test_names_of_every_layer():
    linear = [n for n, m in small_flux().named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) > 50
    for name in linear:
        assert layers_of(name) == layers_of(f"transformer.{name}") == (name,)
        assert layers_of("lora_unet_" + name.replace(".", "_")) == (name,)


# ---- against the libraries themselves


def randomised(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(generator=generator)


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("safe", [True, False])
def test_what_peft_saves(tmp_path, root, safe):
    """As Flow-GRPO and other trainers save adapters: a folder, with the alpha in the settings."""
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        use_rslora=root,
        target_modules=["to_q", "attn.to_out.0", "proj_mlp"],
        rank_pattern={"to_q": 2, r"transformer_blocks\.1\.attn\.to_out\.0": 3},
        alpha_pattern={r"single_transformer_blocks\.\d+\.attn\.to_q": 5},
    )
    model = get_peft_model(small_flux(), config, "tuned")
    randomised(model)
    model.set_adapter("tuned")
    # PEFT makes a folder of an adapter that is not called "default".
    model.save_pretrained(tmp_path, safe_serialization=safe)
    (file,) = (tmp_path / "tuned").glob("adapter_model.*")
    expected = {
        name.removeprefix("base_model.model."): change for name, change in changes(model).items()
    }
    assert len({len(change) for change in expected.values()}) > 1
    assert_close(loaded(file), {name: change.double() for name, change in expected.items()})


def test_what_diffusers_saves(tmp_path):
    module = small_flux()
    module.add_adapter(LoraConfig(r=2, lora_alpha=7, target_modules=["to_q", "ff.net.2"]), "tuned")
    randomised(module)
    module.save_lora_adapter(tmp_path / "model", "tuned")
    FluxPipeline.save_lora_weights(
        tmp_path / "pipeline",
        get_peft_model_state_dict(module, adapter_name="tuned"),
        transformer_lora_adapter_metadata=module.peft_config["tuned"].to_dict(),
    )
    for folder in ("model", "pipeline"):
        (file,) = (tmp_path / folder).iterdir()
        assert_close(loaded(file), {name: c.double() for name, c in changes(module).items()})


@pytest.mark.parametrize(
    "name", ["diffusers, folded", "diffusers, alphas", "diffusers, header", "no prefix, config"]
)
def test_diffusers_reads_the_same_from_what_it_can_read(name, tmp_path):
    form = FORMS[name]
    if name == "no prefix, config":
        form = Form(SPLIT, form.state, form.beside)
    path = form.write(tmp_path)
    module = small_flux()
    prefix = None if name == "no prefix, config" else "transformer"
    state, alphas, header = FluxPipeline.lora_state_dict(
        str(tmp_path), weight_name=path.name, return_alphas=True, return_lora_metadata=True
    )
    module.load_lora_adapter(
        state,
        prefix=prefix,
        network_alphas=None if header else alphas or None,
        metadata=header or None,
        adapter_name="tuned",
    )
    assert_close(changes(module), changes_of(SPLIT))


@pytest.fixture(scope="module")
def flux_dev() -> dict[str, torch.nn.Module]:
    """The layers of FLUX.1-dev, without memory."""
    with torch.device("meta"):
        module = FluxTransformer2DModel(
            num_layers=19, num_single_layers=38, guidance_embeds=True, pooled_projection_dim=768
        )
    return dict(module.named_modules())


PUBLISHED = {
    "img_attn.qkv": (3072, 9216), "txt_attn.qkv": (3072, 9216), "img_attn.proj": (3072, 3072),
    "txt_attn.proj": (3072, 3072), "img_mlp.0": (3072, 12288), "img_mlp.2": (12288, 3072),
    "txt_mlp.0": (3072, 12288), "txt_mlp.2": (12288, 3072), "img_mod.lin": (3072, 18432),
    "txt_mod.lin": (3072, 18432), "linear1": (3072, 21504), "linear2": (15360, 3072),
    "modulation.lin": (3072, 9216),
}  # fmt: skip


def published(blocks: Sequence[str]) -> dict[str, Made]:
    """Random adapters of all layers of these blocks of FLUX.1-dev, by the published names."""
    return {
        f"{block}.{name}": make(1 + i % 2, 3, out, into, seed)
        for seed, block in enumerate(blocks)
        for i, (name, (into, out)) in enumerate(PUBLISHED.items())
        if block.startswith("single") == (name in ("linear1", "linear2", "modulation.lin"))
    }


BLOCKS = ("double_blocks.0", "double_blocks.18", "single_blocks.1", "single_blocks.37")
CONVERTED = {
    "kohya": lambda: named(published(BLOCKS), underscored("lora_unet_"), KOHYA, alpha=True),
    "ComfyUI": lambda: named(published(BLOCKS), behind("diffusion_model."), KOHYA, alpha=True),
    "XLabs": lambda: named(
        {
            f"{block}.processor.{name}": make(2, 2, out, 3072, i)
            for i, block in enumerate(BLOCKS)
            for name, out in (("qkv_lora1", 9216), ("qkv_lora2", 9216), ("proj_lora1", 3072),
                              ("proj_lora2", 3072), ("qkv_lora", 9216))
            if (name == "qkv_lora") == block.startswith("single")
        },
        behind(""),
        (".down.weight", ".up.weight"),
    ),
    "fal": lambda: named(
        {
            **published([f"double_blocks.{i}" for i in range(19)]),
            **published([f"single_blocks.{i}" for i in range(38)]),
            "final_layer.linear": make(2, 2, 64, 3072),
        },
        behind("base_model.model."),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_diffusers_converts_to_the_same_at_the_size_of_flux_1_dev(name, flux_dev, tmp_path):
    state = CONVERTED[name]()
    # Without alphas, diffusers takes these two at strength 1; PEFT's settings can say the same.
    one = {"r": 2, "lora_alpha": 2, "rank_pattern": {}, "alpha_pattern": {}}
    if name == "fal":
        of_rank_1 = [k for k, v in state.items() if k.endswith("lora_A.weight") and len(v) == 1]
        ones = {k.removeprefix("base_model.model.")[: -len(".lora_A.weight")]: 1 for k in of_rank_1}
        one.update(rank_pattern=ones, alpha_pattern=ones)
    path = Form({}, state, beside=one if name == "fal" else {}).write(tmp_path)
    ours = fitted(FLUX, read_lora(path), flux_dev)
    theirs = FluxPipeline.lora_state_dict(dict(state))
    layers = {key.rpartition(".lora_")[0].removeprefix("transformer."): key for key in theirs}
    assert ours.keys() == layers.keys()
    assert len(ours) > 20
    for layer, adapter in ours.items():
        key = layers[layer].rpartition(".lora_")[0]
        down, up = theirs[f"{key}.lora_A.weight"], theirs[f"{key}.lora_B.weight"]
        x = torch.randn(down.shape[1], 2)
        found = adapter.scale * (adapter.up @ (adapter.down @ x))
        assert relative_error(found, up @ (down @ x)) < 1e-5
