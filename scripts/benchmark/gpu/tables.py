"""The tables of the results, in Markdown; imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu.job import latest
from gpu.parts import PARTS
from mixgrpo.files.json_lines import read_objects

Record = Mapping[str, Any]
Results = Mapping[str, Mapping[str, Record]]  # part -> name -> result
BEGIN, END = "<!-- gpu results: begin -->", "<!-- gpu results: end -->"
NOTHING = "Nothing has been measured on a GPU yet."


def tables(found: Results) -> str:
    """All tables of one card, and what failed or was left out."""
    written = (MAKERS[part.name](found) for part in PARTS if part.name in found)
    blocks = ["\n".join(lines) for lines in written if lines]
    problems = [*failures(found), *left_out(found)]
    if problems:
        blocks.append("\n".join(["What failed or was left out:", "", *problems]))
    return "\n\n".join(blocks) + "\n"


def failures(found: Results) -> list[str]:
    """A line for every part, test or measurement that failed."""
    lines = []
    for part, results in found.items():
        for name, result in results.items():
            if error := result.get("error"):
                said = error.splitlines()[-1] if error.splitlines() else "no output"
                lines.append(f"- {part}, {'' if name == 'ended' else f'{name}, '}failed: {said}")
    return lines


def left_out(found: Results) -> list[str]:
    """A line for everything that did not fit the time, or that a machine cannot show."""
    lines = []
    for part, results in found.items():
        for name, result in results.items():
            if why := result.get("skipped"):
                lines.append(f"- {part}, {name}: {why}")
    return lines


def ceiling(found: Results) -> float | None:
    """The measured TFLOP/s of a bfloat16 matrix product."""
    value = found.get("machine", {}).get("ceiling", {}).get("tflops")
    return float(value) if value else None


def size(found: Results) -> str:
    """Of which models the results are."""
    is_small = found.get("machine", {}).get("machine", {}).get("small")
    return "small models" if is_small else "FLUX.1-dev's size"


# ---- a table for each part


def machine(found: Results) -> list[str]:
    about = found["machine"].get("machine", {})
    name = about.get("card") or about.get("hardware", "unknown")
    versions = ", ".join(
        f"{key} {about[key]}" for key in ("cuda", "driver") if about.get(key) is not None
    )
    lines = [
        f"**{name}**, {about.get('software', '')}{f', {versions}' if versions else ''}; revision "
        f"{about.get('revision', 'unknown')[:12]}",
        "",
    ]
    rows = []
    for key, result in found["machine"].items():
        if key.startswith("product ") and "tflops" in result:
            rows.append((key.replace("product ", "bfloat16 product, "), rate(result["tflops"])))
    if copied := found["machine"].get("copy", {}).get("gb_per_second"):
        rows.append(("copy within the memory", f"{copied:.0f} GB/s"))
    if context := about.get("context_gib"):
        rows.append(("memory that CUDA takes", f"{context:.2f} GiB"))
    return [*lines, *table(("", "measured"), rows)]


def right(found: Results) -> list[str]:
    tests = {name: r for name, r in found["right"].items() if "outcome" in r}
    passed = sum(result["outcome"] == "passed" for result in tests.values())
    seconds = sum(result["seconds"] for result in tests.values())
    return [f"Tests on the device: {passed} of {len(tests)} passed in {seconds:.0f} s."]


def iterations(part: str) -> Callable[[Results], list[str]]:
    """The table of whole iterations, those of ``lora`` or ``full``."""

    def make(found: Results) -> list[str]:
        top = ceiling(found)
        done = [r for r in found[part].values() if "seconds" in r and "variant" in r]
        # Eager, as published; of as many images as were measured.
        published: dict[int, Record] = {}
        for r in sorted(done, key=lambda r: r["images"]):
            if r["variant"] == "published" and r["compile"] == "off":
                published[r["steps"]] = r
        rows = [iteration_row(r, top, published.get(r["steps"])) for r in done]
        if not rows:
            return []
        heads = (
            *("", "images", "rollout + decoding + update", "of it optimizer"),
            *(f"s per iteration of {done[0]['of']}", "evaluations per image", "TFLOP/s"),
            *("of ceiling", "peak memory", "faster"),
        )
        titles = {"lora": "LoRA", "full": "All weights trained"}
        title = f"{titles[part]}, {size(found)}, seconds (in brackets: from fewer images):"
        return [title, "", *table(heads, rows)]

    return make


def iteration_row(result: Record, top: float | None, published: Record | None) -> Sequence[str]:
    seconds, images = result["seconds"], result["images"]
    phases = " + ".join(f"{seconds[p]:.2f}" for p in ("rollout", "decode", "update"))
    compiled = "" if result["compile"] == "off" else f", {result['compile']}"
    evaluations = result["evaluations"]
    held = result["memory_gib"].get("allocated")
    whole = iteration_seconds(result)
    before = iteration_seconds(published) if published else None
    return (
        f"{result['variant']}{compiled}, {result['steps']} steps",
        str(images),
        f"{phases} = {seconds['total']:.2f}",
        f"{seconds['optimizer']:.2f}",
        f"{whole:.2f}" if images == result["of"] else f"({whole:.2f})",
        f"{evaluations['rollout']:.2f} + {evaluations['update']:.2f}",
        rate(result["tflops"]),
        share(result["tflops"], top),
        f"{held:.1f} GiB" if held else "-",
        f"{before / whole:.2f}x" if before else "-",
    )


def iteration_seconds(result: Record) -> float:
    """Seconds of an iteration of all images, if fewer were measured: all but the optimizer's steps,
    which are as many, takes as many times as long."""
    seconds = result["seconds"]
    rest = seconds["total"] - seconds["optimizer"]
    return float(rest * result["of"] / result["images"] + seconds["optimizer"])


def evaluation(found: Results) -> list[str]:
    top, results = ceiling(found), found["evaluation"]
    rows = [
        (
            name,
            f"{r['seconds'] * 1000:.1f} ms",
            rate(r["tflops"]),
            share(r["tflops"], top),
            f"{r['memory_gib']:.1f} GiB" if r.get("memory_gib") else "-",
            f"{r['gradients_change']:.1e}" if r.get("gradients_change") is not None else "-",
        )
        for name, r in results.items()
        if "backend" in r
    ]
    heads = ("", "for one image", "TFLOP/s", "of ceiling", "peak memory", "gradients change")
    lines = ["One evaluation, LoRA:", "", *table(heads, rows)] if rows else []
    kinds = {name: r for name, r in results.items() if "milliseconds" in r}
    if kinds:
        lines += ["", "Where an evaluation's time goes:", ""]
        lines += table(("", "milliseconds", "GPU busy"), [profile_row(*k) for k in kinds.items()])
    return lines


def profile_row(name: str, result: Record) -> Sequence[str]:
    spent = ", ".join(f"{kind} {value:.1f}" for kind, value in result["milliseconds"].items())
    busy = f"{result['busy']:.0%}" if result.get("busy") else "-"
    return (name.removeprefix("profile, "), spent, busy)


def rewards(found: Results) -> list[str]:
    results = found["rewards"]
    rows = [
        (
            name,
            f"{r['one_per_second']:.1f}/s",
            f"{r['batched_per_second']:.1f}/s",
            f"{r['batched_per_second'] / r['one_per_second']:.1f}x",
            f"{r['loading_seconds']:.1f} s",
        )
        for name, r in results.items()
        if "one_per_second" in r
    ]
    heads = ("reward", "one at a time", "batched", "faster", "loading")
    lines = ["Rewards, images per second:", "", *table(heads, rows)] if rows else []
    hidden = results.get("hidden by a rollout", {})
    if "rollout_seconds" in hidden:
        lines += [
            "",
            f"A rollout of {hidden['rollout_seconds']:.2f} s takes "
            f"{hidden['together_seconds']:.2f} s with three rewards beside it. They were busy for "
            f"{hidden['scoring_seconds']:.2f} s, {hidden['waited_seconds']:.2f} s of it after the "
            "rollout.",
        ]
    return lines


def outside(found: Results) -> list[str]:
    rows = [
        (
            name,
            f"{r['seconds_per_evaluation'] * 1000:.1f} ms",
            f"{r['rollout_seconds']:.2f} s",
            f"{r['distance']:.1e}",
            f"{r['memory_gib']:.1f} GiB" if r.get("memory_gib") else "-",
        )
        for name, r in found["outside"].items()
        if "rollout_seconds" in r
    ]
    heads = ("", "evaluation, one image", "rollout", "distance of the latents", "peak memory")
    return ["Steps outside the window, Flash, compiled:", "", *table(heads, rows)] if rows else []


def shapes(found: Results) -> list[str]:
    rows = [
        (
            name,
            f"{r['seconds_per_iteration']:.2f}" if r.get("seconds_per_iteration") else "-",
            f"{r['all_right']:.3f}" if r.get("all_right") is not None else "-",
        )
        for name, r in found["shapes"].items()
        if "seconds_per_iteration" in r
    ]
    heads = ("run", "s per iteration", "all_right")
    return ["The Shapes family:", "", *table(heads, rows)] if rows else []


def plan(found: Results) -> list[str]:
    rows = []
    for name, r in found["plan"].items():
        if "planned_gib" not in r:
            continue
        measured = r.get("measured_gib")
        error = f"{r['planned_gib'] / measured - 1:+.0%}" if measured else "-"
        rows.append(
            (
                name,
                f"{r['planned_gib']:.1f} GiB",
                f"{measured:.1f} GiB" if measured else "-",
                error,
                f"{r['reserved_gib']:.1f} GiB" if r.get("reserved_gib") else "-",
                f"{r['planned_seconds']:.1f} s",
                f"{r['measured_seconds']:.1f} s",
                f"{r['planned_seconds'] / r['measured_seconds'] - 1:+.0%}",
            )
        )
    heads = (
        *("", "planned memory", "measured", "error", "reserved", "planned time", "measured"),
        "error",
    )
    return ["The plan and what was measured:", "", *table(heads, rows)] if rows else []


MAKERS: dict[str, Callable[[Results], list[str]]] = {
    "machine": machine,
    "right": right,
    "lora": iterations("lora"),
    "full": iterations("full"),
    "evaluation": evaluation,
    "rewards": rewards,
    "outside": outside,
    "shapes": shapes,
    "plan": plan,
}


# ---- as text


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def rate(tflops: float) -> str:
    return f"{tflops:.3g}"


def share(tflops: float, top: float | None) -> str:
    return f"{tflops / top:.0%}" if top else "-"


# ---- in the README


def report(folder: Path) -> str:
    """The tables of every card whose results are kept in the folder."""
    cards = [tables(latest(read_objects(path))) for path in sorted(folder.glob("*.jsonl"))]
    return "\n".join(cards).strip() or NOTHING


def write_readme(readme: Path, folder: Path) -> None:
    """Replaces what is between the marks in the README by the tables of the kept results."""
    text, marks = readme.read_text(), re.compile(f"{BEGIN}.*?{END}", re.DOTALL)
    if not marks.search(text):
        raise SystemExit(f"error: {readme} has no marks {BEGIN} and {END}")
    readme.write_text(marks.sub(lambda _: f"{BEGIN}\n{report(folder)}\n{END}", text))
