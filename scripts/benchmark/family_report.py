"""The Markdown tables of family.py, from its JSON alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from family_claims import CLAIMS, Claim
from family_members import REFERENCE
from family_statistics import Estimate, estimate, paired, verdict

Found = Mapping[str, Any]
# Reward -> decimals. The judge first: no reward model sees what it reads off the picture.
SCORES = {
    "all_right": 3,
    "facts_right": 3,
    "hpsv2": 3,
    "pickscore": 2,
    "imagereward": 3,
    "clip_score": 3,
}
HELD_OUT = ("all_right", "facts_right", "clip_score")
ABLATIONS = {
    "noise": "Initial noise: shared in a group, or independent",
    "window": "Window size",
    "strategy": "How the window moves",
    "stride": "Stride",
    "pace": "Iterations per window, told by the number of windows in the run",
    "tail": "The steps behind the window: DPM-Solver++ order and ratio",
    "prefix": "DPM-Solver++ before the window",
}


def values(found: Found, member: str, at: str, quantity: str) -> dict[int, float]:
    """Seed -> a score, or "seconds", "seconds_per_iteration", "rollout", "update", "iterations".

    Args:
        at: "iterations" for equally many, "time" for equally long as MixGRPO takes.
    """
    wanted = iterations_of(found, member, at)
    return {
        point["seed"]: _quantity(point, quantity)
        for point in found["points"]
        if (point["member"], point["iterations"]) == (member, wanted) and "scores" in point
    }


def iterations_of(found: Found, member: str, at: str) -> int | None:
    """After how many iterations a member is compared; None if it has no such point."""
    if at == "iterations":
        return int(found["settings"]["iterations"])
    return found["equal_time"].get(member)


def _quantity(point: Mapping[str, Any], quantity: str) -> float:
    for place in (point, point["scores"], point["evaluations"]):
        if quantity in place:
            return float(place[quantity])
    raise KeyError(quantity)


# --- cells and tables -----------------------------------------------------------------------------


def cell(value: Estimate | None, decimals: int, plus: bool = False) -> str:
    """``0.512 ± 0.013``; a single seed has no interval, and none is a dash."""
    if value is None:
        return "-"
    mean = f"{value.mean:{'+' if plus else ''}.{decimals}f}"
    return mean if math.isinf(value.half) else f"{mean} ± {value.half:.{decimals}f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def scores_table(found: Found, names: Sequence[str], at: str) -> str:
    """The base, then each member's scores and what an iteration takes."""
    heads = ["", "seeds", "iterations", *_named_scores(),
             "evaluations per picture, rollout + update", "s per iteration"]  # fmt: skip
    base = [f"{found['base'][name]:.{decimals}f}" for name, decimals in SCORES.items()]
    rows = [["base", "", "0", *base, "", ""]]
    for name in names:
        if not values(found, name, at, "seconds"):
            continue
        means = {q: _mean(found, name, at, q) for q in ("rollout", "update")}
        rows.append([
            found["members"][name]["label"],
            str(len(values(found, name, at, "seconds"))),
            str(iterations_of(found, name, at)),
            *(cell(_mean(found, name, at, score), decimals) for score, decimals in SCORES.items()),
            f"{means['rollout'].mean:.2f} + {means['update'].mean:.2f}",
            cell(_mean(found, name, at, "seconds_per_iteration"), 2),
        ])  # fmt: skip
    return table(heads, rows)


def differences_table(found: Found, names: Sequence[str], at: str) -> str:
    """Each member minus its reference, by seed."""
    heads = ["minus reference", "pairs", *_named_scores(), "s per iteration"]
    rows = []
    for name in names:
        reference = found["members"][name]["reference"]
        if name == reference or not (pairs := _difference(found, name, reference, at, "seconds")):
            continue
        label = f"{found['members'][name]['label']} - {found['members'][reference]['label']}"
        cells = [
            _marked(_difference(found, name, reference, at, quantity), decimals)
            for quantity, decimals in {**SCORES, "seconds_per_iteration": 2}.items()
        ]
        rows.append([label, str(pairs.count), *cells])
    return table(heads, rows)


def _named_scores() -> list[str]:
    return [f"{name}, held out" if name in HELD_OUT else name for name in SCORES]


def _mean(found: Found, member: str, at: str, quantity: str) -> Estimate:
    return estimate(list(values(found, member, at, quantity).values()))


def _difference(found: Found, a: str, b: str, at: str, quantity: str) -> Estimate | None:
    return paired(values(found, a, at, quantity), values(found, b, at, quantity))


