"""Random adapters in the forms in which LoRA files are published, and what they must do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mixgrpo.shapes.architecture import _transformer

WIDTH = 128  # of the small FLUX


@dataclass(frozen=True)
class Made:
    """A random adapter: ``alpha / rank * up @ down``."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def change(self) -> Tensor:
        return self.alpha / self.rank * (self.up.double() @ self.down.double())


def make(rank: int, alpha: float, out: int, into: int, seed: int = 0) -> Made:
    generator = torch.Generator().manual_seed(100 * rank + out + into + seed)
    down = torch.randn(rank, into, generator=generator) / 8
    return Made(down, torch.randn(out, rank, generator=generator) / 8, alpha)


# By diffusers' names: of each block, of each kind of block, and outside; ranks and alphas differ.
SPLIT = {
    "transformer_blocks.0.attn.to_q": make(2, 3, WIDTH, WIDTH),
    "transformer_blocks.1.attn.to_out.0": make(2, 6, WIDTH, WIDTH, 1),
    "transformer_blocks.1.attn.add_v_proj": make(3, 5, WIDTH, WIDTH),
    "transformer_blocks.1.ff.net.0.proj": make(4, 2, 4 * WIDTH, WIDTH),
    "single_transformer_blocks.3.attn.to_k": make(5, 1, WIDTH, WIDTH),
    "single_transformer_blocks.3.proj_out": make(3, 6, WIDTH, 5 * WIDTH),
    "proj_out": make(2, 1, 64, WIDTH),
    "time_text_embed.timestep_embedder.linear_1": make(1, 3, WIDTH, 256),
}
# By the published names, with the layers that they are and their rows.
FUSED = {
    "double_blocks.0.img_attn.qkv": make(3, 6, 3 * WIDTH, WIDTH),
    "double_blocks.1.txt_attn.qkv": make(2, 3, 3 * WIDTH, WIDTH),
    "double_blocks.0.txt_attn.proj": make(4, 2, WIDTH, WIDTH),
    "double_blocks.0.img_mlp.0": make(2, 5, 4 * WIDTH, WIDTH),
    "double_blocks.1.txt_mlp.2": make(3, 1, WIDTH, 4 * WIDTH),
    "double_blocks.1.img_mod.lin": make(2, 1, 6 * WIDTH, WIDTH),
    "single_blocks.2.linear1": make(4, 3, 7 * WIDTH, WIDTH),
    "single_blocks.0.linear2": make(2, 3, WIDTH, 5 * WIDTH),
    "single_blocks.0.modulation.lin": make(1, 2, 3 * WIDTH, WIDTH),
    "img_in": make(2, 3, WIDTH, 64),
    "guidance_in.out_layer": make(3, 2, WIDTH, WIDTH),
    "final_layer.adaLN_modulation.1": make(2, 6, 2 * WIDTH, WIDTH),
}
ROWS: dict[str, list[tuple[str, int, int]]] = {
    "double_blocks.0.img_attn.qkv": [("transformer_blocks.0.attn.to_q", 0, 1),
                                     ("transformer_blocks.0.attn.to_k", 1, 2),
                                     ("transformer_blocks.0.attn.to_v", 2, 3)],
    "double_blocks.1.txt_attn.qkv": [("transformer_blocks.1.attn.add_q_proj", 0, 1),
                                     ("transformer_blocks.1.attn.add_k_proj", 1, 2),
                                     ("transformer_blocks.1.attn.add_v_proj", 2, 3)],
    "double_blocks.0.txt_attn.proj": [("transformer_blocks.0.attn.to_add_out", 0, 1)],
    "double_blocks.0.img_mlp.0": [("transformer_blocks.0.ff.net.0.proj", 0, 4)],
    "double_blocks.1.txt_mlp.2": [("transformer_blocks.1.ff_context.net.2", 0, 1)],
    "double_blocks.1.img_mod.lin": [("transformer_blocks.1.norm1.linear", 0, 6)],
    "single_blocks.2.linear1": [("single_transformer_blocks.2.attn.to_q", 0, 1),
                                ("single_transformer_blocks.2.attn.to_k", 1, 2),
                                ("single_transformer_blocks.2.attn.to_v", 2, 3),
                                ("single_transformer_blocks.2.proj_mlp", 3, 7)],
    "single_blocks.0.linear2": [("single_transformer_blocks.0.proj_out", 0, 1)],
    "single_blocks.0.modulation.lin": [("single_transformer_blocks.0.norm.linear", 0, 3)],
    "img_in": [("x_embedder", 0, 1)],
    "guidance_in.out_layer": [("time_text_embed.guidance_embedder.linear_2", 0, 1)],
}  # fmt: skip
XLABS = {
    "double_blocks.0.processor.qkv_lora1": ("double_blocks.0.img_attn.qkv", 2),
    "double_blocks.1.processor.qkv_lora2": ("double_blocks.1.txt_attn.qkv", 2),
    "double_blocks.0.processor.proj_lora2": ("double_blocks.0.txt_attn.proj", 4),
    "single_blocks.0.processor.proj_lora": ("single_blocks.0.linear2", 2),
}


