"""Weight files: finding them, checking that they fit a module, reading and writing them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

NAME = "diffusion_pytorch_model.safetensors"  # diffusers' name for a model's weights
_SHOWN = 3
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def find_shards(path: Path) -> list[Path]:
    """The safetensors files of ``path``, which is a file, an index or a folder.

    Raises:
        FileNotFoundError: there are none, or a file that the index names is missing.
        ValueError: the index is not valid.
    """
    if path.is_dir():
        path = next((p for p in (path / NAME, path / f"{NAME}.index.json") if p.exists()), path)
    if path.name.endswith(".index.json") and path.exists():
        return _of_index(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} contains no weights: there is neither {NAME} nor its index"
        )
    return [path]


def _of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weights; download it again") from error
    files = [index.parent / name for name in names]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{index} names {file.name}, which does not exist; download it")
    return files


def read_shapes(files: Iterable[Path]) -> dict[str, Tensor]:
    """Name -> tensor on the meta device, read from the files' headers only.

    Raises:
        ValueError: a file is damaged or not in the safetensors format.
    """
    shapes = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for key in list(opened.keys()):
                    shape = opened.get_slice(key).get_shape()
                    shapes[key] = torch.empty(shape, device="meta")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} cannot be read as safetensors ({str(error).splitlines()[0]}); it may be "
                "truncated, so download it again"
            ) from error
    return shapes


def open_slices(files: Iterable[Path]) -> dict[str, Any]:
    """Name -> slice of a tensor in a file, which can be read in parts: ``slices[name][2:5]``."""
    slices = {}
    for file in files:
        opened = safe_open(file, "pt")
        slices.update({key: opened.get_slice(key) for key in opened.keys()})  # noqa: SIM118
    return slices


@torch.no_grad()
def fill(module: nn.Module, files: Iterable[Path]) -> None:
    """Copies the weights into the module's own, tensor by tensor, without a second full copy."""
    own = module.state_dict()
    for file in files:
        with safe_open(file, "pt") as opened:
            for key in list(opened.keys()):
                own[key].copy_(opened.get_tensor(key))


def write_streamed(path: Path, shapes: Mapping[str, Tensor], tensors: Iterable[Tensor]) -> None:
    """Writes a safetensors file tensor by tensor, so that only one is in memory at a time.

    Args:
        shapes: names, shapes and dtypes of the file's tensors; their values are not used.
        tensors: the tensors in the same order, on the CPU.
    """
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, shape in shapes.items():
        start, stop = stop, stop + shape.numel() * shape.element_size()
        head[name] = {
            "dtype": _DTYPES[shape.dtype],
            "shape": list(shape.shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def check_fits(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """Checks that ``state`` has exactly the keys of ``own``, all with the right shapes.

    Raises:
        ValueError: they differ; the message names ``path`` and the first keys that do not fit.
    """
    faults = [
        _listed("missing", [key for key in own if key not in state]),
        _listed("unexpected", [key for key in state if key not in own]),
        _listed(
            "of another size",
            [
                f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
                for key in own
                if key in state and state[key].shape != own[key].shape
            ],
        ),
    ]
    if any(faults):
        raise ValueError(
            f"{path} does not fit the model: {'; '.join(fault for fault in faults if fault)}"
        )


def _listed(kind: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{kind}: {', '.join(keys[:_SHOWN])}{more}"
