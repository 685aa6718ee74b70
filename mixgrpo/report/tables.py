"""The tables of a report: scores before and after, time, knobs."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from mixgrpo.config import Config, flatten
from mixgrpo.report.charts import points
from mixgrpo.report.runs import Run
from mixgrpo.run.metrics import describe

COLOURS = 8  # the number of colours in report.css

_VALIDATED_BY = tuple(f"validation.{knob}" for knob in ("prompts_file", "prompts", "steps", "seed"))

Cells = Sequence[str]


def score_table(runs: Sequence[Run]) -> str:
    """Validation scores of each run: before, after, change, and with the moving average."""
    names = list(dict.fromkeys(name for run in runs for name in run.weights))
    rows = [[_reward_cell(runs, name), *_score_cells(runs, name)] for name in names]
    has_scores = any(key.startswith("validation/") for run in runs for key in run.keys)
    if not has_scores:
        return "<p>No validation is on record.</p>"
    heads = ["before", "after", "change", "average"]
    top = [f'<th colspan="4">{name_of(run, place)}</th>' for place, run in enumerate(runs)]
    head = [f"<th>{name}</th>" for _ in runs for name in heads]
    table = _table([["<th></th>", *top]] * (len(runs) > 1) + [["<th>reward</th>", *head], *rows])
    return table + _compared(runs)


def _compared(runs: Sequence[Run]) -> str:
    """A note if the runs' scores are not comparable, since their validations differ."""
    known = [run.config for run in runs if run.config]
    other = [knob for knob in _VALIDATED_BY if len({str(c.get(knob)) for c in known}) > 1]
    if not other:
        return ""
    said = f"These runs differ in {', '.join(other)}: their scores are not comparable."
    return f'<p class="note">{html.escape(said)}</p>'


def _reward_cell(runs: Sequence[Run], name: str) -> str:
    is_held_out = not any(run.weights.get(name) for run in runs)
    return f"<th>{html.escape(name)}{' <i>held out</i>' if is_held_out else ''}</th>"


def _score_cells(runs: Sequence[Run], name: str) -> list[str]:
    cells = []
    for run in runs:
        course = points(run, f"validation/{name}")
        average = list(points(run, f"validation_ema/{name}").values())
        before, last = course.get(0), max(course, default=0)
        after = course[last] if last else None
        change = after - before if before is not None and after is not None else None
        kind = "" if not change else ' class="up"' if change > 0 else ' class="down"'
        cells += [f"<td>{_number(before)}</td>", f"<td>{_number(after)}</td>"]
        cells += [f"<td{kind}>{_number(change, '+')}</td>"]
        cells += [f"<td>{_number(average[-1] if average else None)}</td>"]
    return cells


def _number(value: float | None, sign: str = "") -> str:
    return "&ndash;" if value is None else f"{value:{sign}.4f}"


def time_table(runs: Sequence[Run]) -> str:
    """Total time of each phase, and its share of the run."""
    totals = [
        {key: sum(points(run, key).values()) for key in run.keys if key.startswith("seconds/")}
        for run in runs
    ]
    keys = sorted({key for own in totals for key in own}, key=lambda key: -_longest(totals, key))
    if not keys:
        return "<p>No times are on record.</p>"
    rows = [[f"<th>{_titled(key)}</th>", *_time_cells(totals, key)] for key in keys]
    total = [f"<td>{_duration(_visible(own))}</td>" for own in totals]
    names = [f"<th>{name_of(run, place)}</th>" for place, run in enumerate(runs)]
    return _table([["<th>phase</th>", *names], *rows, ["<th>total</th>", *total]])


def _longest(totals: Sequence[dict[str, float]], key: str) -> float:
    return max(own.get(key, 0.0) for own in totals)


def _visible(seconds: dict[str, float]) -> float:
    """Total without what ran in parallel with other phases."""
    return sum(value for key, value in seconds.items() if key != "seconds/reward_hidden")


def _time_cells(totals: Sequence[dict[str, float]], key: str) -> list[str]:
    cells = []
    for own in totals:
        share = own.get(key, 0.0) / (_visible(own) or 1.0)
        shown = "&ndash;" if key not in own else _duration(own[key])
        if key in own and key != "seconds/reward_hidden":
            bar = f'<span class="bar" style="--share: {share:.1%} 100%"></span>'
            shown = f"{bar}<i>{share:.0%}</i> {shown}"
        cells.append(f"<td>{shown}</td>")
    return cells


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _titled(key: str) -> str:
    known = describe(key)
    return f'<span title="{html.escape(known.meaning)}">{html.escape(known.title)}</span>'


def knob_tables(runs: Sequence[Run]) -> str:
    """Knobs that differ between the runs or from the defaults, and a folded table of all knobs."""
    configs = [run.config for run in runs]
    known = [config for config in configs if config]
    if not known:
        return "<p>No configuration is on record.</p>"
    names = [name_of(run, place) for place, run in enumerate(runs)]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    if len(runs) == 1:
        defaults = flatten(Config())
        columns, heads, what = [*configs, defaults], [*names, "default"], "the defaults"
    else:
        columns, heads, what = configs, names, "each other"
    differing = [k for k in keys if len({_shown(c.get(k, "")) for c in columns if c}) > 1]
    title = f"<h3>Knobs that differ from {what}</h3>"
    body = _knob_table(differing, columns, heads) if differing else "<p>None.</p>"
    every = _knob_table(keys, configs, names)
    return f"{title}{body}<details><summary>All {len(keys)} knobs</summary>{every}</details>"


def _knob_table(keys: Sequence[str], columns: Sequence[dict[str, Any]], heads: Cells) -> str:
    head = ["<th>knob</th>", *(f"<th>{name}</th>" for name in heads)]
    rows = [
        [f"<th>{html.escape(key)}</th>", *(f"<td>{_value(c, key)}</td>" for c in columns)]
        for key in keys
    ]
    return _table([head, *rows])


def _value(config: dict[str, Any], key: str) -> str:
    return f"<code>{html.escape(_shown(config[key]))}</code>" if key in config else "&ndash;"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def name_of(run: Run, place: int) -> str:
    """A run's name after a chip of its colour, as HTML."""
    return f'<span class="chip c{place % COLOURS}"></span>{html.escape(run.name)}'


def _table(rows: Sequence[Cells]) -> str:
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f'<div class="scroll"><table>{body}</table></div>'
