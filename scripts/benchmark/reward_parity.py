"""Compares the four published rewards with independent implementations of them.

    python scripts/benchmark/reward_parity.py                 # published sizes, random weights
    python scripts/benchmark/reward_parity.py --hpsv2 HPS_v2.1_compressed.pt    # real weights
    python scripts/benchmark/reward_parity.py --small         # the Shapes world's models

HPS-v2.1 and CLIP score are compared with open_clip, PickScore with transformers, and ImageReward
with the package image-reward 1.5, each from PIL images to the score with its own preprocessing. The
rewards score one batch, the other implementations one image at a time. The exit code is 1 if the
scores of images that need no resizing differ. The effects of resizing tensors instead of PIL images
and of bfloat16 are printed as well.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import torch
import transformers
from environment import ROOT, environment, output_file
from oracles import clip, random_weights
from oracles.imagereward import OracleUnavailable, imagereward
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from mixgrpo.files.disk import write_text_whole
from mixgrpo.rewards import build_reward
from mixgrpo.shapes.renderer import render
from mixgrpo.shapes.scenes import draw, split

ORACLES: dict[str, Callable[..., Tensor]] = {
    "hpsv2": clip.hpsv2,
    "clip_score": clip.clip_score,
    "pickscore": clip.pickscore,
    "imagereward": imagereward,
}
EDGES = {"hpsv2": 224, "clip_score": 378, "pickscore": 224, "imagereward": 224}
SMALL = {"clip_score": "clip"}  # its folder, where it is not the name of the reward
SMALL_EDGE = 64
# Heights and widths of the pictures that are resized.
RESIZED = ((512, 512), (640, 448))
# Of the scores where nothing is resized, times 100 for PickScore, which is 100 times a cosine.
TOLERANCE = {"hpsv2": 1e-5, "clip_score": 1e-5, "pickscore": 1e-3, "imagereward": 1e-4}

Options = dict[str, str]


@dataclass(frozen=True)
class Case:
    """A reward and the files that it and its oracle are built from.

    Attributes:
        reward: its name.
        options: of the reward, and of the oracle.
        edge: of the square that its model sees, in pixels.
        weights: where they are from, in words.
    """

    reward: str
    options: Options
    edge: int
    weights: str


@dataclass(frozen=True)
class Agreement:
    """The largest absolute differences from the oracle's scores.

    Attributes:
        spread: standard deviation of the oracle's scores, to compare the differences with.
        same_pixels: of pictures that have the model's size.
        resized: of larger pictures, square and not.
        bfloat16: between our scores in bfloat16 and in float32, of the first.
        seconds: that all of it took.
    """

    reward: str
    weights: str
    spread: float
    same_pixels: float
    resized: float
    bfloat16: float
    seconds: float

    @property
    def agrees(self) -> bool:
        return self.same_pixels <= TOLERANCE[self.reward]


def pictures(count: int, height: int, width: int, seed: int) -> tuple[list[Image.Image], list[str]]:
    """Rendered scenes, enlarged with sharp edges and some grain, and their captions."""
    rng = random.Random(seed)
    scenes = draw(split(test=True), count, rng)
    images = torch.stack([render(scene, rng) for scene in scenes])
    images = interpolate(images, (height, width), mode="nearest-exact")
    grain = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    images = (images + 0.03 * grain).clamp(0, 1)
    return [to_pil_image(image) for image in images], [scene.caption for scene in scenes]


def to_batch(images: Sequence[Image.Image]) -> Tensor:
    """[B, 3, H, W] in [0, 1]."""
    return torch.stack([pil_to_tensor(image) for image in images]).float() / 255


def compare(case: Case, count: int, seed: int, device: torch.device) -> Agreement:
    start = perf_counter()
    shapes = ((case.edge, case.edge), *RESIZED)
    sets = [pictures(count, height, width, seed) for height, width in shapes]
    # One model in memory at a time: the oracle first, then ours in float32, then in bfloat16.
    joined = ([i for images, _ in sets for i in images], [t for _, texts in sets for t in texts])
    expected = ORACLES[case.reward](*joined, **case.options).split(count)
    ours = build_reward(case.reward, case.options, device)
    scores = [ours(to_batch(images), texts).cpu() for images, texts in sets]
    del ours
    low = build_reward(case.reward, {**case.options, "dtype": "bfloat16"}, device)
    low_scores = low(to_batch(sets[0][0]), sets[0][1]).cpu()
    differences = [_largest(a, b) for a, b in zip(scores, expected, strict=True)]
    return Agreement(
        reward=case.reward,
        weights=case.weights,
        spread=torch.cat(expected).std().item(),
        same_pixels=differences[0],
        resized=max(differences[1:]),
        bfloat16=_largest(low_scores, scores[0]),
        seconds=perf_counter() - start,
    )


def _largest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# --- which files ----------------------------------------------------------------------------------


def cases(chosen: argparse.Namespace, scratch: Path) -> Iterator[Case]:
    """One at a time: random weights of the published sizes take gigabytes of the scratch folder."""
    for reward in chosen.rewards:
        edge = SMALL_EDGE if chosen.small else EDGES[reward]
        if chosen.small:
            folder = ROOT / "data" / "shapes" / SMALL.get(reward, reward)
            yield Case(reward, {"model": str(folder)}, edge, "Shapes world")
        elif chosen.files.get(reward):
            yield Case(reward, chosen.files[reward], edge, "published file")
        else:
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                options = getattr(random_weights, reward)(Path(folder), chosen.seed)
                yield Case(reward, options, edge, f"random, seed {chosen.seed}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--rewards", nargs="+", choices=list(ORACLES), help="default: rewards whose files are given"
    )
    add("--small", action="store_true", help="use the reward models of data/shapes")
    add("--hpsv2", type=Path, metavar="FILE", help="HPS_v2.1_compressed.pt")
    add("--clip-score", type=Path, metavar="FILE", help="open_clip_pytorch_model.bin of DFN5B")
    add("--pickscore", type=Path, metavar="FOLDER", help="PickScore_v1")
    add("--pickscore-processor", type=Path, metavar="FOLDER", help="default: --pickscore")
    add("--imagereward", type=Path, metavar="FOLDER", help="ImageReward.pt, med_config, tokenizer")
    add("--images", type=int, default=2, help="images of each of three sizes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--scratch", type=Path, help="folder for random weights, 4 GB; default: the system's")
    add("--json", type=output_file, help="also write the results to this file")
    chosen = parser.parse_args(arguments)
    chosen.files = given_files(chosen)
    missing = [p for p in _paths(chosen) if not p.exists()]
    if missing:
        parser.error(f"there is no {missing[0]}")
    if chosen.small and chosen.files:
        parser.error("--small takes the files of data/shapes: name no others")
    if chosen.images < 2:
        parser.error("--images must be at least 2: a single score has no spread")
    chosen.rewards = chosen.rewards or list(chosen.files) or list(ORACLES)
    return chosen


def _paths(chosen: argparse.Namespace) -> list[Path]:
    names = ("hpsv2", "clip_score", "pickscore", "pickscore_processor", "imagereward")
    return [path for name in names if (path := getattr(chosen, name)) is not None]


def given_files(chosen: argparse.Namespace) -> dict[str, Options]:
    """Reward -> options, of the rewards whose files the command line names."""
    files: dict[str, Options] = {}
    if chosen.hpsv2:
        files["hpsv2"] = {"model": "ViT-H-14", "checkpoint": str(chosen.hpsv2)}
    if chosen.clip_score:
        model = "ViT-H-14-378-quickgelu"
        files["clip_score"] = {"model": model, "checkpoint": str(chosen.clip_score)}
    if chosen.pickscore:
        processor = chosen.pickscore_processor or chosen.pickscore
        files["pickscore"] = {"model": str(chosen.pickscore), "processor": str(processor)}
    if chosen.imagereward:
        files["imagereward"] = {"model": str(chosen.imagereward)}
    return files


# --- what is printed ------------------------------------------------------------------------------

HEADS = ("reward", "weights", "spread", "same pixels", "resized", "bfloat16", "seconds")
ROW = "{:<12} {:<16} {:>10} {:>12} {:>10} {:>10} {:>8}"


def row(found: Agreement) -> str:
    numbers = (found.spread, found.same_pixels, found.resized, found.bfloat16)
    cells = [f"{number:.1e}" for number in numbers]
    verdict = "" if found.agrees else f"   DIFFERENT: more than {TOLERANCE[found.reward]:.0e}"
    return ROW.format(found.reward, found.weights, *cells, f"{found.seconds:.0f}") + verdict


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")  # the libraries' own, of random weights and old settings
    device = torch.device(chosen.device)
    torch.backends.cudnn.allow_tf32 = False  # as in a run
    about = environment(device)
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    print("largest absolute differences from the independent implementation\n")
    print(ROW.format(*HEADS))
    results = []
    for case in cases(chosen, chosen.scratch or Path(tempfile.gettempdir())):
        try:
            results.append(compare(case, chosen.images, chosen.seed, device))
        except OracleUnavailable as error:
            sys.exit(f"{case.reward}: {error}")
        print(row(results[-1]), flush=True)
    if chosen.json:
        found = [asdict(result) for result in results]
        write_text_whole(chosen.json, json.dumps({**about, "results": found}, indent=1) + "\n")
    return 0 if all(result.agrees for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
