"""Trains the small reward models, each in the file format of the reward that it replaces.

Every batch pairs a scene with one that differs in a single fact, so that only a model that reads
colours, shapes and relations can distinguish them, and with an interpolated image, which is worse
than the neat one for the same caption. The four models differ in seed and kind; none of them is
trained on the judge.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from mixgrpo.rewards.imagereward import VisionSize, to_imagereward_keys
from mixgrpo.rewards.imagereward_model import ImageRewardModel
from mixgrpo.rewards.images import OPENAI_MEAN, OPENAI_STD, normalise
from mixgrpo.shapes.architecture import TEXT_LENGTH, clip_text_sizes, clip_words
from mixgrpo.shapes.fitting import fit
from mixgrpo.shapes.renderer import SIZE, render, render_between
from mixgrpo.shapes.scenes import LOOKS, VOCABULARY, Scene, alter, draw, split

PAIRS = 48
PATCH = 16
WIDTH = 128
DEPTH = 3
PLAY = 0.4  # how much sizes and places vary
LEARNING_RATE = 1e-3

_INPUTS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Pairs:
    """A batch of scenes and altered scenes.

    Attributes:
        images: [3N, 3, 64, 64]: the N scenes, the N altered ones, and the N scenes drawn badly.
        captions: the 2N captions of the first 2N images.
    """

    images: Tensor
    captions: list[str]

    @property
    def count(self) -> int:
        return len(self.captions) // 2


def pairs(steps: int, seed: int) -> Iterator[Pairs]:
    """Batches of rendered pairs, degraded in the way a decoder degrades images."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    scenes = split(test=False)
    for _ in range(steps):
        drawn: list[Scene] = draw(scenes, PAIRS, rng)
        bad = [
            render_between(scene, alter(scene, rng, LOOKS), rng.uniform(0.25, 0.6), rng, PLAY)
            for scene in drawn
        ]
        drawn += [alter(scene, rng) for scene in drawn]
        images = torch.stack([render(scene, rng, PLAY) for scene in drawn] + bad)
        yield Pairs(_roughen(images, generator), [scene.caption for scene in drawn])


def _roughen(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blurs half of the images and adds a little noise and tint to all of them."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(chosen, blurred, images)
    tint = 0.03 * torch.randn(len(images), 3, 1, 1, generator=generator)
    noise = 0.03 * torch.randn(images.shape, generator=generator)
    return (images + tint + noise).clamp(0, 1)


def train_open_clip(folder: Path, steps: int, seed: int) -> None:
    """Trains an open_clip model, saved in the format that HPS-v2.1 and CLIP score load."""
    torch.manual_seed(seed)
    tokenizer = clip_words()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config = _open_clip_config(len(tokenizer))
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    model: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")

    def loss(batch: Pairs, pixels: Tensor) -> Tensor:
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(tokenize(batch.captions), normalize=True)
        return contrastive(model.logit_scale.exp() * image @ text.T, batch.captions)

    _fit(model, loss, steps, seed, folder.name)
    _save(model.state_dict(), folder / "open_clip_model.safetensors")


def train_pickscore(folder: Path, steps: int, seed: int) -> None:
    """Trains a transformers CLIP, saved with its processor in the format that PickScore loads."""
    torch.manual_seed(seed)
    tokenizer = clip_words()
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": WIDTH // 32,
        "image_size": SIZE,
        "patch_size": PATCH,
    }
    text = clip_text_sizes(tokenizer, WIDTH)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))

    def loss(batch: Pairs, pixels: Tensor) -> Tensor:
        ids = _tokens(tokenizer, batch.captions)["input_ids"]
        out = model(input_ids=ids, pixel_values=pixels)
        return contrastive(out.logits_per_image, batch.captions)

    _fit(model, loss, steps, seed, folder.name)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    ).save_pretrained(folder)


