"""The settings of adapters, which PEFT and diffusers store apart from the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from mixgrpo.files.json_files import parse_json, read_object
from mixgrpo.files.regular import MIB

PEFT_NAME = "adapter_config.json"
HEADER = "lora_adapter_metadata"  # diffusers' key in the header of a safetensors file
_PARTS = ("transformer.", "text_encoder.", "text_encoder_2.")
_MOST = 16 * MIB
_LARGEST = 1e30
MERGE = (
    "merge the adapters into the transformer with the program that made them, and give the merged "
    "weights"
)
# Read here, or without effect on what trained adapters compute.
_HARMLESS = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"),
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "target_modules", "exclude_modules", "lora_dropout"),
    *("fan_in_fan_out", "layers_to_transform", "layers_pattern", "megatron_config"),
    *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
# The other ways to begin change the base weights too, so that the adapters belong to these.
_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Settings:
    """The scales of adapters.

    Attributes:
        source: where they were found, for messages.
        rank, alpha: those of most layers.
        ranks, alphas: patterns of layers' names -> those of these layers.
        root: whether the scale is alpha / sqrt(rank), not alpha / rank.
    """

    source: str
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    root: bool

    def scale(self, name: str, rank: int) -> float:
        """The scale of a layer's adapter, whose weights have this rank.

        Raises:
            ValueError: the settings belong to other adapters.
        """
        try:
            wanted = self.ranks.get(get_pattern_key(list(self.ranks), name), self.rank)
            alpha = self.alphas.get(get_pattern_key(list(self.alphas), name), self.alpha)
        except re.error as error:
            raise ValueError(
                f"{self.source} holds a pattern that is not valid ({error}); save the adapters "
                "again"
            ) from error
        if wanted != rank:
            raise ValueError(
                f"{self.source} gives {name} the rank {wanted}, but its weights have rank {rank}; "
                "use the settings that were saved with these weights"
            )
        return alpha / (math.sqrt(rank) if self.root else rank)


def of_header(header: Mapping[str, str], path: Path) -> Settings | None:
    """The transformer's settings in the header of a safetensors file, or None.

    Raises:
        ValueError: they are damaged, or describe something other than plain LoRA.
    """
    if HEADER not in header:
        return None
    source = f"{HEADER} in the header of {path}"
    found = _parse(header[HEADER], source)
    if any(key.startswith(_PARTS) for key in found):
        part = _PARTS[0]
        found = {k.removeprefix(part): v for k, v in found.items() if k.startswith(part)}
    return _checked(found, source) if found else None


def of_folder(folder: Path) -> Settings | None:
    """The settings that PEFT saved in the folder, or None.

    Raises:
        ValueError: they are damaged, or describe something other than plain LoRA.
    """
    path = folder / PEFT_NAME
    if not path.exists():
        return None
    try:
        found = read_object(path, _MOST)
    except ValueError as error:
        raise ValueError(f"{error}; save the adapters again") from error
    return _checked(found, str(path))


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ValueError(
            f"{source} is not valid JSON ({error}); save the adapters again"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{source} does not hold settings by their names; save the adapters again")
    return found


def _checked(found: Mapping[str, Any], source: str) -> Settings:
    for complaint in _complaints(found):
        raise ValueError(f"{source}: {complaint}")
    return Settings(
        source,
        found["r"],
        found["lora_alpha"],
        found.get("rank_pattern") or {},
        found.get("alpha_pattern") or {},
        bool(found.get("use_rslora")),
    )


def _complaints(found: Mapping[str, Any]) -> Iterator[str]:
    kind = found.get("peft_type", "LORA")
    if kind != "LORA":
        yield f"peft_type is {kind!r}, and only LORA is read here; {MERGE}"
    plain = LoraConfig()
    defaults = {field.name: getattr(plain, field.name) for field in fields(plain)}
    for key, value in found.items():
        if key not in _HARMLESS and value and value != defaults.get(key):
            yield f"{key} is {value!r}, which is not read here; {MERGE}"
    beginning = found.get("init_lora_weights")
    if beginning not in _BEGINNINGS:
        yield f"init_lora_weights is {beginning!r}, which changes the base weights too; {MERGE}"
    for key, is_right, word in (
        ("r", _is_rank, "whole number above 0"),
        ("lora_alpha", _is_alpha, "number other than 0"),
    ):
        if not is_right(found.get(key)):
            yield f"{key} is {found.get(key)!r}, not a {word}; save the adapters again"
    for key, is_right in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        pattern = found.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(is_right, pattern.values())):
            yield f"{key} is {pattern!r}, not numbers by layers; save the adapters again"


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_alpha(value: Any) -> bool:
    return is_number(value) and value != 0


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no integer that is too large for one."""
    is_kind = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_kind and -_LARGEST < value < _LARGEST
