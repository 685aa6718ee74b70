"""The published files' names and shapes at full size, on the meta device: no memory, no weights.

The expected names are written out from the files' formats, not taken from our classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from oracles import random_weights
from oracles.random_weights import PICKSCORE_TEXT, PICKSCORE_VISION
from torch import Tensor, nn

from mixgrpo.rewards.clip_score import ClipScore
from mixgrpo.rewards.hpsv2 import HPSv2
from mixgrpo.rewards.weights import check_fits

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, into: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def open_clip_tower(name: str, layers: int, width: int) -> Shapes:
    shapes: Shapes = {}
    for layer in range(layers):
        block = f"{name}transformer.resblocks.{layer}"
        shapes[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        shapes[f"{block}.attn.in_proj_bias"] = (3 * width,)
        shapes |= dict(linear(f"{block}.attn.out_proj", width, width))
        shapes |= dict(linear(f"{block}.mlp.c_fc", 4 * width, width))
        shapes |= dict(linear(f"{block}.mlp.c_proj", width, 4 * width))
        shapes |= dict(norm(f"{block}.ln_1", width)) | dict(norm(f"{block}.ln_2", width))
    return shapes


def open_clip_vit_h(image_size: int) -> Shapes:
    """ViT-H/14 with a text tower of 24 layers, as open_clip saves it."""
    places = (image_size // 14) ** 2 + 1
    return {
        "logit_scale": (),
        "positional_embedding": (77, 1024),
        "text_projection": (1024, 1024),
        "token_embedding.weight": (49408, 1024),
        "visual.class_embedding": (1280,),
        "visual.positional_embedding": (places, 1280),
        "visual.proj": (1280, 1024),
        "visual.conv1.weight": (1280, 3, 14, 14),
        **dict(norm("visual.ln_pre", 1280)),
        **dict(norm("visual.ln_post", 1280)),
        **dict(norm("ln_final", 1024)),
        **open_clip_tower("visual.", 32, 1280),
        **open_clip_tower("", 24, 1024),
    }


def pickscore_tower(name: str, layers: int, width: int) -> Shapes:
    shapes: Shapes = {}
    for layer in range(layers):
        block = f"{name}.encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= dict(linear(f"{block}.self_attn.{part}", width, width))
        shapes |= dict(linear(f"{block}.mlp.fc1", 4 * width, width))
        shapes |= dict(linear(f"{block}.mlp.fc2", width, 4 * width))
        shapes |= dict(norm(f"{block}.layer_norm1", width))
        shapes |= dict(norm(f"{block}.layer_norm2", width))
    return shapes


def pickscore() -> Shapes:
    """PickScore_v1's model.safetensors; older files have two buffers `position_ids` besides."""
    return {
        "logit_scale": (),
        "text_projection.weight": (1024, 1024),
        "visual_projection.weight": (1024, 1280),
        "text_model.embeddings.token_embedding.weight": (49408, 1024),
        "text_model.embeddings.position_embedding.weight": (77, 1024),
        "vision_model.embeddings.class_embedding": (1280,),
        "vision_model.embeddings.patch_embedding.weight": (1280, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (257, 1280),
        **dict(norm("text_model.final_layer_norm", 1024)),
        **dict(norm("vision_model.pre_layrnorm", 1280)),  # spelled so
        **dict(norm("vision_model.post_layernorm", 1280)),
        **pickscore_tower("text_model", 24, 1024),
        **pickscore_tower("vision_model", 32, 1280),
    }


def on_meta(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def own(module: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = module.state_dict()
    return state


def architecture(name: str) -> nn.Module:
    """What a reward makes of the architecture's name, but for the memory."""
    with torch.device("meta"):
        return open_clip.create_model(name, device="meta", load_weights=False)


@pytest.mark.parametrize(
    ("reward", "image_size", "file"),
    [(HPSv2, 224, "HPS_v2.1_compressed.pt"), (ClipScore, 378, "open_clip_pytorch_model.bin")],
)
def test_open_clip_files(reward: type[HPSv2 | ClipScore], image_size: int, file: str) -> None:
    model = architecture(reward.architecture)
    check_fits(own(model), on_meta(open_clip_vit_h(image_size)), Path(file))


def test_a_file_of_the_other_size_names_key_and_sizes() -> None:
    model = architecture(HPSv2.architecture)
    expected = r"positional_embedding \[730, 1280\] instead of \[257, 1280\]"
    with pytest.raises(ValueError, match=expected):
        check_fits(own(model), on_meta(open_clip_vit_h(378)), Path("DFN5B.bin"))


def test_pickscore_file() -> None:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config=PICKSCORE_TEXT, vision_config=PICKSCORE_VISION, projection_dim=1024
    )
    with torch.device("meta"):
        model = CLIPModel(config)
    check_fits(own(model), on_meta(pickscore()), Path("model.safetensors"))


def test_clip_tokens_are_open_clip_s(tmp_path: Path) -> None:
    """The tokenizer that stands in for PickScore's is CLIP's own."""
    from transformers import AutoTokenizer

    random_weights.clip_tokenizer(tmp_path)
    texts = ["A photo of 3 dogs, by the sea!", "ein Mädchen", "", "word " * 100]
    ours = AutoTokenizer.from_pretrained(tmp_path)(
        texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    end = 49407
    theirs = open_clip.tokenize(texts)
    lengths = (theirs == end).int().argmax(1) + 1
    for mine, other, length in zip(ours["input_ids"], theirs, lengths.tolist(), strict=True):
        assert mine[:length].tolist() == other[:length].tolist()
