"""HPDv2's prompts (arXiv 2306.09341) as prompt files: one a line, distinct, in their order."""

from __future__ import annotations

import json
import os
from pathlib import Path

# What papers on MixGRPO and DanceGRPO train on and test with. Whether today's files of the data
# set hold exactly as many distinct prompts could not be looked up, so that others are no error.
EXPECTED = {"train": 103_700, "test": 400}


def write_prompts(source: Path, folder: Path) -> list[str]:
    """``train.json`` and ``test.json`` of ymhao/HPDv2 -> ``prompts_hpdv2.txt``, ``..._test.txt``.

    Returns:
        a warning for each file with another number of prompts than published.

    Raises:
        FileNotFoundError: one of the two is missing.
        ValueError: one is not the list of records with a ``prompt`` that it should be.
    """
    warnings = []
    for part, expected in EXPECTED.items():
        prompts = read_records(source / f"{part}.json")
        path = folder / f"prompts_hpdv2{'' if part == 'train' else '_test'}.txt"
        # Written whole or not at all.
        new = path.with_suffix(".new")
        new.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
        os.replace(new, path)
        if len(prompts) != expected:
            warnings.append(
                f"{path} has {len(prompts):,} prompts, and {expected:,} were published: results "
                "may not be comparable"
            )
    return warnings


def read_records(path: Path) -> list[str]:
    """The distinct prompts of a JSON list of records, in the order of their first appearance."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {str(path)!r}: fetch it again")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        prompts = [record["prompt"] for record in records]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"{str(path)!r} is no list of records with a prompt ({error!r}): delete it and fetch "
            "it again"
        ) from error
    # A line break would make two prompts of one.
    distinct = dict.fromkeys(str(prompt) for prompt in prompts if str(prompt).strip())
    return [" ".join(prompt.splitlines()) for prompt in distinct]
