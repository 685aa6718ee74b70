"""Each published reward against an independent path from PIL images to the score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize
from torchvision import transforms

from mixgrpo.rewards import build_reward
from mixgrpo.rewards.images import OPENAI_MEAN, OPENAI_STD

from . import tiny
from .blip_oracle import Blip

Folders = dict[str, Path]
NAMES = ["hpsv2", "clip_score", "pickscore", "imagereward"]


def open_clip_score(folder: Path, pixels: Tensor, texts: Sequence[str]) -> Tensor:
    """open_clip loads the folder by itself; its own encoders and tokenizer."""
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(list(texts))
    image = model.encode_image(pixels, normalize=True)
    return (image @ model.encode_text(tokens, normalize=True).T).diagonal()


def hps_on_pil(folder: Path, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
    """The longer edge to the model's size, centred on black, by PIL alone."""
    squares = []
    for image in images:
        scale = tiny.SIZE / max(image.size)
        small = image.resize([round(e * scale) for e in image.size], Image.Resampling.BICUBIC)
        square = Image.new("RGB", (tiny.SIZE, tiny.SIZE))
        square.paste(small, tuple((tiny.SIZE - edge) // 2 for edge in small.size))
        squares.append(square)
    preprocess = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])]
    )
    return open_clip_score(folder, torch.stack([preprocess(s) for s in squares]), texts)


