"""Trains one recipe with several seeds; prints and saves every validation score before and after.

    python scripts/benchmark/seeds.py --seeds 1 2 3 4 5 --parallel 2 [--section.knob VALUE ...]

Runs that already have results are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from environment import output_file

from mixgrpo.files.disk import write_text_whole
from mixgrpo.run.tracking import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", default="shapes_mixgrpo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--parallel", type=int, default=1, help="number of concurrent runs")
    parser.add_argument("--json", type=output_file, help="file for the results")
    chosen, overrides = parser.parse_known_args()
    with ThreadPoolExecutor(chosen.parallel) as pool:
        results = list(pool.map(lambda seed: train(chosen, seed, overrides), chosen.seeds))
    print(table(results))
    if chosen.json:
        write_text_whole(chosen.json, json.dumps(results, indent=1) + "\n")


def train(chosen: argparse.Namespace, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Runs one seed, unless its metrics exist already; returns its scores."""
    folder = chosen.folder / f"seed_{seed}"
    if not (folder / "rewards.png").exists():
        threads = max(1, (os.cpu_count() or 1) // chosen.parallel)
        subprocess.run(
            [
                *(sys.executable, "-m", "mixgrpo", "train", "--recipe", chosen.recipe),
                *("--run.folder", str(folder), "--run.seed", str(seed)),
                *("--run.threads", str(threads), "--log.progress", "false"),
                *overrides,
            ],
            check=True,
        )
    validations = [
        record
        for record in read_metrics(folder)
        if any(key.startswith("validation/") for key in record)
    ]
    return {"seed": seed, "before": scores(validations[0]), "after": scores(validations[-1])}


def scores(record: dict[str, Any]) -> dict[str, float]:
    """A validation's scores by name; those with the averaged weights end in ``_ema``."""
    plain = {k.split("/")[1]: v for k, v in record.items() if k.startswith("validation/")}
    average = {
        k.split("/")[1] + "_ema": v for k, v in record.items() if k.startswith("validation_ema/")
    }
    return {**plain, **average}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: before, each seed's after, mean change with its standard deviation."""
    seeds = " | ".join(f"seed {result['seed']}" for result in results)
    lines = [
        f"| validation | before | {seeds} | mean change | std |",
        "|---" * (len(results) + 4) + "|",
    ]
    for name in results[0]["after"]:
        before = [result["before"].get(name.removesuffix("_ema")) for result in results]
        after = [result["after"][name] for result in results]
        change = [b - a for a, b in zip(before, after, strict=True)]
        cells = " | ".join(f"{value:.3f}" for value in after)
        spread = statistics.stdev(change) if len(change) > 1 else 0.0
        mean = statistics.mean(change)
        lines.append(f"| {name} | {before[0]:.3f} | {cells} | {mean:+.3f} | {spread:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
