"""The gallery: a self-contained HTML page with the images of all manifests side by side."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mixgrpo.evaluation.comparison import Row, Values, number, table_cells
from mixgrpo.evaluation.evaluate import Evaluation
from mixgrpo.evaluation.gallery_page import PAGE
from mixgrpo.evaluation.manifests import Picture
from mixgrpo.evaluation.pictures import Unreadable, read_image

ALL = "all"
EDGE = 256  # maximum length in pixels of an image's longer edge


@dataclass(frozen=True)
class Choice:
    """What the page shows.

    Attributes:
        prompts: maximum number of prompts.
        samples: maximum number of images per prompt and manifest.
        by: reward that ranks prompts as best, worst and most changed; ``ALL``: mean z-score.
    """

    prompts: int = 60
    samples: int = 4
    by: str = ALL


@dataclass(frozen=True)
class Standing:
    """A prompt's values of one measure.

    Attributes:
        level: mean score of its images, except the baseline's; NaN if none was scored.
        change: the largest change, over manifests, of the mean from the baseline's; NaN if unknown.
    """

    level: float
    change: float


def standings(evaluation: Evaluation, baseline: str) -> dict[str, dict[int, Standing]]:
    """Measure (``ALL`` first, then each reward) -> prompt's index -> its standing."""
    measures = {ALL: mean_z(evaluation.scores), **evaluation.scores}
    indices = sorted({p.index for manifest in evaluation.manifests for p in manifest.pictures})
    return {
        name: {index: _standing(values, baseline, index) for index in indices}
        for name, values in measures.items()
    }


def mean_z(scores: Mapping[str, Mapping[str, Values]]) -> dict[str, dict[tuple[int, int], float]]:
    """Manifest -> for each image, the mean over all rewards of its z-score among all images."""
    parts: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for by_manifest in scores.values():
        known = [v for values in by_manifest.values() for v in values.values() if not math.isnan(v)]
        mean = statistics.fmean(known) if known else math.nan
        deviation = (statistics.pstdev(known, mean) if known else 0.0) or 1.0
        for name, values in by_manifest.items():
            for key, value in values.items():
                parts[name][key].append((value - mean) / deviation)
    return {
        name: {key: _mean(values) for key, values in by_key.items()}
        for name, by_key in parts.items()
    }


def _standing(values: Mapping[str, Values], baseline: str, index: int) -> Standing:
    means = {name: mean_of(own, index) for name, own in values.items()}
    others = [mean for name, mean in means.items() if name != baseline]
    changes = [mean - means[baseline] for mean in others if not math.isnan(mean - means[baseline])]
    return Standing(
        level=_mean(others or [means[baseline]]), change=max(changes, key=abs, default=math.nan)
    )


def mean_of(values: Values, index: int) -> float:
    """Mean over a prompt's scored images; NaN if there are none."""
    return _mean(value for key, value in values.items() if key[0] == index)


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def chosen(standing: Mapping[int, Standing], count: int) -> dict[int, str]:
    """Selects ``count`` prompts: a third each of the best, the worst and the most changed.

    Returns index -> label, with the best first, then the worst, the most changed and the prompts
    that could not be scored. Each prompt appears once.
    """
    level = {index: each.level for index, each in standing.items() if not math.isnan(each.level)}
    change = {index: each.change for index, each in standing.items() if not math.isnan(each.change)}
    orders = {
        "best": sorted(level, key=lambda index: -level[index]),
        "worst": sorted(level, key=level.__getitem__),
        "most changed": sorted(change, key=lambda index: -abs(change[index])),
        "not scored": [index for index in standing if index not in level],
    }
    found: dict[int, str] = {}
    # The orders take turns, so that each gets an equal share of the remaining prompts.
    waiting = {label: iter(order) for label, order in orders.items() if label != "not scored"}
    while len(found) < min(count, len(level)):
        for label, order in waiting.items():
            index = next((index for index in order if index not in found), None)
            if index is not None and len(found) < count:
                found[index] = label
    found |= dict.fromkeys(orders["not scored"][: count - len(found)], "not scored")
    return {index: label for wanted in orders for index, label in found.items() if label == wanted}


# ---- the page


