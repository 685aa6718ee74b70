"""Reads LoRA files in the forms in which they are published, and checks every tensor in them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mixgrpo.files.forms import SAFETENSORS, readable_form
from mixgrpo.files.pickled import is_dense, read_pickled
from mixgrpo.files.weight_files import read_shapes
from mixgrpo.models.lora import Adapter, Lora
from mixgrpo.models.lora_names import is_of_text_encoder, without_prefix
from mixgrpo.models.lora_settings import (
    MERGE,
    PEFT_NAME,
    Settings,
    is_number,
    of_folder,
    of_header,
)

LORA_NAMES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
_PEFT_PREFIX = "base_model.model."
_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)
_HALF = re.compile(
    r"(?P<layer>.+?)\.(?:lora_(?P<half>A|B)|(?:lora_|lora\.|lora_linear_layer\.)?(?P<way>down|up))"
    r"(?P<adapter>\.[^.]+)?\.weight"
)
_ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
_OF_ADAPTER = re.compile(r"\.lora_[AB]\.[^.]+\.weight$")  # with the adapter's name in PEFT
# Parts of the names of tensors -> the kinds of adapters that have them. Without these tensors, some
# would look like a plain LoRA and compute something else.
_OTHER_KINDS = {
    r"\.dora_scale|lora_magnitude_vector": "DoRA",
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.b?oft_": "OFT",
    r"\.ia3_|\.on_input$": "(IA)3",
    r"\.vera_": "VeRA",
    r"\.lora_E\b|\.ranknum": "AdaLoRA",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.lora_mid\.": "a LoCon with Tucker decomposition",
    r"\.lora_(A|B|down|up)(\.[^.]+)?\.bias$|\.lora\.(down|up)\.bias$": "a LoRA with biases",
    r"\.diff(_b)?$|\.[wb]_norm$|\.set_weight$": "full differences of weights",
    r"\.reshape_weight$": "a LoRA that changes the shapes of weights",
    r"\.modules_to_save\.": "a LoRA with whole layers beside the adapters",
}


def is_lora(names: Iterable[str]) -> bool:
    """Whether the names of a file's tensors are those of adapters of any kind."""
    return any("lora" in name or _other_kind(name) for name in names)


def read_lora(path: Path) -> Lora:
    """Reads the adapters of the transformer.

    Raises:
        ValueError: the file is damaged, holds something other than plain LoRA, or leaves open how
            strong the adapters are.
    """
    tensors, header = _contents(path)
    if not tensors:
        raise ValueError(f"{path} is empty: check the file")
    for key in tensors:
        if not key.isprintable():  # in a message, it would be more than a line
            raise ValueError(f"{path} is damaged: it names a tensor {key!r}; download it again")
    # Sorted, so that of several faults it is always the same that is named.
    text = sorted(filter(is_of_text_encoder, tensors))
    own = {key: tensors[key] for key in sorted(tensors) if not is_of_text_encoder(key)}
    notes = []
    if text:
        notes.append(
            f"{path} also changes a text encoder (tensors such as {text[0]}); that part is not used"
        )
    if not own:
        raise ValueError(
            f"{path} changes only a text encoder ({text[0]}), not the transformer; give a LoRA "
            "for the transformer"
        )
    for key in own:
        if kind := _other_kind(key):
            raise ValueError(f"{path} is {kind} ({key}), and only plain LoRA is read here; {MERGE}")
    weights, alphas = _by_layer(own, path)
    settings = of_header(header, path)
    if settings is None and _is_by_peft(path, own):
        settings = of_folder(path.parent)
    if settings is None:
        notes += _assumption(path, own, weights, alphas)
    adapters = {
        layer: Adapter(halves["A"], halves["B"], _scale(layer, halves, alphas, settings, path))
        for layer, halves in weights.items()
    }
    return Lora(adapters, path, tuple(notes))


def settings_beside(files: Iterable[Path]) -> list[Path]:
    """The files of settings that decide how strong the adapters in ``files`` are."""
    beside = {file.parent / PEFT_NAME for file in files}
    return sorted(path for path in beside if path.is_file())


# ---- the file