def changes_of(made: Mapping[str, Made]) -> dict[str, Tensor]:
    """The change of each of diffusers' layers, in closed form, float64."""
    found = {}
    for name, adapter in made.items():
        if name in SPLIT:
            found[name] = adapter.change
        elif name.startswith("final_layer"):  # diffusers has scale before shift
            shift, scale = adapter.change.chunk(2)
            found["norm_out.linear"] = torch.cat([scale, shift])
        else:
            for layer, start, stop in ROWS[name]:
                found[layer] = adapter.change[WIDTH * start : WIDTH * stop]
    return found


@dataclass(frozen=True)
class Form:
    """What a program writes.

    Attributes:
        made: the adapters in it, by names in ``SPLIT`` and ``FUSED``.
        state: name -> tensor.
        header: diffusers' settings in the file's header.
        beside: the contents of adapter_config.json.
        file: the name of the file.
    """

    made: Mapping[str, Made]
    state: dict[str, Any]
    header: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    file: str = "lora.safetensors"

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        if self.beside:
            (folder / "adapter_config.json").write_text(json.dumps(self.beside))
        path = folder / self.file
        if path.suffix == ".safetensors":
            header = {"lora_adapter_metadata": json.dumps(self.header)} if self.header else {}
            save_file(self.state, path, metadata={"format": "pt", **header})
        else:
            torch.save(self.state, path)
        return path


def named(
    made: Mapping[str, Made],
    name: Callable[[str], str],
    halves: tuple[str, str] = (".lora_A.weight", ".lora_B.weight"),
    alpha: bool = False,
    folded: bool = False,
) -> dict[str, Any]:
    """The tensors by their names; with alphas, or with the alphas' effect in the weights."""
    state = {}
    for layer, adapter in made.items():
        stem = name(layer)
        scale = adapter.alpha / adapter.rank if folded else 1
        state[stem + halves[0]] = adapter.down.clone()
        state[stem + halves[1]] = adapter.up * scale
        if alpha:
            state[f"{stem}.alpha"] = torch.tensor(float(adapter.alpha))
    return state


KOHYA = (".lora_down.weight", ".lora_up.weight")


def underscored(prefix: str) -> Callable[[str], str]:
    return lambda layer: prefix + layer.replace(".", "_")


def behind(prefix: str) -> Callable[[str], str]:
    return lambda layer: prefix + layer


def patterns(made: Mapping[str, Made], **more: Any) -> dict[str, Any]:
    """PEFT's settings for adapters of different ranks."""
    return {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 7,
        "rank_pattern": {f"^{layer}": adapter.rank for layer, adapter in made.items()},
        "alpha_pattern": {f"^{layer}": adapter.alpha for layer, adapter in made.items()},
        "target_modules": list(made),
        **more,
    }


def rooted(made: Mapping[str, Made]) -> dict[str, Made]:
    """The same weights, with the alphas that rank-stabilised LoRA needs for the same change."""
    return {layer: Made(a.down, a.up, a.alpha / a.rank * a.rank**0.5) for layer, a in made.items()}


