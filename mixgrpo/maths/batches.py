"""How many samples are divided into batches."""

from __future__ import annotations


def in_batches_of(size: int, rows: range) -> list[range]:
    """Splits consecutive rows into batches of ``size`` and a last one of what is left."""
    return [rows[at : at + size] for at in range(0, len(rows), size)]
