"""Builds the report as one self-contained HTML file."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixgrpo.files.disk import write_text_whole
from mixgrpo.report.charts import (
    OPTIMISATION,
    metric_charts,
    other_keys,
    phase_chart,
    reward_charts,
    window_chart,
)
from mixgrpo.report.pictures import make_album
from mixgrpo.report.runs import Run
from mixgrpo.report.tables import knob_tables, name_of, score_table, time_table
from mixgrpo.run.hacking import hacking_warning

STATIC = Path(__file__).parent / "static"


def write_report(runs: Sequence[Run], path: Path) -> Path:
    """Writes the page; returns its path.

    Raises:
        OSError: it could not be written.
        ValueError: ``path`` is something other than a regular file.
    """
    text = report_html(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_whole(path, text)
    return path


def report_html(runs: Sequence[Run]) -> str:
    """The page as text."""
    album = make_album(runs)
    data = {
        "runs": [run.name for run in runs],
        "sections": _sections(runs),
        "album": asdict(album),
    }
    names = ", ".join(run.name for run in runs)
    parts = {
        "TITLE": html.escape(f"{'Runs' if len(runs) > 1 else 'Run'} {names}"),
        "STYLE": _static("uPlot.min.css") + _static("report.css"),
        "LIBRARY": f"/*\n{_static('uPlot.LICENSE')}*/\n{_static('uPlot.iife.min.js')}",
        "SCRIPT": _static("report.js"),
        "RUNS": "".join(
            _run_card(run, place, [*run.missing, *album.faults[place]])
            for place, run in enumerate(runs)
        ),
        "SCORES": score_table(runs),
        "SECONDS": time_table(runs),
        "KNOBS": knob_tables(runs),
        # An unescaped "<" could end the script element.
        "DATA": json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
    }
    # In one pass, since inserted text may itself contain placeholders.
    return re.sub(r"<!--([A-Z]+)-->", lambda found: parts[found[1]], _static("page.html"))


def _static(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def _sections(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """Id of an element of the page -> its charts."""
    window = window_chart(runs)
    phases = [phase_chart(run, place) for place, run in enumerate(runs)]
    sections = {
        "trained": reward_charts(runs, trained=True),
        "held-out": reward_charts(runs, trained=False),
        "optimisation": metric_charts(runs, OPTIMISATION),
        "window": [window] if window else [],
        "phases": [chart for chart in phases if chart],
        "others": metric_charts(runs, other_keys(runs)),
    }
    return {name: [asdict(chart) for chart in charts] for name, charts in sections.items()}


# ---- the card of each run


def _run_card(run: Run, place: int, missing: Iterable[str]) -> str:
    warned = warnings(run)
    parts = [
        f'<h2><label><input type="checkbox" checked data-run="{place}" hidden>'
        f"{name_of(run, place)}</label></h2>",
        f"<p>{html.escape(_state(run))}</p>",
    ]
    if warned:
        when = ", ".join(str(iteration) for iteration in warned)
        text = f"Warning at iteration {when}: {warned[max(warned)]}"
        parts.append(f'<p class="warning">{html.escape(text)}</p>')
    notes = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in missing)
    parts.append(f'<ul class="missing">{notes}</ul>' if notes else "")
    return f'<section class="run">{"".join(parts)}</section>'


def _state(run: Run) -> str:
    planned = "unknown" if run.planned is None else str(run.planned)
    state = f"{run.done} of {planned} iterations"
    if run.planned is not None and run.done < run.planned:
        state += " (running or stopped)"
    return f"{state}; code {run.revision[:12]}" if run.revision else state


def warnings(run: Run) -> dict[int, str]:
    """Iteration of a validation -> the warning of reward hacking raised there."""
    validations = [r for r in run.records if any(key.startswith("validation/") for key in r)]
    given = {
        record["iteration"]: hacking_warning(validations[:end], run.weights, run.patience)
        for end, record in enumerate(validations, 1)
    }
    return {iteration: text for iteration, text in given.items() if text is not None}
