"""Checks that every engine, with any number of processes, trains like a single process.

    python scripts/benchmark/engines.py --processes 2 4 --iterations 4

Trains a recipe with one process, and then with each engine and each number of processes, with full
weights and with LoRA, on the same global batch, prompts, noise and windows. The table shows the
largest differences from one process. Weights differ by rounding: their final distance is reported
as a fraction of the distance by which training moved them. Options that are not listed here are
passed to the training. The exit code is 1 if a difference exceeds its tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from environment import ROOT, environment, output_file
from torch import Tensor
from trainings import finish, prepare

from mixgrpo.assembly import make_policy
from mixgrpo.checkpoint import Shards, latest
from mixgrpo.commands.train import parse
from mixgrpo.files.disk import write_text_whole
from mixgrpo.run.tracking import read_metrics

ENGINES = {
    "ddp": ("--engine.kind", "ddp"),
    "fsdp": ("--engine.kind", "fsdp"),
    "zero2": ("--engine.kind", "deepspeed", "--engine.zero_stage", "2"),
    "zero3": ("--engine.kind", "deepspeed", "--engine.zero_stage", "3"),
}
TRAINED = {"full": (), "lora": ("--model.train", "lora", "--model.lora_rank", "8")}
Weights = Mapping[str, Tensor]
Records = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Apart:
    """The largest differences from one process.

    Attributes:
        loss: absolute; the term of a sample has the magnitude of its advantage, about 1.
        grad_norm: relative to its mean.
        reward: difference of the iterations' mean rewards, relative to their mean magnitude.
        weights: final distance, relative to the distance from the untrained weights.
    """

    loss: float
    grad_norm: float
    reward: float
    weights: float

    def is_within(self, limit: Apart) -> bool:
        return all(value <= asdict(limit)[name] for name, value in asdict(self).items())


# Rounding differences in an image change its scores by far less than images differ; four optimizer
# steps per iteration propagate them.
LIMIT = Apart(loss=1e-6, grad_norm=1e-4, reward=1e-4, weights=1e-3)


@dataclass(frozen=True)
class Run:
    """The results of a training that are compared."""

    records: Records
    weights: Weights

    @classmethod
    def read(cls, folder: Path) -> Run:
        newest = latest(folder / "checkpoints")
        assert newest is not None
        records = [record for record in read_metrics(folder) if "update/loss" in record]
        return cls(records, Shards(newest).whole("model"))


def apart(run: Run, one: Run, untrained: Weights) -> Apart:
    """Compares a run with the run of one process."""
    assert len(run.records) == len(one.records) > 0
    pairs = list(zip(run.records, one.records, strict=True))

    def largest(metric: str) -> float:
        return max(abs(ours[metric] - theirs[metric]) for ours, theirs in pairs)

    def size(metric: str) -> float:
        return fmean(abs(record[metric]) for record in one.records)

    rewards = [metric for metric in one.records[0] if metric.startswith("reward/")]
    return Apart(
        loss=largest("update/loss"),
        grad_norm=largest("update/grad_norm") / size("update/grad_norm"),
        reward=max(largest(metric) / size(metric) for metric in rewards),
        weights=distance(run.weights, one.weights) / distance(one.weights, untrained),
    )


def distance(first: Weights, second: Weights) -> float:
    """Euclidean distance over the weights of the first; KeyError if the second lacks one."""
    squares = ((first[name] - second[name]).double().square().sum() for name in first)
    return float(sum(squares, torch.zeros((), dtype=torch.float64)).sqrt())


def untrained_weights(words: Sequence[str]) -> Weights:
    """The trained parameters before the first step."""
    module = make_policy(parse(words), torch.device("cpu")).module
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def knobs(folder: Path, given: argparse.Namespace, more: Sequence[str]) -> list[str]:
    """The training's command line: one thread, no validation, no plots, no W&B."""
    return [
        *("--recipe", given.recipe, "--run.folder", str(folder)),
        *("--run.iterations", str(given.iterations), "--run.threads", "1"),
        *("--validation.every", "0", "--validation.prompts", "2", "--validation.pictures", "0"),
        *("--validation.before", "false", "--validation.steps", "2"),
        *("--checkpoint.every", "0", "--log.wandb", "disabled", "--log.progress", "false"),
        *more,
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    given, more = _parse(arguments)
    for key, value in environment(torch.device("cpu")).items():
        print(f"{key}: {value}")
    title = f"{given.recipe}, {given.iterations} iterations {' '.join(more)}".strip()
    print(f"\n{title}; largest difference from one process:\n")
    print("| trained | engine | processes | loss | gradient norm | rewards | weights |")
    print("|---|---|---|---|---|---|---|")
    found = []
    with tempfile.TemporaryDirectory(dir=given.folder) as root:
        try:
            for trained in given.trained:
                found += _compare(Path(root), trained, given, [*TRAINED[trained], *more])
        except RuntimeError as error:
            sys.exit(f"error: {error}")
    if given.json:
        write_text_whole(
            given.json, json.dumps({**environment(torch.device("cpu")), "runs": found})
        )
    good = all(row["within"] for row in found)
    print(f"\ntolerances: {asdict(LIMIT)}: {'all within' if good else 'NOT all within'}")
    return 0 if good else 1


def _compare(
    root: Path, trained: str, given: argparse.Namespace, more: Sequence[str]
) -> list[dict[str, object]]:
    alone = knobs(root / trained, given, more)
    finish(alone, 1, root / "log.txt")
    one, untrained = Run.read(root / trained), untrained_weights(alone)
    found: list[dict[str, object]] = []
    for engine in given.engines:
        for count in given.processes:
            folder = root / f"{trained}_{engine}_{count}"
            finish(knobs(folder, given, [*ENGINES[engine], *more]), count, root / "log.txt")
            difference = apart(Run.read(folder), one, untrained)
            about = {"trained": trained, "engine": engine, "processes": count}
            numbers = asdict(difference)
            found.append({**about, **numbers, "within": difference.is_within(LIMIT)})
            cells = [*map(str, about.values()), *(f"{value:.1e}" for value in numbers.values())]
            print(f"| {' | '.join(cells)} |", flush=True)
    return found


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="shapes_mixgrpo")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--trained", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument(
        "--folder", type=Path, help="where runs are written and removed; default: /tmp"
    )
    parser.add_argument("--json", type=output_file, help="also write the differences to this file")
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    prepare()
    os.chdir(ROOT)
    sys.exit(main())