def _marked(difference: Estimate | None, decimals: int) -> str:
    text = cell(difference, decimals, plus=True)
    return f"**{text}**" if difference is not None and difference.sign else text


# --- what the paper says --------------------------------------------------------------------------


def claims_table(found: Found, comments: Mapping[str, str]) -> str:
    """A line for each claim that both of its members have a pair of seeds for."""
    heads = ["the paper says", "its figures", "pairs", "the miniature says", "agrees?",
             "the judge (all_right) says", "agrees?", "why"]  # fmt: skip
    rows = [row for claim in CLAIMS if (row := _claim_row(found, claim, comments)) is not None]
    return table(heads, rows)


def _claim_row(found: Found, claim: Claim, comments: Mapping[str, str]) -> list[str] | None:
    difference = _difference(found, claim.a, claim.b, claim.at, claim.quantity)
    judged = _difference(found, claim.a, claim.b, claim.at, "all_right")
    if difference is None or judged is None:
        return None
    decimals = {**SCORES, "seconds_per_iteration": 2}[claim.quantity]
    name = claim.quantity.replace("_", " ") if claim.is_cost else claim.quantity
    judge = ["", ""]
    if not claim.is_cost:
        judge = [cell(judged, 3, plus=True), verdict(judged, claim.sign)]
    return [
        claim.text,
        claim.figures,
        str(difference.count),
        f"{name} {cell(difference, decimals, plus=True)}",
        verdict(difference, claim.sign),
        *judge,
        comments.get(claim.name, ""),
    ]


# --- the whole ------------------------------------------------------------------------------------


def report(found: Found, comments: Mapping[str, str]) -> str:
    """All tables, with what they were made by and what is missing."""
    return "\n\n".join(_sections(found, comments)) + "\n"


def _sections(found: Found, comments: Mapping[str, str]) -> Iterator[str]:
    yield "# The recipes and the ablations in miniature"
    yield "\n".join(f"- {line}" for line in _about(found))
    yield (
        "Means over seeds ± half the width of their 95% interval (Student's t); differences are "
        "paired by seed, and bold where the interval does not hold 0. The intervals cover the "
        "seeds of training, not the choice of captions and validation noise, which all runs share."
    )
    recipes = _of_group(found, "recipes")
    yield f"## Equal iterations\n\n{scores_table(found, recipes, 'iterations')}"
    yield differences_table(found, recipes, "iterations")
    timed = [*recipes, *_of_group(found, "noise")]
    if values(found, REFERENCE, "time", "seconds"):
        yield (
            f"## Equal time\n\nEach for the {found['budget']:.0f} seconds that MixGRPO's "
            f"{found['settings']['iterations']} iterations take, sampling to update.\n\n"
            f"{scores_table(found, timed, 'time')}"
        )
        yield differences_table(found, timed, "time")
    yield "## Ablations"
    for group, title in ABLATIONS.items():
        names = [
            name for name in _of_group(found, group) if values(found, name, "iterations", "seconds")
        ]
        if names:
            references = dict.fromkeys(found["members"][name]["reference"] for name in names)
            both = [*references, *(name for name in names if name not in references)]
            yield f"### {title}\n\n{scores_table(found, both, 'iterations')}"
            yield differences_table(found, names, "iterations")
    yield f"## The paper and the miniature\n\n{claims_table(found, comments)}"
    if troubles := [*found["missing"], *_errors(found)]:
        yield "## Missing\n\n" + "\n".join(f"- {line}" for line in troubles)


def _of_group(found: Found, group: str) -> list[str]:
    return [name for name, about in found["members"].items() if about["group"] == group]


def _about(found: Found) -> Iterator[str]:
    settings = found["settings"]
    for key in ("hardware", "software", "revision", "command"):
        yield f"{key}: {found[key]}"
    revisions = sorted({point["revision"] for point in found["points"]})
    if revisions not in ([], [found["revision"]]):
        yield f"revisions of the runs: {', '.join(revisions)}"
    yield (
        f"{settings['iterations']} iterations of {settings['prompts']} prompts, learning rate "
        f"{settings['learning_rate']:g} for all, {settings['parallel']} runs at a time with one "
        "thread each; windows move at their recipe's pace, scaled to these iterations"
    )


def _errors(found: Found) -> list[str]:
    return [
        f"{point['member']}, seed {point['seed']}, {point['iterations']} iterations: "
        f"{point['error']}"
        for point in found["points"]
        if "error" in point
    ]
