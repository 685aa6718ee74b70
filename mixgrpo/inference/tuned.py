"""Finds tuned weights, recognises their kind by their keys, and loads them into the base model.

Only one model is ever in memory. Full weights are read into it from disk, and the base weights are
read again where a hybrid run returns to them; a LoRA is switched on and off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from mixgrpo.checkpoint import Shards, open_saved, verify
from mixgrpo.checkpoint.manifest import MANIFEST
from mixgrpo.files.forms import readable_form
from mixgrpo.files.weight_files import (
    check_fits,
    check_plain,
    fill,
    plain_names,
    read_names,
    read_shapes,
)
from mixgrpo.files.weight_sets import NoWeights, find_shards
from mixgrpo.inference.config import InferenceConfig, tuned_steps
from mixgrpo.models.adapters import attach_lora, lora_of_run
from mixgrpo.models.lora import Lora
from mixgrpo.models.lora_files import LORA_NAMES, is_lora, read_lora
from mixgrpo.models.registry import family_of

_PARTS = {"plain": "model", "ema": "ema"}


class Tuned(Protocol):
    """The tuned weights of a model in memory.

    Attributes:
        dear: whether switching between the models reads all weights from disk.
        notes: what a user should know about the loading, a sentence each.
    """

    dear: bool
    notes: tuple[str, ...]

    def apply(self) -> None:
        """Makes the model the tuned one."""
        ...

    def remove(self) -> None:
        """Makes the model the base model."""
        ...


class NoneTuned:
    """No tuned weights: the base model only."""

    dear = False
    notes: tuple[str, ...] = ()

    def apply(self) -> None:
        pass

    def remove(self) -> None:
        pass


class FullWeights:
    """A full set of tuned weights, read into the base model's parameters."""

    dear = True
    notes: tuple[str, ...] = ()

    def __init__(self, tuned: Callable[[], None], base: Callable[[], None]) -> None:
        self.tuned = tuned
        self.base = base
        self.inside = base  # the weights that the model currently holds

    def apply(self) -> None:
        self._take(self.tuned)

    def remove(self) -> None:
        self._take(self.base)

    def _take(self, read: Callable[[], None]) -> None:
        if self.inside != read:
            read()
            self.inside = read


@dataclass
class Adapters:
    """A LoRA added to the base weights."""

    module: Any
    notes: tuple[str, ...]
    dear = False

    def apply(self) -> None:
        self.module.enable_adapters()

    def remove(self) -> None:
        self.module.disable_adapters()


def find_tuned(config: InferenceConfig) -> list[Path]:
    """The files of the tuned weights; empty if only the base model is used.

    Raises:
        FileNotFoundError: the checkpoint contains no weights.
        ValueError: the moving average is requested where there is none.
        CheckpointError: a run's checkpoint is damaged.
    """
    if not tuned_steps(config) or config.checkpoint is None:
        return []
    path = Path(config.checkpoint)
    if _is_checkpoint(path):
        return _files_of(path, config)
    if config.weights == "ema":
        raise ValueError(
            f"weights is ema, but {str(path)!r} is not a checkpoints/iteration_N folder of a run; "
            "set --checkpoint to one, since only these hold a moving average, or --weights plain"
        )
    files = _weight_files(path)
    for file in files:
        readable_form(file)  # says what is wrong before the base model is loaded
    if files:
        return files
    raise FileNotFoundError(
        f"checkpoint is {str(path)!r}, which contains no weights{_hint(path)}; set --checkpoint "
        "to a run's model folder, a run's checkpoints/iteration_N folder, a transformer folder, a "
        "weight file or a LoRA's folder"
    )


def _weight_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return find_shards(path) if path.exists() or path.is_symlink() else []
    for name in LORA_NAMES:
        if (path / name).exists():
            return [path / name]
    for folder in (path / "transformer", path):
        if folder.is_dir():
            with contextlib.suppress(NoWeights):
                return find_shards(folder)
    return []


def _hint(path: Path) -> str:
    newest = [*sorted(path.glob("checkpoints/iteration_*"))[::-1],
              *sorted(path.glob("iteration_*"))[::-1]]  # fmt: skip
    candidates = [path / "model", path / "lora", *newest, *sorted(path.glob("*.safetensors"))]
    found = next((candidate for candidate in candidates if candidate.exists()), None)
    return f" (did you mean {str(found)!r}?)" if found else ""


def load_tuned(module: nn.Module, config: InferenceConfig) -> Tuned:
    """Prepares the tuned weights for ``module``, which holds, and until ``apply`` keeps, the base
    weights.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: the weights are missing, damaged, or belong
            to another model.
    """
    files = find_tuned(config)
    if not files:
        return NoneTuned()
    source = Path(str(config.checkpoint))
    if _is_checkpoint(source):
        return _load_checkpoint(module, source, config)
    names = read_names(files[0])
    if not names:
        raise ValueError(f"{files[0]} is empty: check the file")
    check_plain(names, files[0])
    if is_lora(names):
        return _adapters(module, read_lora(files[0]), config)
    shapes = plain_names(read_shapes(files))
    return _full(module, module.state_dict(), config, shapes, partial(fill, module, files))


def _load_checkpoint(module: Any, path: Path, config: InferenceConfig) -> Tuned:
    """Verifies and reads only the weights, or only their average, of a run's checkpoint."""
    saved, part = open_saved(path), _PARTS[config.weights]
    verify(saved, saved.files_of(part))
    shards = Shards(path)
    shapes = shards.shapes(part)
    if any("lora" in key for key in shapes):
        lora = lora_of_run(shards.whole(part), saved.position.config, path)
        return _adapters(module, lora, config)
    # Buffers, and weights that no prediction depends on, are not in it; they stay the base model's.
    family = family_of(config.model)
    own = {n: w.data for n, w in module.named_parameters() if family.uses(n, module.config)}
    return _full(module, own, config, shapes, partial(shards.fill, part, own))


def _adapters(module: nn.Module, lora: Lora, config: InferenceConfig) -> Adapters:
    attach_lora(family_of(config.model), module, lora, config.lora_scale)
    return Adapters(module, lora.notes)


def _full(
    module: nn.Module,
    own: dict[str, Tensor],
    config: InferenceConfig,
    shapes: dict[str, Tensor],
    read: Callable[[], None],
) -> FullWeights:
    if config.lora_scale != 1:
        raise ValueError(
            f"lora_scale is {config.lora_scale}, but {config.checkpoint} holds full weights, not a "
            "LoRA; leave lora_scale at 1"
        )
    check_fits(own, shapes, Path(str(config.checkpoint)))
    base = find_shards(Path(config.model.path) / "transformer")
    return FullWeights(read, partial(fill, module, base))


def _is_checkpoint(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def _files_of(path: Path, config: InferenceConfig) -> list[Path]:
    saved, part = open_saved(path), _PARTS[config.weights]
    if not any(name.startswith(f"{part}_") for name in saved.files):
        raise ValueError(
            f"{path} holds no moving average, since its run kept none; set --weights plain"
        )
    return [path / name for name in saved.files_of(part)]
