"""Checks of the model folder: its parts and the contents of their weight files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mixgrpo.assembly import make_negative, spacing_for
from mixgrpo.config import Config
from mixgrpo.doctor.lines import Line, error, fetching, ok, size
from mixgrpo.maths.schedule import make_sigmas
from mixgrpo.models.family import Family
from mixgrpo.models.files import check_part
from mixgrpo.models.folder import (
    check_index,
    check_knobs,
    check_scheduler,
    check_together,
    read_tokenizer,
)
from mixgrpo.models.registry import family_of

_OTHER_PATH = "set --model.path to a diffusers pipeline folder"
# Each of the other parts counts as present if one of these files exists.
_FILES = {"model_index.json": ("",), "scheduler": ("scheduler_config.json",)}
_OF_TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model")


def check_model(config: Config, processes: int) -> Iterator[Line]:
    folder = Path(config.model.path)
    remedy = fetching(folder, _OTHER_PATH)
    if not folder.is_dir():
        yield error("model", f"model.path is {str(folder)!r}, which is not a folder", remedy)
        return
    try:
        family = family_of(config.model, missing="flux")
    except (OSError, ValueError) as caught:
        yield error("model", str(caught), remedy)
        return
    try:
        check_knobs(family, config.model)
    except ValueError as caught:
        yield _with_remedy(caught)
    whole = True
    for part in ("model_index.json", *family.parts):
        check = _weights if part in family.weighted else _small
        line = check(family, folder / part, remedy)
        whole &= line.level == "ok"
        yield line
    if whole:
        yield from _guidance(config)
        yield from _schedule(config)
        try:
            check_together(family, folder)
        except (OSError, ValueError) as caught:
            yield error("model", str(caught), remedy)


def _guidance(config: Config) -> Iterator[Line]:
    try:
        make_negative(config)
    except (OSError, ValueError) as caught:
        yield _with_remedy(caught)


def _schedule(config: Config) -> Iterator[Line]:
    try:
        for steps in (config.sampling.steps, config.validation.steps):
            make_sigmas(steps, spacing_for(config, steps))
    except (OSError, ValueError) as caught:
        yield _with_remedy(caught)


def _with_remedy(caught: Exception) -> Line:
    fault, _, remedy = str(caught).rpartition("; ")
    return error("model", fault, remedy)


def _weights(family: Family, folder: Path, remedy: str) -> Line:
    if not folder.is_dir():
        return error("model", f"{folder} is missing", remedy)
    try:
        files, weights = check_part(family, folder)
    except (OSError, ValueError) as caught:
        return error("model", f"{folder.name}: {caught}", remedy)
    total = size(sum(file.stat().st_size for file in files))
    many = f" in {len(files)} files" if len(files) > 1 else ""
    return ok(
        "model", f"{folder.name}: {weights / 1e6:,.1f}M weights, {total}{many}, as configured"
    )


def _small(family: Family, path: Path, remedy: str) -> Line:
    known = _FILES.get(path.name, _OF_TOKENIZERS)
    there = [path / name for name in known if (path / name).exists()]
    if not there:
        names = " or ".join(str(path / name) for name in known)
        return error("model", f"{names} is missing", remedy)
    try:
        if path.name in family.tokenizers:
            if (path.parent / "model_index.json").exists():  # which names the tokenizer's class
                read_tokenizer(family, path)
        elif path.name == "scheduler":
            check_scheduler(path.parent)
        else:
            check_index(family, path.parent)
    except (OSError, ValueError) as caught:
        return error("model", str(caught), remedy)
    return ok("model", f"{path.name}: as configured")