def gallery_html(evaluation: Evaluation, rows: Sequence[Row], baseline: str, choice: Choice) -> str:
    """The HTML of the page; images are embedded, and nothing is fetched."""
    places = standings(evaluation, baseline)
    shown = chosen(places[choice.by], choice.prompts)
    pictures = {
        manifest.name: _by_index(manifest.pictures, choice.samples)
        for manifest in evaluation.manifests
    }
    cards = [
        _card(evaluation, pictures, baseline, index, label, {m: places[m][index] for m in places})
        for index, label in shown.items()
    ]
    total = len(places[ALL])
    parts = {
        "TABLE": _table(table_cells(rows, baseline)),
        "COUNT": f"{len(shown)} of {total} prompts",
        "BY": html.escape(_measure(choice.by)),
        "BASELINE": html.escape(baseline),
        "MEASURES": "".join(
            f"<option value={_quoted(name)}{' selected' if name == choice.by else ''}>"
            f"{html.escape(_measure(name))}</option>"
            for name in places
        ),
        "CARDS": "\n".join(cards),
    }
    page = PAGE
    for name, text in parts.items():  # text holds no placeholder, because all of it is escaped
        page = page.replace(f"<!--{name}-->", text)
    return page


def _measure(name: str) -> str:
    return "mean z-score of all rewards" if name == ALL else name


def _by_index(pictures: Sequence[Picture], samples: int) -> dict[int, list[Picture]]:
    found: dict[int, list[Picture]] = defaultdict(list)
    for picture in pictures:
        if len(found[picture.index]) < samples:
            found[picture.index].append(picture)
    return found


def _card(
    evaluation: Evaluation,
    pictures: Mapping[str, Mapping[int, Sequence[Picture]]],
    baseline: str,
    index: int,
    label: str,
    standing: Mapping[str, Standing],
) -> str:
    """The card of one prompt: a column for every manifest, with images above mean scores."""
    places = {name: [_known(each.level), _known(each.change)] for name, each in standing.items()}
    prompt = next(own[index][0].prompt for own in pictures.values() if index in own)
    names = [manifest.name for manifest in evaluation.manifests]
    cells = [
        _pictures(pictures[name].get(index, ()), evaluation.faults[name], name) for name in names
    ]
    lines = [
        f"<tr><th></th>{''.join(f'<th>{html.escape(name)}</th>' for name in names)}</tr>",
        f"<tr class=pictures><th></th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>",
    ]
    lines += [
        _scores(reward, {name: mean_of(values[name], index) for name in names}, baseline)
        for reward, values in evaluation.scores.items()
    ]
    return (
        f"<article data-index={index} data-places={_quoted(json.dumps(places))}>"
        f"<h2>{html.escape(prompt)}</h2><p class=label>prompt {index} &middot; {label}</p>"
        f"<div class=scroll><table>{''.join(lines)}</table></div></article>"
    )


def _scores(reward: str, means: Mapping[str, float], baseline: str) -> str:
    cells = []
    for name, mean in means.items():
        change = math.nan if name == baseline else mean - means[baseline]
        kind = {1: " class=up", -1: " class=down"}.get((change > 0) - (change < 0), "")
        shown = "" if math.isnan(change) else f" <i{kind}>{number(change, plus=True)}</i>"
        cells.append(f"<td>{number(mean)}{shown}</td>")
    return f"<tr><th>{html.escape(reward)}</th>{''.join(cells)}</tr>"


def _pictures(pictures: Sequence[Picture], faults: Mapping[Path, str], name: str) -> str:
    parts = []
    for picture in pictures:
        text = f"{name}, sample {picture.sample}"
        fault = faults.get(picture.file, "")
        try:
            uri, width, height = ("", 0, 0) if fault else thumbnail(picture.file)
        except Unreadable as error:  # it was readable when it was scored
            fault = str(error)
        if fault:
            parts.append(f"<span class=missing>{html.escape(f'{text}: {fault}')}</span>")
            continue
        parts.append(
            f"<img src={_quoted(uri)} alt={_quoted(text)} title={_quoted(text)} "
            f"width={width} height={height} loading=lazy>"
        )
    return "".join(parts) or "<span class=missing>none</span>"


def thumbnail(file: Path) -> tuple[str, int, int]:
    """A data URI of the image, at most ``EDGE`` pixels long, and its width and height.

    Raises ``Unreadable``.
    """
    picture = read_image(file)
    picture.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85, subsampling=0)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return uri, *picture.size


def _known(value: float) -> float | None:
    """The value, or None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def _table(cells: Sequence[Sequence[str]]) -> str:
    head, *body = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in cells]
    rows = "".join(f"<tr>{line}</tr>" for line in body)
    return f"<table><tr>{head.replace('td>', 'th>')}</tr>{rows}</table>"


def _quoted(text: str) -> str:
    return f'"{html.escape(text)}"'
