"""Opens a pipeline folder, after checking that its parts are whole and belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from mixgrpo.config import ModelConfig
from mixgrpo.files.json_files import read_settings
from mixgrpo.files.messages import in_one_line
from mixgrpo.files.tokenizers import load_tokenizer
from mixgrpo.files.weight_files import check_finite
from mixgrpo.models.family import Family
from mixgrpo.models.files import check_part, find_part, part_settings, quiet
from mixgrpo.models.registry import family_of

_WITHOUT_MASKS = ("flash", "_native_flash")
# What the libraries raise for files that they cannot load.
_UNREADABLE = (
    *(SafetensorError, OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError),
)


def open_pipeline(
    family: Family,
    path: str,
    dtypes: dict[str, torch.dtype],
    without: Sequence[str],
    **given: Any,
) -> Any:
    """Loads a pipeline folder except for the parts ``without``, and those that are ``given``.

    Raises:
        FileNotFoundError: if one of its files is missing.
        ValueError: if a part is damaged, incomplete, or belongs to another model.
    """
    folder = Path(path)
    found = check_folder(family, folder, without)
    try:
        with quiet():
            pipeline = family.pipeline.from_pretrained(
                path,
                dtype=dtypes,
                local_files_only=True,
                variant=found.variant,
                **dict.fromkeys((*without, *family.unused)),
                **found.tokenizers,
                **given,
            )
    except _UNREADABLE as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"a part of the model in {path!r} (model.path) cannot be read ({in_one_line(error)}); "
            "fetch it again"
        ) from error
    for part in family.weighted:
        if part not in without and part not in given:
            check_finite(getattr(pipeline, part), folder / part)
    return pipeline


@dataclass(frozen=True)
class Checked:
    """What the checks of a folder found.

    Attributes:
        variant: of the weights, which ``from_pretrained`` must be told; None for no variant.
        tokenizers: by the names of their parts.
    """

    variant: str | None
    tokenizers: dict[str, Any]


def check_folder(family: Family, folder: Path, without: Sequence[str] = ()) -> Checked:
    """Checks everything in a pipeline folder. Only the headers of weight files are read.

    Args:
        without: parts that will not be loaded.

    Raises:
        FileNotFoundError, ValueError: see ``open_pipeline``.
    """
    try:
        check_index(family, folder)
        for part in family.weighted:
            if part not in without:
                check_part(family, folder / part)
        variant = check_together(family, folder, without)
        if "scheduler" not in without:
            check_scheduler(folder)
        tokenizers = [part for part in family.tokenizers if part not in without]
        read = {part: read_tokenizer(family, folder / part) for part in tokenizers}
        return Checked(variant, read)
    except ValueError as error:
        raise ValueError(
            f"the model in {str(folder)!r} (model.path) cannot be used: {error}"
        ) from error


def check_together(family: Family, folder: Path, without: Sequence[str] = ()) -> str | None:
    """Checks the parts against each other; ``check_part`` has found no fault in any of them.

    Returns:
        the variant of the weights; None for no variant.

    Raises:
        OSError, ValueError: the parts do not belong to one model, or are of several variants.
    """
    check_sizes(family, folder, without)
    family.check(folder, without)
    return _variant([folder / part for part in family.weighted if part not in without])


def _variant(parts: Sequence[Path]) -> str | None:
    variants = {find_part(part).variant for part in parts} - {""}
    if len(variants) > 1:
        raise ValueError(
            f"its parts are stored in several variants ({', '.join(sorted(variants))}); keep the "
            "files of one of them"
        )
    return next(iter(variants), None)


def check_index(family: Family, folder: Path) -> None:
    """Checks that model_index.json names the classes of the family.

    Raises:
        OSError, ValueError: it cannot be read, or describes another model.
    """
    index = folder / "model_index.json"
    content = read_settings(index)
    wanted = {part: _full_name(kind) for part, (kind, _) in family.weighted.items()}
    wanted["scheduler"] = "diffusers.FlowMatch"
    for part, name in wanted.items():
        entry = content.get(part)
        found = ".".join(map(str, entry)) if isinstance(entry, list) else str(entry)
        if found != name and not (part == "scheduler" and found.startswith(name)):
            raise ValueError(
                f"{index} describes a {content.get('_class_name')}, in which {part} is {found} "
                f"instead of {name}; set --model.path to a diffusers {family.title} pipeline folder"
            )


def _full_name(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def check_scheduler(folder: Path) -> None:
    """Raises OSError, ValueError: the scheduler's configuration is missing or of another kind."""
    path = folder / "scheduler" / "scheduler_config.json"
    kind = str(read_settings(path).get("_class_name", "FlowMatch"))
    if not kind.startswith("FlowMatch"):
        raise ValueError(
            f"{path} is that of a {kind}, not of a FlowMatch scheduler; fetch the folder again"
        )


