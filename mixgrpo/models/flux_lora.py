"""Reads, checks and attaches LoRA files for a FLUX transformer that is only sampled from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from diffusers import FluxPipeline
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

_PREFIX = "transformer."
_NAME = "tuned"


@dataclass(frozen=True)
class Lora:
    """Adapters in the format that diffusers expects.

    Attributes:
        state: ``transformer.MODULE.lora_A.weight`` [rank, in] and ``lora_B.weight`` [out, rank].
        alphas: scales of individual modules, if the file stores them with the weights.
        metadata: the configuration of the adapters, if the file stores one.
        path: the file.
    """

    state: dict[str, Tensor]
    alphas: dict[str, Any] | None
    metadata: dict[str, Any] | None
    path: Path


def read_lora(path: Path) -> Lora:
    """Reads a LoRA from a file in diffusers' format, or in a format that diffusers converts.

    Raises:
        ValueError: if the keys are not those of a LoRA for FLUX.
    """
    try:
        state, alphas, metadata = FluxPipeline.lora_state_dict(
            str(path.parent), weight_name=path.name, return_alphas=True, return_lora_metadata=True
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{path} is not a LoRA for a FLUX transformer: {error}") from error
    return Lora(state, None if metadata else alphas, metadata or None, path)


def lora_of_run(weights: Mapping[str, Tensor], training: Mapping[str, Any], path: Path) -> Lora:
    """Makes a LoRA from the weights of a run's checkpoint, which have their names in training.

    Args:
        training: the configuration of the run, dotted path -> value.
        path: the path of the checkpoint, for messages.
    """
    state = {_PREFIX + key.replace(".default.weight", ".weight"): w for key, w in weights.items()}
    knobs = {
        "r": training["model.lora_rank"],
        "lora_alpha": training["model.lora_alpha"],
        "target_modules": sorted({key.partition(".lora_")[0] for key in weights}),
    }
    return Lora(state, None, {_PREFIX + key: value for key, value in knobs.items()}, path)


def attach_lora(transformer: Any, lora: Lora, scale: float) -> None:
    """Attaches the adapters to the transformer's layers, in float32, and activates them.

    Args:
        scale: factor on the adapters' outputs.

    Raises:
        ValueError: if they belong to another model; the message names the first that does not fit.
    """
    for complaint in _complaints(lora.state, dict(transformer.named_modules())):
        raise ValueError(f"{lora.path} is a LoRA for another model: {complaint}")
    transformer.load_lora_adapter(
        dict(lora.state),
        prefix=_PREFIX.removesuffix("."),
        adapter_name=_NAME,
        network_alphas=lora.alphas or None,
        metadata=lora.metadata,
    )
    transformer.set_adapters([_NAME], weights=[scale])
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    streamline(transformer)


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


def _complaints(state: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    for key, weight in state.items():
        if not key.startswith(_PREFIX):
            yield f"{key} changes something other than the transformer"
        module, _, half = key.removeprefix(_PREFIX).partition(".lora_")
        if half not in ("A.weight", "B.weight"):
            yield f"{key} is not a weight of an adapter"
        if module not in modules:
            yield f"it changes {module}, which the model does not have"
        other = state.get(f"{_PREFIX}{module}.lora_{'B' if half[0] == 'A' else 'A'}.weight")
        if other is None:
            yield f"the other half of {key} is missing"
        else:
            yield from _shape_complaints(key, half[0], weight, other, modules[module])


def _shape_complaints(
    key: str, half: str, weight: Tensor, other: Tensor, layer: nn.Module
) -> Iterator[str]:
    """``lora_A`` must be [rank, in] and ``lora_B`` [out, rank] for a layer of shape [out, in]."""
    own = getattr(layer, "weight", None)
    if own is None or own.ndim != 2:
        yield f"{key} does not belong to a linear layer"
    elif half == "A":
        wanted = [other.shape[-1], own.shape[1]]
        if list(weight.shape) != wanted:
            yield f"{key} is {list(weight.shape)}, but the model and the other half need {wanted}"
    elif weight.shape[0] != own.shape[0]:
        yield f"{key} is {list(weight.shape)}, but the model's layer has {own.shape[0]} outputs"