def clip_on_pil(folder: Path, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
    """open_clip's own preprocessing of the folder."""
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return open_clip_score(folder, torch.stack([preprocess(i) for i in images]), texts)


def pickscore_on_pil(folder: Path, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
    """transformers' processor and CLIPModel.forward, whose logits are the score."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor

    processor = CLIPProcessor(
        CLIPImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    )
    inputs = processor(
        text=list(texts), images=list(images), return_tensors="pt", padding=True, truncation=True,
        max_length=16,
    )  # fmt: skip
    inputs.pop("token_type_ids", None)
    return CLIPModel.from_pretrained(folder).eval()(**inputs).logits_per_image.diagonal()


def imagereward_on_pil(folder: Path, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
    """torchvision's transforms on PIL, WordPiece by hand, a plain forward pass."""
    preprocess = transforms.Compose(
        [
            transforms.Resize(tiny.SIZE, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(tiny.SIZE),
            transforms.ToTensor(),
            transforms.Normalize(OPENAI_MEAN, OPENAI_STD),
        ]
    )
    pixels = torch.stack([preprocess(image) for image in images])
    ids = torch.tensor([word_pieces(text) for text in texts])
    state = load_file(folder / "ImageReward.safetensors")
    raw = Blip(state, tiny.VISION["heads"], tiny.HEADS)(pixels, ids, (ids != 0).long())
    return (raw - 0.16717362830052426) / 1.0333394966054072


def word_pieces(text: str) -> list[int]:
    """[CLS] words [SEP] and padding to 35; a plural is its word and ##s."""
    index = {piece: position for position, piece in enumerate(tiny.PIECES)}
    ids = []
    for word in text.lower().split():
        pieces = [word] if word in index else [word.removesuffix("s"), "##s"]
        ids += [index[piece] for piece in pieces]
    ids = [index["[CLS]"], *ids[:33], index["[SEP]"]]
    return ids + [0] * (35 - len(ids))


ORACLES: dict[str, Callable[..., Tensor]] = {
    "hpsv2": hps_on_pil,
    "clip_score": clip_on_pil,
    "pickscore": pickscore_on_pil,
    "imagereward": imagereward_on_pil,
}
# What PIL's rounding to 8 bits changes, at least twice the measured difference.
ROUNDING = {"hpsv2": 2e-3, "clip_score": 2e-3, "pickscore": 2e-2, "imagereward": 1e-3}
# Long enough to be cut at 16 and at 35 tokens.
TEXTS = [*tiny.TEXTS, " ".join(["a red circle above a green square on gray"] * 5)]


def build(name: str, folders: Folders, **options: Any) -> Any:
    return build_reward(name, {"model": str(folders[name]), **options})


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (96, 61), (64, 70)])
def test_score_is_the_published_path_s(name: str, shape: tuple[int, int], folders: Folders) -> None:
    images = tiny.images(len(TEXTS), *shape)
    scores = build(name, folders)(images, TEXTS)
    expected = ORACLES[name](folders[name], [tiny.to_pil(image) for image in images], TEXTS)
    assert scores.dtype == torch.float32 and scores.shape == (len(TEXTS),)
    # Nothing is resized at 32x32, so there the two paths do the same arithmetic.
    tolerance = 2e-5 if shape == (32, 32) else ROUNDING[name]
    torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)
    # The tolerance would not hide a mix-up of samples: they differ by far more.
    assert scores.std() > 3 * tolerance


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_scores_as_its_samples_do_alone(name: str, folders: Folders) -> None:
    reward, images = build(name, folders), tiny.images(len(TEXTS), 40, 48)
    alone = [reward(images[i : i + 1], TEXTS[i : i + 1]) for i in range(len(TEXTS))]
    torch.testing.assert_close(reward(images, TEXTS), torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_text_and_image_both_count(name: str, folders: Folders) -> None:
    reward, images = build(name, folders), tiny.images(2, 32, 32)
    base = reward(images, TEXTS[:2])
    assert (base - reward(images, TEXTS[1::-1])).abs().min() > 1e-5
    assert (base - reward(images.flip(0), TEXTS[:2])).abs().min() > 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_is_close_and_returns_float32(
    name: str, dtype: str, folders: Folders
) -> None:
    images = tiny.images(len(TEXTS), 64, 64)
    full = build(name, folders)(images, TEXTS)
    low = build(name, folders, dtype=dtype)(images, TEXTS)
    assert low.dtype == torch.float32
    assert not torch.equal(low, full)
    tolerance = 0.5 if name == "pickscore" else 0.03
    torch.testing.assert_close(low, full, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_dtype(name: str, folders: Folders) -> None:
    with pytest.raises(ValueError, match="float32, bfloat16, float16, got 'fp8'"):
        build(name, folders, dtype="fp8")


@torch.no_grad()
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_clip_score_follows_the_folder_s_preprocessing(
    resize_mode: str, interpolation: str, tmp_path: Path
) -> None:
    settings = {"resize_mode": resize_mode, "interpolation": interpolation, "fill_color": 128}
    folder = tiny.open_clip_folder(tmp_path / "clip", **settings)
    images = tiny.images(len(TEXTS), 96, 61)
    scores = build_reward("clip_score", {"model": str(folder)})(images, TEXTS)
    expected = clip_on_pil(folder, [tiny.to_pil(image) for image in images], TEXTS)
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-3)


def test_pickscore_shift_and_scale(folders: Folders) -> None:
    images = tiny.images(2, 32, 32)
    plain = build("pickscore", folders)(images, TEXTS[:2])
    mixed = build("pickscore", folders, shift=18.0, scale=8.0)(images, TEXTS[:2])
    torch.testing.assert_close(mixed, (plain - 18) / 8)
    with pytest.raises(ValueError, match="scale divides"):
        build("pickscore", folders, scale=0.0)


def test_features_are_normalised_before_the_product(folders: Folders) -> None:
    clip = build("hpsv2", folders).clip
    pixels = torch.randn(2, 3, tiny.SIZE, tiny.SIZE, generator=torch.manual_seed(0))
    image = normalize(clip.model.encode_image(pixels), dim=-1)
    text = normalize(clip.model.encode_text(clip.tokenize(TEXTS[:2])), dim=-1)
    torch.testing.assert_close(clip.cosine(pixels, TEXTS[:2]), (image * text).sum(-1))


def test_imagereward_keeps_its_head_in_float32(folders: Folders) -> None:
    model = build("imagereward", folders, dtype="bfloat16").model
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
    assert {p.dtype for p in model.text.parameters()} == {torch.bfloat16}
