"""A FLUX transformer without memory, and its weights as they lie on the disk, read in parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from mixgrpo.files.weight_files import check_fits, find_shards, open_slices, read_shapes

_BASE = ".base_layer."  # what adapters put into the names of the layers that they are beside


def empty_transformer(path: str, dtype: torch.dtype) -> FluxTransformer2DModel:
    """The transformer of a pipeline folder, on the meta device."""
    config = FluxTransformer2DModel.load_config(Path(path) / "transformer")
    with torch.device("meta"):
        # Not diffusers' own `to`, which warns of dtypes for the lists that FLUX leaves empty.
        return nn.Module.to(FluxTransformer2DModel.from_config(config), dtype)


class StoredFlux(Mapping[str, Any]):
    """The weights of a transformer by their names in ``module``: in files, or adapters drawn.

    Raises:
        FileNotFoundError: there are no weights in the folder.
        ValueError: they are damaged, or another model's.
    """

    def __init__(self, folder: Path, module: nn.Module, seed: int) -> None:
        self.seed = seed
        self.shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        files = find_shards(folder)
        own = {
            name.replace(_BASE, "."): parameter
            for name, parameter in module.named_parameters()
            if not _is_adapter(name)
        }
        check_fits(own, read_shapes(files), folder)
        self.slices = open_slices(files)

    def __getitem__(self, name: str) -> Any:
        if _is_adapter(name):
            return draw_adapter(name, self.shapes[name], self.seed)
        return self.slices[name.replace(_BASE, ".")]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@torch.no_grad()
def draw_adapters(module: nn.Module, seed: int) -> None:
    """Initialises the adapters of a module, unless it has no memory."""
    for name, parameter in module.named_parameters():
        if _is_adapter(name) and not parameter.is_meta:
            parameter.copy_(draw_adapter(name, parameter.shape, seed))


def draw_adapter(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Zeros for the second half of an adapter; for the first, uniform within 1/sqrt(inputs).

    A function of seed and name, so that no order and no way to load changes it.
    """
    if ".lora_B." in name:
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _is_adapter(name: str) -> bool:
    return ".lora_" in name