def check_sizes(family: Family, folder: Path, without: Sequence[str] = ()) -> None:
    """Raises OSError, ValueError: the widths of two parts differ, so they are of two models."""
    if "transformer" in without:
        return
    config = part_settings(family, folder / "transformer")
    for key, part, theirs, factor in family.shared:
        if part in without:
            continue
        mine, wanted = config.get(key), part_settings(family, folder / part).get(theirs)
        if mine is not None and wanted is not None and mine != factor * wanted:
            raise ValueError(
                f"{folder / 'transformer' / 'config.json'} has {key} {mine}, but {part} requires "
                f"{factor * wanted}; fetch the parts of one model"
            )


def read_tokenizer(family: Family, folder: Path) -> Any:
    """Reads a tokenizer and checks that it is the one of its encoder.

    Raises:
        OSError, ValueError: a file cannot be read, the vocabulary is larger or much smaller than
            the encoder's embedding, another token ends a text, there is no padding token, or
            model_max_length is not a length of texts that the encoder can read.
    """
    index = folder.parent / "model_index.json"
    entry = read_settings(index).get(folder.name)
    part = family.tokenizers[folder.name]
    config = part_settings(family, folder.parent / part)
    rows, ends = config["vocab_size"], config["eos_token_id"]
    remedy = f"fetch the tokenizer of {part}"
    name = entry[-1] if isinstance(entry, list) and entry else entry
    kind = getattr(transformers, str(name), None)
    if kind is None:
        raise ValueError(
            f"{index} has {folder.name} {entry}, but it must name a tokenizer of transformers; "
            "fetch it again"
        )

    def load() -> Any:
        with quiet():
            return kind.from_pretrained(folder, local_files_only=True)

    try:
        tokenizer = load_tokenizer(load, folder, rows)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
    if config["model_type"] == "clip_text_model" and ends == 2:
        ends = rows - 1  # in CLIP's older files, 2 stands for the largest token
    if tokenizer.eos_token_id not in (ends if isinstance(ends, list) else [ends]):
        raise ValueError(
            f"the tokenizer in {folder} ends a text by token {tokenizer.eos_token_id}, but {part} "
            f"expects {ends}; {remedy}"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no padding token; {remedy}")
    # Texts are padded to it, except by the tokenizer that is told the length.
    is_main = folder.name == family.main_tokenizer
    most = None if is_main else config.get("max_position_embeddings")
    _check_length(tokenizer.model_max_length, most, folder, remedy)
    return tokenizer


def _check_length(length: Any, most: int | None, folder: Path, remedy: str) -> None:
    """Checks model_max_length; ``most`` is the length of the encoder's longest text, if any."""
    if type(length) is not int or length < 1 or (most is not None and length > most):
        upto = "" if most is None else f" of at most {most}"
        raise ValueError(
            f"the tokenizer in {folder} has model_max_length {length!r} (tokenizer_config.json), "
            f"but it must be a positive whole number{upto}; {remedy}"
        )


def checked_family(model: ModelConfig) -> Family:
    """The family of a model whose knobs it can follow.

    Raises:
        FileNotFoundError, ValueError: see ``family_of``; or a knob has a value that it cannot.
    """
    family = family_of(model)
    check_knobs(family, model)
    return family


def check_knobs(family: Family, model: ModelConfig) -> None:
    """Raises ValueError: a knob has a value that the family cannot follow."""
    if family.longest_text is not None and model.text_length > family.longest_text:
        raise ValueError(
            f"model.text_length is {model.text_length}, but {family.title} reads at most "
            f"{family.longest_text} tokens; set --model.text_length to {family.longest_text} or "
            "less"
        )
    if family.masks and model.attention in _WITHOUT_MASKS:
        raise ValueError(
            f"model.attention is {model.attention!r}, which takes no masks, but {family.title} "
            "masks the padding of prompts; set --model.attention native"
        )


def require_parts(path: str, parts: Sequence[str]) -> list[Path]:
    """Returns the paths of the named parts of a pipeline folder.

    Raises:
        FileNotFoundError: if the folder or one of the parts is missing.
    """
    folder = Path(path)
    for part in ("", "model_index.json", *parts):
        if not (folder / part).exists():
            raise FileNotFoundError(
                f"model.path is {str(folder)!r}, but {str(folder / part)!r} does not exist; "
                "set --model.path to a diffusers pipeline folder"
            )
    return [folder / part for part in parts]
