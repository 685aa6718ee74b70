"""Weight files: finding them, checking that they fit a module, reading and writing them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mixgrpo.files.forms import (
    QUANTISED,
    SAFETENSORS,
    form_of_names,
    readable_form,
)
from mixgrpo.files.messages import in_one_line
from mixgrpo.files.pickled import read_pickled, read_state_dict

T = TypeVar("T")
_SHOWN = 3
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_NAMES = {
    **{name: dtype for dtype, name in _DTYPES.items()},
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64},
}
_WRAPPED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIXES = ("module.", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.")


def read_shapes(files: Iterable[Path]) -> dict[str, Tensor]:
    """Name -> tensor on the meta device. Contents are not read, except in TORCH_OLD's format.

    Raises:
        OSError: a file does not exist or cannot be opened.
        ValueError: a file is damaged, or holds no weights that can be read.
    """
    return {name: _on_meta(value) for name, value in open_slices(files, "meta").items()}


def read_names(file: Path) -> list[str]:
    """The names of the tensors, and of what else is beside them in a PyTorch file.

    Raises:
        OSError, ValueError: see ``read_shapes``.
    """
    return list(_open_safetensors(file) if _is_safetensors(file) else read_pickled(file))


def _on_meta(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.to("meta")
    dtype = _NAMES.get(value.get_dtype(), torch.uint8)
    return torch.empty(value.get_shape(), dtype=dtype, device="meta")


def open_slices(files: Iterable[Path], device: str = "cpu") -> dict[str, Any]:
    """Name -> slice of a tensor in a file, which can be read in parts: ``slices[name][2:5]``.

    Raises:
        OSError, ValueError: see ``read_shapes``.
    """
    slices: dict[str, Any] = {}
    for file in files:
        found = _open_safetensors(file) if _is_safetensors(file) else read_state_dict(file, device)
        twice = next((name for name in found if name in slices), None)
        if twice is not None:
            raise ValueError(
                f"{file} holds {twice}, as does another of its files; remove the files that are "
                "not meant"
            )
        slices.update(found)
    return slices


def _is_safetensors(file: Path) -> bool:
    return readable_form(file) == SAFETENSORS


def _open_safetensors(file: Path) -> dict[str, Any]:
    try:
        opened = safe_open(file, "pt")
        return {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as safetensors ({in_one_line(error)}); its header is damaged, "
            "so download it again"
        ) from error


def plain_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors without what wrappers of modules add to all names.

    Compiling, FSDP and activation checkpointing add a part wherever a module is wrapped; other
    programs add a prefix to every name.
    """
    plain = {_WRAPPED.sub("", name): value for name, value in tensors.items()}
    if len(plain) < len(tensors):
        return dict(tensors)
    while prefix := next(
        (p for p in _PREFIXES if plain and all(n.startswith(p) for n in plain)), ""
    ):
        plain = {name.removeprefix(prefix): value for name, value in plain.items()}
    return plain


@torch.no_grad()
def fill(module: nn.Module, files: Iterable[Path]) -> None:
    """Copies the weights into the module's own, tensor by tensor, without a second full copy."""
    own = module.state_dict()
    for name, stored in plain_names(open_slices(files)).items():
        own[name].copy_(stored[...])


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """Name -> tensor on the CPU, by plain names."""
    return {name: stored[...] for name, stored in plain_names(open_slices(files)).items()}


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
        _listed(
            "not floating-point",
            [
                f"{key} ({str(state[key].dtype).removeprefix('torch.')})"
                for key in own
                if key in state
                and own[key].is_floating_point()
                and not state[key].is_floating_point()
            ],
        ),
    ]
    if any(faults):
        raise ValueError(
            f"{path} does not fit the model: {'; '.join(fault for fault in faults if fault)}; "
            f"{_remedy(own, state)}"
        )


def check_finite(module: nn.Module, path: Path) -> None:
    """Checks the weights that were read from ``path``: one pass over the memory.

    Raises:
        ValueError: a weight is not finite, so that every output would be NaN.
    """
    for name, weight in module.named_parameters():
        if weight.is_meta or not weight.numel():
            continue
        least, most = weight.detach().aminmax()  # much faster than isfinite
        if not (math.isfinite(least) and math.isfinite(most)):
            raise ValueError(
                f"{path} holds weights that are not finite, such as {name}; it is damaged or "
                "diverged, so give other weights"
            )


def _remedy(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    form = form_of_names(state)
    if form is not None and form.remedy:
        return f"it holds {form.words}; {form.remedy}"
    if form is not None and form != form_of_names(own):
        return f"it holds {form.words}; give this model's own"
    return "give complete weights that belong to the model's configuration"


def check_plain(names: Iterable[str], path: Path) -> None:
    """Raises ValueError if the tensors are quantised weights, also where they resemble a LoRA."""
    form = form_of_names(names)
    if form is not None and form.words in QUANTISED:
        raise ValueError(f"{path} holds {form.words}; {form.remedy}")


def _listed(kind: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{kind}: {', '.join(keys[:_SHOWN])}{more}"
