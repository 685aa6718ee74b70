"""Tuned weights of a model: found, recognised by their keys, and put in place of the base's.

There is one model in memory, ever. Full weights are read into it from disk, and the base's again
where a hybrid run goes back to them; a LoRA is switched on and off.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from mixgrpo.inference.config import InferenceConfig, tuned_steps
from mixgrpo.models.flux_lora import attach_lora, read_lora
from mixgrpo.weight_files import NAME, check_fits, fill, find_shards, read_shapes

LORA_NAME = "pytorch_lora_weights.safetensors"
_AVERAGE = "ema.safetensors"


class Tuned(Protocol):
    """The tuned weights of a model in memory.

    Attributes:
        dear: whether going from one model to the other reads all weights from disk.
    """

    dear: bool

    def apply(self) -> None:
        """From here on the model is the tuned one."""
        ...

    def remove(self) -> None:
        """From here on the model is the base."""
        ...


class NoneTuned:
    """Base weights alone."""

    dear = False

    def apply(self) -> None:
        pass

    def remove(self) -> None:
        pass


class FullWeights:
    """Another set of all weights, read into the model's own place."""

    dear = True

    def __init__(self, module: nn.Module, tuned: list[Path], base: list[Path]) -> None:
        self.module = module
        self.tuned = tuned
        self.base = base
        self.inside = base  # whose weights the model holds

    def apply(self) -> None:
        self._take(self.tuned)

    def remove(self) -> None:
        self._take(self.base)

    def _take(self, files: list[Path]) -> None:
        if self.inside != files:
            fill(self.module, files)
            self.inside = files


@dataclass(frozen=True)
class Adapters:
    """A LoRA beside the base weights."""

    module: Any
    dear = False

    def apply(self) -> None:
        self.module.enable_adapters()

    def remove(self) -> None:
        self.module.disable_adapters()


def find_tuned(config: InferenceConfig) -> list[Path]:
    """The files of the tuned weights; none if the base model draws alone.

    Raises:
        FileNotFoundError: the checkpoint is nothing that holds weights.
        ValueError: an average is wanted where there is none.
    """
    if not tuned_steps(config) or config.checkpoint is None:
        return []
    path = Path(config.checkpoint)
    if (path / "state.json").is_file():
        return find_shards(
            path / f"{'weights' if config.weights == 'plain' else 'ema'}.safetensors"
        )
    if config.weights == "ema":
        raise ValueError(
            f"weights is ema, but {str(path)!r} is no checkpoints/iteration_N folder of a run; "
            "only these hold an average beside the weights"
        )
    if path.is_file():
        return find_shards(path)
    for inside in (LORA_NAME, f"transformer/{NAME}", f"transformer/{NAME}.index.json", NAME,
                   f"{NAME}.index.json"):  # fmt: skip
        if (path / inside).exists():
            return find_shards(path / inside)
    raise FileNotFoundError(
        f"checkpoint is {str(path)!r}, where there are no weights{_hint(path)}; set --checkpoint "
        "to a run's model folder, a run's checkpoints/iteration_N folder, a transformer folder, a "
        ".safetensors file or a LoRA's folder"
    )


def _hint(path: Path) -> str:
    candidates = [path / "model", *sorted(path.glob("checkpoints/iteration_*"))[::-1],
                  *sorted(path.glob("iteration_*"))[::-1]]  # fmt: skip
    found = next((candidate for candidate in candidates if candidate.is_dir()), None)
    return f" (did you mean {str(found)!r}?)" if found else ""


def load_tuned(module: nn.Module, config: InferenceConfig) -> Tuned:
    """The tuned weights, fitted to ``module``, which holds the base weights and keeps them.

    Raises:
        FileNotFoundError, ValueError: they are not there, damaged, or another model's.
    """
    files = find_tuned(config)
    if not files:
        return NoneTuned()
    shapes = read_shapes(files)
    if not shapes:
        raise ValueError(
            f"{files[0]} is empty: this run kept no average; take --weights plain"
            if files[0].name == _AVERAGE
            else f"{files[0]} is empty: check the file"
        )
    if any("lora" in key for key in shapes):
        attach_lora(module, read_lora(files[0], _training_of(files[0].parent)), config.lora_scale)
        return Adapters(module)
    if config.lora_scale != 1:
        raise ValueError(
            f"lora_scale is {config.lora_scale}, but {files[0]} holds whole weights, no LoRA; "
            "leave lora_scale at 1"
        )
    check_fits(module.state_dict(), shapes, Path(str(config.checkpoint)))
    base = find_shards(Path(config.model.path) / "transformer")
    return FullWeights(module, files, base)


def _training_of(folder: Path) -> Mapping[str, Any] | None:
    """The configuration that a checkpoint folder's weights were trained with."""
    state = folder / "state.json"
    return json.loads(state.read_text())["config"] if state.is_file() else None
