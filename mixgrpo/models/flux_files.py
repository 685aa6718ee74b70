"""Checks a FLUX folder's weight files against its configurations, without loading them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from mixgrpo.files.weight_files import NAME, check_fits, find_shards, read_shapes
from mixgrpo.models.flux_text import quiet

_TEXT_NAME = "model.safetensors"  # transformers' name of a weight file
_PREFIX = "text_model."  # prefix of CLIP's weight names in files written by older versions
WEIGHTED = {
    "transformer": (FluxTransformer2DModel, None),
    "vae": (AutoencoderKL, None),
    "text_encoder": (CLIPTextModel, CLIPTextConfig),
    "text_encoder_2": (T5EncoderModel, T5Config),
}


def check_part(folder: Path) -> tuple[list[Path], int]:
    """Returns the weight files of one part of a pipeline folder, and their number of weights.

    Raises:
        FileNotFoundError: if one of the files is missing.
        ValueError: if one is damaged, or a name or shape does not match the part's config.json.
    """
    files = find_weights(folder)
    own, names = _asked_for(folder)
    found = {_as_loaded(name, own): shape for name, shape in read_shapes(files).items()}
    found = {name: shape for name, shape in found.items() if not name.endswith("position_ids")}
    # A tensor with two names is in the file under either of them, or both.
    twins = {name: found[other] for name, other in names.items() if other in found}
    check_fits(own, {**twins, **found}, folder)
    return files, sum(weight.numel() for weight in found.values())


def find_weights(folder: Path) -> list[Path]:
    """Returns the safetensors files of a part.

    Raises:
        FileNotFoundError: if there are none, or one that the index names is missing.
        ValueError: if the index is malformed.
    """
    name = NAME if folder.name in ("transformer", "vae") else _TEXT_NAME
    index = folder / f"{name}.index.json"
    return find_shards(index if index.exists() and not (folder / name).exists() else folder / name)


def _asked_for(folder: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """The state dict of the part's module (meta device), and for shared tensors the other name."""
    kind, settings = WEIGHTED[folder.name]
    kind, settings = _any(kind), _any(settings)
    try:
        with quiet(), torch.device("meta"):
            if settings is None:
                module: nn.Module = kind.from_config(kind.load_config(folder))
            else:
                module = kind(settings.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"no model can be created from {folder / 'config.json'} ({reason})"
        ) from error
    named = dict(module.named_parameters(remove_duplicate=False))
    groups: dict[int, list[str]] = {}
    for name, parameter in named.items():
        groups.setdefault(id(parameter), []).append(name)
    twins = {
        name: other for names in groups.values() for name in names for other in names
        if name != other
    }  # fmt: skip
    return module.state_dict(), twins


def _any(value: Any) -> Any:
    return value


def _as_loaded(name: str, own: Mapping[str, Tensor]) -> str:
    short = name.removeprefix(_PREFIX)
    return short if name not in own and short in own else name
