"""Writes the results of an evaluation: table.md, summary.json and gallery.html."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixgrpo.evaluation.comparison import Bootstrap, Row, compare, table
from mixgrpo.evaluation.evaluate import Evaluation
from mixgrpo.evaluation.gallery import Choice, gallery_html
from mixgrpo.files.disk import write_text_whole

VERSION = 1
FILES = ("table.md", "summary.json", "scores.json", "gallery.html")
SHOWN = 5  # unreadable images named below the table


def write_report(
    evaluation: Evaluation, baseline: str, output: Path, bootstrap: Bootstrap, choice: Choice
) -> str:
    """Writes the files into ``output``; returns the table and their paths as text to print."""
    rows = comparison_rows(evaluation, baseline, bootstrap)
    text = f"{table(rows, baseline)}\n\n{notes(evaluation, rows, baseline, bootstrap)}\n"
    output.mkdir(parents=True, exist_ok=True)
    write_text_whole(output / "table.md", text)
    summary = summarised(evaluation, rows, baseline, bootstrap)
    write_text_whole(output / "summary.json", json.dumps(summary, indent=1, allow_nan=False))
    written = FILES if choice.prompts else FILES[:-1]
    if choice.prompts:
        page = gallery_html(evaluation, rows, baseline, choice)
        write_text_whole(output / "gallery.html", page)
    return f"{text}\nwritten to {output}: {', '.join(written)}"


def comparison_rows(evaluation: Evaluation, baseline: str, bootstrap: Bootstrap) -> list[Row]:
    """A row for every reward and manifest, then diversity if any prompt has two images."""
    prompts = {p.index: p.prompt for manifest in evaluation.manifests for p in manifest.pictures}
    rows = [
        row
        for reward, values in evaluation.scores.items()
        for row in compare(reward, values, baseline, bootstrap, prompts)
    ]
    if any(evaluation.diversity.values()):
        label = f"diversity ({evaluation.features})"
        rows += compare(label, evaluation.diversity, baseline, bootstrap, prompts)
    return rows


def notes(evaluation: Evaluation, rows: Sequence[Row], baseline: str, bootstrap: Bootstrap) -> str:
    """Explains the columns of the table, and lists what was left out of it."""
    lines = [
        f"wins: fraction of images that score higher than {baseline}'s image of the same prompt "
        "and sample, ties counted half; difference: mean over the same pairs; intervals: "
        f"bootstrap over distinct prompts, {bootstrap.resamples} resamples, seed {bootstrap.seed}.",
    ]
    if any(evaluation.diversity.values()):
        lines.append(
            f"diversity: mean of 1 - cosine of {evaluation.features}'s image features between the "
            "images of a prompt, over the prompts with at least two images."
        )
    lines += [
        f"{manifest.name} has no prompt and sample in common with {baseline}."
        for manifest in evaluation.manifests
        if manifest.name != baseline
        and not any(row.pairs for row in rows if row.manifest == manifest.name)
    ]
    lines += [_unreadable(name, faults) for name, faults in evaluation.faults.items() if faults]
    return "\n\n".join(lines)


def _unreadable(name: str, faults: Mapping[Path, str]) -> str:
    named = [f"- {file}: {fault}" for file, fault in list(faults.items())[:SHOWN]]
    more = [f"- and {len(faults) - SHOWN} more, see summary.json"] if len(faults) > SHOWN else []
    count = f"{len(faults)} image{'s' if len(faults) > 1 else ''}"
    return "\n".join([f"{name}: {count} could not be read and left out:", "", *named, *more])


def summarised(
    evaluation: Evaluation, rows: Sequence[Row], baseline: str, bootstrap: Bootstrap
) -> dict[str, Any]:
    """The content of summary.json, with null in place of NaN."""
    return {
        "version": VERSION,
        "baseline": baseline,
        "bootstrap": asdict(bootstrap),
        "manifests": {
            manifest.name: {
                "path": str(manifest.path),
                "settings": manifest.settings,
                "pictures": len(manifest.pictures),
                "prompts": len({picture.index for picture in manifest.pictures}),
                "unreadable": {
                    str(file): fault for file, fault in evaluation.faults[manifest.name].items()
                },
            }
            for manifest in evaluation.manifests
        },
        "rows": [_plain(asdict(row)) for row in rows],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
