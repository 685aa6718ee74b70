"""The names that other programs give to the layers of a FLUX transformer.

Two sets of names are in use: those of the published model, where one layer computes queries, keys
and values together, and those of diffusers, where each has a layer of its own. Some programs write
underscores instead of the dots.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mixgrpo.models.lora_names import without_prefix

_BLOCK = re.compile(
    r"(double_blocks|single_blocks|transformer_blocks|single_transformer_blocks)[._](\d+)[._](.+)"
)

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_TEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
# The published names in a block -> diffusers' names, in the order of the outputs.
_DOUBLE = {
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": _TEXT_QKV,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_OUTER = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
# XLabs' names of adapters, which stand for the attention layers of a block.
_XLABS_DOUBLE = {
    "processor.qkv_lora1": _QKV,
    "processor.qkv_lora2": _TEXT_QKV,
    "processor.proj_lora1": ("attn.to_out.0",),
    "processor.proj_lora2": ("attn.to_add_out",),
}
_XLABS_SINGLE = {"processor.qkv_lora": _QKV, "processor.proj_lora": ("proj_out",)}

Table = Mapping[str, tuple[str, ...]]


def _by_both_names(*tables: Table) -> Table:
    """The layers by the published and by diffusers' names, with underscores for the dots."""
    found: dict[str, tuple[str, ...]] = {}
    for table in tables:
        for name, layers in table.items():
            found[name.replace(".", "_")] = layers
            found.update({layer.replace(".", "_"): (layer,) for layer in layers})
    return found


_IN_BLOCK = {
    "transformer_blocks": _by_both_names(_DOUBLE, _XLABS_DOUBLE),
    "single_transformer_blocks": _by_both_names(_SINGLE, _XLABS_SINGLE),
}
_OUTSIDE = _by_both_names(_OUTER)
_PUBLISHED_BLOCKS = {
    "double_blocks": "transformer_blocks",
    "single_blocks": "single_transformer_blocks",
}


def layers_of(name: str) -> tuple[str, ...]:
    """diffusers' names of the layers that make up a layer, in the order of its outputs.

    Args:
        name: a name with a prefix or without, with dots or underscores.

    Returns:
        One name, several for a layer that diffusers splits, or none if FLUX has no such layer.
    """
    name = without_prefix(name)
    block = _BLOCK.fullmatch(name)
    if block is None:
        return _OUTSIDE.get(name.replace(".", "_"), ())
    kind = _PUBLISHED_BLOCKS.get(block[1], block[1])
    inside = _IN_BLOCK[kind].get(block[3].replace(".", "_"), ())
    return tuple(f"{kind}.{block[2]}.{layer}" for layer in inside)


def is_swapped(name: str) -> bool:
    """Whether the layer's outputs are shift and scale, which diffusers has the other way round."""
    return without_prefix(name).replace(".", "_") == "final_layer_adaLN_modulation_1"
