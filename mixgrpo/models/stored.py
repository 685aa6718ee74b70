"""A transformer on the meta device, and access to slices of its weights on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixgrpo.files.weight_files import check_fits, open_slices, read_shapes
from mixgrpo.files.weight_sets import find_shards
from mixgrpo.models.family import Family

_BASE = ".base_layer."  # inserted by adapters into the names of the layers that they adapt


def empty_transformer(family: Family, path: str, dtype: torch.dtype) -> Any:
    """The transformer of a pipeline folder, on the meta device."""
    config = family.transformer.load_config(Path(path) / "transformer")
    with torch.device("meta"):
        # Not diffusers' own `to`, which warns about dtypes because FLUX leaves some lists empty.
        return nn.Module.to(family.transformer.from_config(config), dtype)


class StoredWeights(Mapping[str, Any]):
    """The weights and buffers of a transformer by their names in ``module``, read from files.

    The weights of adapters are not in the files; they are initialised from the seed.

    Raises:
        FileNotFoundError: if there are no weights in the folder.
        ValueError: if they are damaged or belong to another model.
    """

    def __init__(
        self, folder: Path, module: nn.Module, seed: int, lora_init: str = "uniform"
    ) -> None:
        self.seed = seed
        self.lora_init = lora_init
        state = module.state_dict()
        self.shapes = {name: tensor.shape for name, tensor in state.items()}
        files = find_shards(folder)
        own = {
            name.replace(_BASE, "."): tensor
            for name, tensor in state.items()
            if not _is_adapter(name)
        }
        check_fits(own, read_shapes(files), folder)
        self.slices = open_slices(files)

    def __getitem__(self, name: str) -> Any:
        if _is_adapter(name):
            return draw_adapter(name, self.shapes[name], self.seed, self.lora_init)
        return self.slices[name.replace(_BASE, ".")]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@torch.no_grad()
def draw_adapters(module: nn.Module, seed: int, lora_init: str = "uniform") -> None:
    """Initialises the adapters of a module that are not on the meta device."""
    for name, parameter in module.named_parameters():
        if _is_adapter(name) and not parameter.is_meta:
            parameter.copy_(draw_adapter(name, parameter.shape, seed, lora_init))


def draw_adapter(name: str, shape: torch.Size, seed: int, lora_init: str = "uniform") -> Tensor:
    """The initial weight: zeros for ``lora_B``, random numbers for ``lora_A`` [rank, inputs].

    It depends only on the seed and the name, not on the order or way of loading.

    Args:
        lora_init: uniform, in +-1/sqrt(inputs); gaussian, with standard deviation 1/rank.
    """
    if ".lora_B." in name:
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    if lora_init == "gaussian":
        return torch.empty(shape).normal_(0.0, 1 / shape[0], generator=generator)
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _is_adapter(name: str) -> bool:
    return ".lora_" in name
