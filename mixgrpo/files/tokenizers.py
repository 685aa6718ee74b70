"""Loads tokenizers, and checks that they have the words of their model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixgrpo.files.messages import in_one_line
from mixgrpo.files.regular import check_regular_files

_FEWEST = 0.9  # tokens per row of the model's embedding, which may be padded


def load_tokenizer(load: Callable[[], Any], folder: Path, rows: int) -> Any:
    """Loads a tokenizer that a library reads from ``folder``.

    Args:
        rows: rows of the embedding of the model to which it belongs.

    Raises:
        ValueError: it cannot be read, or has more or far fewer tokens than the embedding; the
            message names the folder, and lacks a remedy.
    """
    try:
        check_regular_files(folder)
        tokenizer = load()
    except Exception as error:  # whatever a library raises for a damaged file
        raise ValueError(
            f"the tokenizer in {folder} cannot be read ({in_one_line(error)})"
        ) from error
    count = len(getattr(tokenizer, "tokenizer", tokenizer))
    if not _FEWEST * rows <= count <= rows:
        raise ValueError(
            f"the tokenizer in {folder} has {count} tokens, but the model's embedding has {rows}"
        )
    return tokenizer
