"""Checks of the model folder: its parts and the contents of their weight files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mixgrpo.config import Config
from mixgrpo.doctor.lines import Line, error, fetching, ok, size
from mixgrpo.models.flux import PARTS
from mixgrpo.models.flux_files import WEIGHTED, check_part
from mixgrpo.models.flux_folder import (
    TOKENIZERS,
    check_index,
    check_scheduler,
    check_together,
    read_tokenizer,
)

_OTHER_PATH = "set --model.path to a diffusers FLUX pipeline folder"
# Each of the other parts counts as present if one of these files exists.
_FILES = {
    "model_index.json": ("",),
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer.json", "vocab.json"),
    "tokenizer_2": ("tokenizer.json", "spiece.model"),
}


def check_model(config: Config, processes: int) -> Iterator[Line]:
    folder = Path(config.model.path)
    remedy = fetching(folder, _OTHER_PATH)
    if not folder.is_dir():
        yield error("model", f"model.path is {str(folder)!r}, which is not a folder", remedy)
        return
    whole = True
    for part in ("model_index.json", *PARTS):
        line = (
            _weights(folder / part, remedy) if part in WEIGHTED else _small(folder / part, remedy)
        )
        whole &= line.level == "ok"
        yield line
    if whole:
        try:
            check_together(folder)
        except (OSError, ValueError) as caught:
            yield error("model", str(caught), remedy)


def _weights(folder: Path, remedy: str) -> Line:
    if not folder.is_dir():
        return error("model", f"{folder} is missing", remedy)
    try:
        files, weights = check_part(folder)
    except (OSError, ValueError) as caught:
        return error("model", f"{folder.name}: {caught}", remedy)
    total = size(sum(file.stat().st_size for file in files))
    many = f" in {len(files)} files" if len(files) > 1 else ""
    return ok(
        "model", f"{folder.name}: {weights / 1e6:,.1f}M weights, {total}{many}, as configured"
    )


def _small(path: Path, remedy: str) -> Line:
    known = _FILES[path.name]
    there = [path / name for name in known if (path / name).exists()]
    if not there:
        names = " or ".join(str(path / name) for name in known)
        return error("model", f"{names} is missing", remedy)
    try:
        if path.name in TOKENIZERS:
            if (path.parent / "model_index.json").exists():  # which names the tokenizer's class
                read_tokenizer(path)
        elif path.name == "scheduler":
            check_scheduler(path.parent)
        else:
            check_index(path.parent)
    except (OSError, ValueError) as caught:
        return error("model", str(caught), remedy)
    return ok("model", f"{path.name}: as configured")
