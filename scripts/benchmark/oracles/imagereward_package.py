"""Runs image-reward 1.5 itself. ``oracles.imagereward`` starts it with that package's own folder.

    python imagereward_package.py JOBS.json RESULTS.json

Every job names a ``model`` folder (``med_config.json``, ``vision_config.json`` for other sizes than
the published ones, the tokenizer's ``vocab.txt``) and what to ``do``, see ``JOBS``.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor, nn

# The package's training loop, which its __init__ imports: half of its requirements, no part of a
# score. Everything else is imported as it is.
sys.modules["ImageReward.ReFL"] = ModuleType("ImageReward.ReFL")
package = importlib.import_module("ImageReward.ImageReward")
blip = importlib.import_module("ImageReward.models.BLIP.blip")
pretrain = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")

Job = dict[str, Any]


def build(folder: Path, tokenizer: Path) -> nn.Module:
    """The package's model with its own random weights; at other sizes if the folder has them."""
    med = folder / "med_config.json"
    sizes = folder / "vision_config.json"
    load = blip.BertTokenizer.from_pretrained
    with ExitStack() as replaced:

        def replace(module: object, name: str, value: Any) -> None:
            replaced.enter_context(mock.patch.object(module, name, value))

        # The package asks for bert-base-uncased by name, over the network.
        replace(blip.BertTokenizer, "from_pretrained", lambda name: load(str(tokenizer)))
        if sizes.is_file():
            vision = json.loads(sizes.read_text())
            hidden = json.loads(med.read_text())["hidden_size"]
            transform, mlp = package._transform, package.MLP
            # The sizes that its constructor states as numbers: 224, "large" and 768.
            replace(pretrain, "create_vit", lambda *published: small_vit(vision))
            replace(package, "_transform", lambda published: transform(vision["image_size"]))
            replace(package, "MLP", lambda published: mlp(hidden))
        return package.ImageReward(med_config=str(med)).eval()


def small_vit(vision: dict[str, int]) -> tuple[nn.Module, int]:
    vit = blip.VisionTransformer(
        img_size=vision["image_size"],
        patch_size=vision["patch_size"],
        embed_dim=vision["width"],
        depth=vision["depth"],
        num_heads=vision["heads"],
    )
    return vit, vision["width"]


@torch.no_grad()
def score(job: Job) -> list[float]:
    """The package's score of every image file and text, with the checkpoint's weights."""
    model = build(Path(job["model"]), Path(job["tokenizer"]))
    state = torch.load(job["checkpoint"], map_location="cpu", weights_only=True)
    lacks, more = model.load_state_dict(state, strict=False)
    # Of the published file the buffer `position_ids` alone; of a checkpoint trained here what the
    # score does not use.
    used = [name for name in lacks if not name.startswith(("blip.vision_proj", "blip.text_proj"))]
    foreign = [name for name in (*used, *more) if not name.endswith("position_ids")]
    assert not foreign, f"{job['checkpoint']} is not image-reward's: {foreign[:3]}"
    pairs = zip(job["images"], job["texts"], strict=True)
    return [model.score(text, Image.open(image)) for image, text in pairs]


def weights(job: Job) -> list[str]:
    """Writes the package's model with seeded random weights to ``checkpoint``; their names."""
    torch.manual_seed(job["seed"])
    state = build(Path(job["model"]), Path(job["tokenizer"])).state_dict()
    for value in state.values():
        shake(value)
    torch.save(state, job["checkpoint"])
    return list(state)


def shake(value: Tensor) -> None:
    """Disturbs a weight: fresh biases are all 0, and a fresh head scores everything alike."""
    if value.is_floating_point():
        value.add_(0.15 * torch.randn_like(value))


def names(job: Job) -> dict[str, list[int]]:
    """Every name in the model's state dict and its shape; no memory is spent on weights."""
    on_cpu = partial(torch.linspace, device="cpu")  # the package reads numbers off this one
    with torch.device("meta"), mock.patch.object(torch, "linspace", on_cpu):
        state = build(Path(job["model"]), Path(job["tokenizer"])).state_dict()
    return {name: list(value.shape) for name, value in state.items()}


JOBS: dict[str, Callable[[Job], Any]] = {"score": score, "weights": weights, "names": names}


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([JOBS[job["do"]](job) for job in jobs]))