def _contents(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of a file, and the text in its header."""
    if readable_form(path) != SAFETENSORS:
        return read_pickled(path), {}
    read_shapes([path])  # explains damage
    with safe_open(path, "pt") as opened:
        return {key: opened.get_tensor(key) for key in list(opened.keys())}, opened.metadata() or {}


def _other_kind(key: str) -> str | None:
    return next((kind for part, kind in _OTHER_KINDS.items() if re.search(part, key)), None)


# ---- its tensors


def _by_layer(
    tensors: Mapping[str, Any], path: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """The two halves of each adapter, and the alphas that the file holds, by layer."""
    weights: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, value in tensors.items():
        if name := _HALF.fullmatch(key):
            half = name["half"] or {"down": "A", "up": "B"}[name["way"]]
            halves = weights.setdefault(name["layer"], {})
            if half in halves:
                raise ValueError(
                    f"{path} holds two adapters of {name['layer']}; give a file that holds one"
                )
            halves[half] = _weight(key, value, path)
        elif name := _ALPHA.fullmatch(key):
            alphas[name["layer"]] = _alpha(key, value, path)
        else:
            raise ValueError(
                f"{path} is a LoRA with something more: {key} is neither a half of an adapter nor "
                f"its alpha; {MERGE}"
            )
    for complaint in _unmatched(weights, alphas):
        raise ValueError(f"{path} is damaged: {complaint}; download it again")
    return weights, alphas


def _weight(key: str, value: Any, path: Path) -> Tensor:
    if not _has_values(value) or value.dtype not in _DTYPES:
        kind = getattr(value, "dtype", type(value).__name__)
        raise ValueError(
            f"{key} in {path} is of type {kind}, not a matrix of floating-point numbers; save the "
            "LoRA in float32 or bfloat16"
        )
    if value.ndim != 2 or not value.numel():
        raise ValueError(
            f"{key} in {path} is {list(value.shape)}, not a matrix with numbers in it; download "
            "the file again"
        )
    weight = value.detach().to(torch.float32, copy=True)
    if not weight.isfinite().all():
        raise ValueError(
            f"{key} in {path} holds NaN or infinity; take the LoRA from an earlier checkpoint of "
            "its training"
        )
    return weight


def _has_values(value: Any) -> bool:
    return is_dense(value) and not value.is_meta


def _alpha(key: str, value: Any, path: Path) -> float:
    if _has_values(value) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if not is_number(value):
        raise ValueError(f"{key} in {path} is not a finite number; download the file again")
    if value == 0:
        raise ValueError(
            f"{key} in {path} is 0, which some programs read as no effect and others as the rank; "
            "write the number that is meant"
        )
    return float(value)


def _unmatched(
    weights: Mapping[str, Mapping[str, Tensor]], alphas: Mapping[str, float]
) -> Iterator[str]:
    for layer, halves in weights.items():
        if len(halves) < 2:
            yield f"the other half of the adapter of {layer} is missing"
        elif halves["A"].shape[0] != halves["B"].shape[1]:
            shapes = " and ".join(str(list(half.shape)) for half in halves.values())
            yield f"the halves of the adapter of {layer} do not match: {shapes}"
    for layer in alphas:
        if layer not in weights:
            yield f"{layer} has an alpha, but no adapter"


# ---- how strong it is


def _is_by_peft(path: Path, keys: Iterable[str]) -> bool:
    """Whether the alphas may be in a file beside, because of the file's name or its tensors'."""
    return path.stem == "adapter_model" or any(map(_has_peft_names, keys))


def _has_peft_names(key: str) -> bool:
    name = _HALF.fullmatch(key)
    if name is None or name["half"] is None:
        return False
    bare = without_prefix(name["layer"]) == name["layer"]
    return bare or _PEFT_PREFIX in key or name["adapter"] is not None


def _assumption(
    path: Path, keys: Iterable[str], weights: Iterable[str], alphas: Mapping[str, float]
) -> list[str]:
    """What is assumed of adapters whose strength neither settings nor an alpha say.

    Raises:
        ValueError: nothing can be assumed.
    """
    without = [layer for layer in weights if layer not in alphas]
    if not alphas and any(_PEFT_PREFIX in key or _OF_ADAPTER.search(key) for key in keys):
        raise ValueError(
            f"{path} holds adapters by PEFT, whose strength is lora_alpha / r in {PEFT_NAME}, but "
            'that file is not beside it; put it there (with at least "r" and "lora_alpha")'
        )
    # Elsewhere, programs have agreed on it, unless other adapters of the same file have an alpha.
    if not without or (not alphas and not any(map(_has_peft_names, keys))):
        return []
    more = f" and {len(without) - 1} more" if len(without) > 1 else ""
    return [f"{path} names no alpha of {without[0]}{more}; strength 1 (alpha = rank) is assumed"]


def _scale(
    layer: str,
    halves: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    settings: Settings | None,
    path: Path,
) -> float:
    """alpha / rank, from a tensor in the file or else from its settings, or else 1."""
    rank = len(halves["A"])
    told = settings.scale(without_prefix(layer), rank) if settings else None
    if layer not in alphas:
        return 1.0 if told is None else told
    scale = alphas[layer] / rank
    if told is not None and settings and not math.isclose(told, scale, rel_tol=1e-2):
        raise ValueError(
            f"{path} is contradictory: the alpha of {layer} gives it the strength {scale:g}, but "
            f"{settings.source} the strength {told:g}; remove the wrong one"
        )
    return scale