def train_imagereward(folder: Path, steps: int, seed: int) -> None:
    """Trains a BLIP with a score head on comparisons, saved under ImageReward's key names."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *VOCABULARY]) + "\n", encoding="utf-8")
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"))
    text = {
        "vocab_size": len(special) + len(VOCABULARY),
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": WIDTH // 32,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "encoder_width": WIDTH,
        "add_cross_attention": True,
    }
    vision = {
        "image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "depth": DEPTH,
        "heads": WIDTH // 32,
    }  # fmt: skip
    (folder / "med_config.json").write_text(json.dumps(text, indent=1), encoding="utf-8")
    (folder / "vision_config.json").write_text(json.dumps(vision, indent=1), encoding="utf-8")
    model = ImageRewardModel(VisionSize(**vision), text)

    def loss(batch: Pairs, pixels: Tensor) -> Tensor:
        tokens = _tokens(tokenizer, batch.captions)
        patches = model.vision(pixel_values=pixels).last_hidden_state
        patches, bad = patches.tensor_split([len(batch.captions)])
        # Each image with its own text, the altered one's, and some of other images: the latter are
        # easy to distinguish and start the learning.
        shifts = (0, batch.count, 1, 7)
        scores = [
            model.read(patches, *(tokens[name].roll(shift, 0) for name in _INPUTS))
            for shift in shifts
        ]
        by_text = [score.roll(-shift) for score, shift in zip(scores, shifts, strict=True)]
        own = torch.zeros(len(batch.captions), dtype=torch.long)
        told_apart = [F.cross_entropy(torch.stack(s, 1), own) for s in (scores, by_text)]
        neater = scores[0][: batch.count] - model.read(
            bad, *(tokens[name][: batch.count] for name in _INPUTS)
        )
        return sum(told_apart) / 2 - F.logsigmoid(neater).mean()

    _fit(model, loss, steps, seed, folder.name)
    _save(to_imagereward_keys(model.state_dict()), folder / "ImageReward.safetensors")


def contrastive(logits: Tensor, captions: list[str]) -> Tensor:
    """Symmetric cross-entropy of logits [3N, 2N] of images and texts.

    Other images of the same caption are not negatives; badly drawn ones are, for their caption.
    """
    count = len(captions)
    same = torch.tensor([[a == b for b in captions] for a in captions])
    neat = logits[:count].masked_fill(same & ~torch.eye(count, dtype=torch.bool), -torch.inf)
    target = torch.arange(count)
    by_text = F.cross_entropy(torch.cat([neat, logits[count:]]).T, target)
    return (F.cross_entropy(neat, target) + by_text) / 2


def _fit(
    model: nn.Module, loss: Callable[[Pairs, Tensor], Tensor], steps: int, seed: int, name: str
) -> None:
    batches = pairs(steps, seed)

    def next_loss(step: int) -> Tensor:
        batch = next(batches)
        return loss(batch, normalise(batch.images, OPENAI_MEAN, OPENAI_STD))

    fit(model, next_loss, steps, LEARNING_RATE, name, decay=0.02, warmup=0.1)


def _tokens(tokenizer: Any, captions: list[str]) -> dict[str, Tensor]:
    return dict(
        tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    )


def _open_clip_config(vocabulary: int) -> dict[str, Any]:
    return {
        "model_cfg": {
            "embed_dim": WIDTH,
            "vision_cfg": {
                "image_size": SIZE,
                "layers": DEPTH,
                "width": WIDTH,
                "head_width": 32,
                "patch_size": PATCH,
            },
            "text_cfg": {
                "context_length": TEXT_LENGTH,
                "vocab_size": vocabulary,
                "width": WIDTH,
                "heads": WIDTH // 32,
                "layers": 2,
                "hf_tokenizer_name": "in this folder",
            },
        },
        "preprocess_cfg": {"mean": list(OPENAI_MEAN), "std": list(OPENAI_STD)},
    }


def _save(state: dict[str, Tensor], path: Path) -> None:
    """Saves float32 weights as float16: half the size, without a measurable change in scores."""
    save_file({name: value.contiguous().half() for name, value in state.items()}, path)