def in_dtype(form: Form, dtype: torch.dtype) -> Form:
    """The form with rounded weights."""
    made = {
        layer: Made(a.down.to(dtype).float(), a.up.to(dtype).float(), a.alpha)
        for layer, a in form.made.items()
    }
    state = {k: v if k.endswith(".alpha") else v.to(dtype) for k, v in form.state.items()}
    return Form(made, state, form.header, form.beside, form.file)


def forms() -> dict[str, Form]:
    """Every form that is read."""
    peft = named(SPLIT, behind("base_model.model."))
    header = {f"transformer.{key}": value for key, value in patterns(SPLIT).items()
              if key != "peft_type"}  # fmt: skip
    kohya = named(FUSED, underscored("lora_unet_"), KOHYA, alpha=True)
    xlabs = {xlabs: FUSED[name] for xlabs, (name, _) in XLABS.items()}
    mixed = {**SPLIT, **{name: FUSED[name] for name in ("img_in", "single_blocks.2.linear1")}}
    old = (".lora.down.weight", ".lora.up.weight")
    default = (".lora_A.default.weight", ".lora_B.default.weight")
    found = {
        "diffusers, folded": Form(SPLIT, named(SPLIT, behind("transformer."), folded=True)),
        "diffusers, alphas": Form(SPLIT, named(SPLIT, behind("transformer."), alpha=True)),
        "diffusers, header": Form(SPLIT, named(SPLIT, behind("transformer.")), header),
        "diffusers, model": Form(SPLIT, named(SPLIT, behind("")), patterns(SPLIT)),
        "diffusers, old": Form(SPLIT, named(SPLIT, behind("transformer."), old, folded=True)),
        "no prefix": Form(SPLIT, named(SPLIT, behind(""), folded=True)),
        "no prefix, config": Form(SPLIT, named(SPLIT, behind("")), beside=patterns(SPLIT)),
        "PEFT": Form(SPLIT, peft, {}, patterns(SPLIT), "adapter_model.safetensors"),
        "PEFT, .bin": Form(SPLIT, peft, {}, patterns(SPLIT), "adapter_model.bin"),
        "PEFT, root": Form(
            SPLIT, peft, {}, patterns(rooted(SPLIT), use_rslora=True), "adapter_model.safetensors"
        ),
        "PEFT, fused": Form(
            FUSED, named(FUSED, behind("base_model.model.")), {}, patterns(FUSED)
        ),
        "state of a module": Form(
            SPLIT,
            named(SPLIT, behind("_orig_mod."), default),
            {},
            patterns(SPLIT),
            "adapters.pt",
        ),
        "ComfyUI": Form(FUSED, named(FUSED, behind("diffusion_model."), alpha=True)),
        "ComfyUI, down": Form(FUSED, named(FUSED, behind("diffusion_model."), KOHYA, alpha=True)),
        "ComfyUI, whole": Form(FUSED, named(FUSED, behind("model.diffusion_model."), folded=True)),
        "ai-toolkit": Form(SPLIT, named(SPLIT, behind("diffusion_model."), folded=True)),
        "both names": Form(mixed, named(mixed, behind("transformer."), alpha=True)),
        "kohya": Form(FUSED, kohya),
        "kohya, .pt": Form(FUSED, {"state_dict": kohya}, file="kohya.pt"),
        "kohya, split": Form(SPLIT, named(SPLIT, underscored("lora_unet_"), KOHYA, alpha=True)),
        "kohya, folded": Form(FUSED, named(FUSED, underscored("lora_unet_"), KOHYA, folded=True)),
        "OneTrainer": Form(
            SPLIT, named(SPLIT, underscored("lora_transformer_"), KOHYA, alpha=True)
        ),
        "LyCORIS": Form(SPLIT, named(SPLIT, underscored("lycoris_"), KOHYA, alpha=True)),
        "XLabs": Form(
            {name: FUSED[name] for name, _ in XLABS.values()},
            named(xlabs, behind(""), (".down.weight", ".up.weight"), folded=True),
        ),
    }  # fmt: skip
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64):
        found[f"kohya, {dtype}"] = in_dtype(found["kohya"], dtype)
    found["PEFT, bfloat16"] = in_dtype(found["PEFT"], torch.bfloat16)
    return found


def small_flux(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return _transformer().to(dtype).requires_grad_(False).eval()
