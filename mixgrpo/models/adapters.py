"""Attaches LoRA adapters to a transformer that is only sampled from."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mixgrpo.models.family import Family, Settings
from mixgrpo.models.lora import Adapter, Lora
from mixgrpo.models.registry import other_families

_NAME = "tuned"
_LARGEST = torch.finfo(torch.float32).max


def adapted_layers(family: Family, targets: str, transformer: Settings) -> str:
    """A pattern of the full names of the layers that get adapters: those with an effect.

    Args:
        targets: the value of ``model.lora_targets``.
        transformer: the configuration of the transformer.
    """
    chosen, unused = family.lora_targets[targets], family.unused_weights(transformer)
    if not unused:
        return chosen
    layers = "|".join(re.escape(prefix.removesuffix(".")) for prefix in unused)
    return rf"(?!({layers})(\.|$))({chosen})"


def lora_of_run(weights: Mapping[str, Tensor], training: Mapping[str, Any], path: Path) -> Lora:
    """Makes a LoRA from the weights of a run's checkpoint, which have their names in training.

    Args:
        training: the configuration of the run, dotted path -> value.
        path: the path of the checkpoint, for messages.
    """
    scale = training["model.lora_alpha"] / training["model.lora_rank"]
    halves = {key.replace(".default.weight", ""): weight.float() for key, weight in weights.items()}
    layers = [key.removesuffix(".lora_A") for key in halves if key.endswith(".lora_A")]
    return Lora(
        {n: Adapter(halves[f"{n}.lora_A"], halves[f"{n}.lora_B"], scale) for n in layers}, path
    )


def attach_lora(family: Family, transformer: Any, lora: Lora, scale: float) -> None:
    """Attaches the adapters to the transformer's layers, in float32, and activates them.

    Args:
        scale: factor on the adapters' outputs.

    Raises:
        ValueError: if they belong to another model or are too strong; the message names the first
            that does not fit.
    """
    adapters = fitted(family, lora, dict(transformer.named_modules()))
    _check_strength(lora, scale)
    targets = "|".join(map(re.escape, adapters))
    transformer.add_adapter(LoraConfig(r=1, lora_alpha=1, target_modules=targets), _NAME)
    for name, adapter in adapters.items():
        layer = transformer.get_submodule(name)
        device = layer.get_base_layer().weight.device
        # Put in place, not copied: PEFT's own weights have the rank 1 and the dtype of the layer.
        layer.lora_A[_NAME] = _linear(adapter.down.to(device))
        layer.lora_B[_NAME] = _linear(adapter.up.to(device))
        layer.r[_NAME] = len(adapter.down)
        layer.scaling[_NAME] = scale * adapter.scale
    streamline(transformer)


def _check_strength(lora: Lora, scale: float) -> None:
    """The change of each layer must be a number in float32, or the images would be black."""
    for name, adapter in lora.adapters.items():
        ends = [float(half.abs().max()) for half in (adapter.down, adapter.up)]
        strength = abs(scale * adapter.scale)
        if not max(strength, strength * len(adapter.down) * math.prod(ends)) < _LARGEST:
            raise ValueError(
                f"the adapter of {name} in {lora.path} is too strong for float32 at lora_scale "
                f"{scale:g}; set a smaller --lora_scale, or give another LoRA"
            )


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def fitted(family: Family, lora: Lora, modules: Mapping[str, nn.Module]) -> dict[str, Adapter]:
    """The adapters by the names of the model's layers.

    Args:
        modules: the model's modules by their names.

    Raises:
        ValueError: if they belong to another model; the message names the first that does not fit.
    """
    found: dict[str, Adapter] = {}
    names: dict[str, str] = {}
    written = {name.replace(".", "_"): name for name in modules}
    for name, adapter in lora.adapters.items():
        layers = [written.get(n.replace(".", "_"), n) for n in family.layers_of(name)]
        found_layers = {layer: modules.get(layer) for layer in layers}
        for complaint in _complaints(family.title, name, adapter, found_layers):
            raise ValueError(_for_another_model(family, lora, complaint))
        up = torch.cat(adapter.up.chunk(2)[::-1]) if family.is_swapped(name) else adapter.up
        sizes = [_size(modules[layer])[0] for layer in layers]
        for layer, rows in zip(layers, up.split(sizes), strict=True):
            if layer in found:
                raise ValueError(
                    f"{lora.path} holds two adapters of {layer}, {names[layer]} and {name}; give a "
                    "file that holds one"
                )
            found[layer], names[layer] = Adapter(adapter.down, rows, adapter.scale), name
    return found


def _for_another_model(family: Family, lora: Lora, complaint: str) -> str:
    for other in other_families(family):
        if other.lora_marks and any(re.search(other.lora_marks, name) for name in lora.adapters):
            return (
                f"{lora.path} is a LoRA for {other.title}, but the model is {family.title} "
                f"({complaint}); give a LoRA for {family.title}, or set --model.path to the model "
                "that it was trained for"
            )
    return (
        f"{lora.path} is a LoRA for another model: {complaint}; give the model that it was trained "
        "for"
    )


def _size(layer: nn.Module | None) -> tuple[int, ...]:
    """(out, in) of a linear layer, else nothing."""
    weight = layer.weight if isinstance(layer, nn.Linear) else None
    return () if weight is None else tuple(weight.shape)


def _complaints(
    title: str, name: str, adapter: Adapter, layers: Mapping[str, nn.Module | None]
) -> Iterator[str]:
    if not layers:
        yield f"it changes {name}, and {title} has no such layer"
    for layer, module in layers.items():
        if module is None:
            yield f"it changes {layer}, which the model does not have"
        elif not _size(module):
            yield f"it changes {layer}, which is not a linear layer"
        elif _size(module)[1] != adapter.down.shape[1]:
            yield (
                f"its adapter of {name} takes {adapter.down.shape[1]} inputs, but the model's "
                f"{layer} takes {_size(module)[1]}"
            )
    outputs = sum(_size(module)[0] for module in layers.values())
    if outputs != len(adapter.up):
        yield f"its adapter of {name} has {len(adapter.up)} outputs, but the model needs {outputs}"


def streamline(transformer: nn.Module) -> None:
    """Lets adapters move less memory than the library's own forward pass; the outputs are the same.

    Their own input casts are turned off, which autocast makes unnecessary, and their outputs are
    scaled and added in one pass instead of two. Kinds of adapters that compute something else, such
    as DoRA, keep the library's.
    """
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
        if isinstance(module, Linear) and _is_plain(module):
            # A bound method, not a closure over the layer: a copy of the layer gets its own.
            module.forward = MethodType(_adapted, module)


def _is_plain(layer: Linear) -> bool:
    has_dropout = any(not isinstance(part, nn.Identity) for part in layer.lora_dropout.values())
    return not layer.lora_variant and not has_dropout


def _adapted(layer: Linear, x: Tensor) -> Tensor:
    """W x + b, and scale * B A x for each active adapter."""
    outputs: Tensor = layer.base_layer(x)
    if layer.disable_adapters or layer.merged:
        return outputs
    for name in layer.active_adapters:
        if name in layer.lora_A:
            change = layer.lora_B[name](layer.lora_A[name](x))
            outputs = torch.add(outputs, change, alpha=layer.scaling[name]).to(outputs.dtype)
    return outputs


@contextlib.contextmanager
def switched_off(transformer: nn.Module) -> Iterator[None]:
    """Context in which the adapters are switched off.

    The libraries' own switch would also freeze the adapters' weights, which must not change under
    an engine that shards or wraps them.
    """
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
