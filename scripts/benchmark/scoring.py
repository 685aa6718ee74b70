"""Images per second that each reward scores: one at a time, as published, and in a batch.

python scripts/benchmark/scoring.py             # CPU: the reward models of data/shapes
python scripts/benchmark/scoring.py --full      # published sizes, random weights; default on a GPU
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import transformers
from environment import ROOT, environment, output_file
from oracles import random_weights
from speed import synchronize
from torch import Tensor

from mixgrpo.files.disk import write_text_whole
from mixgrpo.rewards import Reward, build_reward, score

REWARDS = ("hpsv2", "clip_score", "pickscore", "imagereward")
FOLDERS = {"clip_score": "clip"}  # in data/shapes, where it is not the name of the reward
CAPTION = "a red circle left of a blue square on a gray background"


@dataclass(frozen=True)
class Speed:
    """Images per second of both ways, and the largest difference between their scores."""

    reward: str
    one: float
    batched: float
    difference: float

    @property
    def ratio(self) -> float:
        return self.batched / self.one


def measure(name: str, reward: Reward, images: Tensor, repeats: int) -> Speed:
    """Both ways on the same images, after one pass of each that warms up."""
    texts = [CAPTION] * len(images)
    rates, scores = [], []
    for micro_batch in (1, len(images)):
        seconds = []
        for _ in range(repeats + 1):
            start = perf_counter()
            found = score({name: reward}, images, texts, micro_batch)[name]
            synchronize(images.device)
            seconds.append(perf_counter() - start)
        rates.append(len(images) / median(seconds[1:]))
        scores.append(found)
    return Speed(name, *rates, (scores[0] - scores[1]).abs().max().item())


@contextmanager
def built(name: str, chosen: argparse.Namespace) -> Iterator[Reward]:
    """The reward; random weights of the published size are gone from the disk afterwards."""
    with tempfile.TemporaryDirectory(dir=chosen.scratch) as folder:
        if chosen.full:
            options = getattr(random_weights, name)(Path(folder), chosen.seed)
        else:
            options = {"model": str(ROOT / "data" / "shapes" / FOLDERS.get(name, name))}
        yield build_reward(name, {**options, "dtype": chosen.dtype}, chosen.device)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS))
    add("--full", action="store_true", help="published sizes, random weights; default on a GPU")
    add("--images", type=int, default=48, help="images per batch")
    add("--size", type=int, help="height and width of the images; default 64, with --full 512")
    add("--repeats", type=int, default=3, help="timed passes; the median is reported")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    add("--seed", type=int, default=0)
    add("--scratch", type=Path, help="folder for random weights, 2 GB; default: the system's")
    add("--json", type=output_file, help="also write the results to this file")
    chosen = parser.parse_args(arguments)
    if min(chosen.images, chosen.repeats) < 1:
        parser.error("--images and --repeats must be at least 1")
    on_gpu = torch.device(chosen.device).type == "cuda"
    chosen.full = chosen.full or on_gpu
    chosen.dtype = chosen.dtype or ("bfloat16" if on_gpu else "float32")
    chosen.size = chosen.size or (512 if chosen.full else 64)
    return chosen


HEADS = ("reward", "one at a time", "batched", "ratio", "difference")
ROW = "{:<12} {:>14} {:>10} {:>8} {:>11}"


def row(found: Speed) -> str:
    rates = (f"{found.one:.1f}/s", f"{found.batched:.1f}/s", f"{found.ratio:.1f}x")
    return ROW.format(found.reward, *rates, f"{found.difference:.0e}")


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    transformers.logging.disable_progress_bar()
    device = torch.device(chosen.device)
    about = environment(device)
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    kind = "published sizes, random weights" if chosen.full else "models of data/shapes"
    print(f"task: {chosen.images} images of {chosen.size} pixels, {kind}, {chosen.dtype}\n")
    print(ROW.format(*HEADS))
    generator = torch.Generator().manual_seed(chosen.seed)
    images = torch.rand(chosen.images, 3, chosen.size, chosen.size, generator=generator).to(device)
    results = []
    for name in chosen.rewards:
        with built(name, chosen) as reward:
            results.append(measure(name, reward, images, chosen.repeats))
        print(row(results[-1]), flush=True)
    if chosen.json:
        found = [{**asdict(result), "ratio": result.ratio} for result in results]
        write_text_whole(chosen.json, json.dumps({**about, "results": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
