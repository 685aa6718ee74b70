"""Writes HPDv2's prompts (arXiv 2306.09341) as prompt files: distinct, in order, one per line."""

from __future__ import annotations

import json
import os
from pathlib import Path

# The numbers of prompts with which the MixGRPO and DanceGRPO papers train and test. Whether the
# current files of the data set have exactly as many distinct prompts is unknown, so a different
# number is only a warning.
EXPECTED = {"train": 103_700, "test": 400}


def write_prompts(source: Path, folder: Path) -> list[str]:
    """``train.json`` and ``test.json`` of ymhao/HPDv2 -> ``prompts_hpdv2.txt``, ``..._test.txt``.

    Returns:
        a warning for each file whose number of prompts differs from the published one.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is not a list of records with a ``prompt``.
    """
    warnings = []
    for part, expected in EXPECTED.items():
        prompts = read_records(source / f"{part}.json")
        path = folder / f"prompts_hpdv2{'' if part == 'train' else '_test'}.txt"
        # The rename makes the write atomic.
        new = path.with_suffix(".new")
        new.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
        os.replace(new, path)
        if len(prompts) != expected:
            warnings.append(
                f"{path} has {len(prompts):,} prompts, but {expected:,} were published; results "
                "may not be comparable"
            )
    return warnings


def read_records(path: Path) -> list[str]:
    """The distinct prompts of a JSON list of records, in the order of their first appearance."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {str(path)!r}; download it again")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        prompts = [record["prompt"] for record in records]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"{str(path)!r} is not a list of records with a prompt ({error!r}); delete it and "
            "download it again"
        ) from error
    # A line break would split a prompt in two.
    distinct = dict.fromkeys(str(prompt) for prompt in prompts if str(prompt).strip())
    return [" ".join(prompt.splitlines()) for prompt in distinct]
