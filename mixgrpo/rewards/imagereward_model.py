"""ImageReward's network (arXiv 2304.05977), built on transformers' BLIP modules.

A vision transformer encodes the image; a BERT encodes the text and attends to the image by
cross-attention in every layer; five linear layers map its [CLS] state to the score. The state dict
is translated to and from the key names of the published ``ImageReward.pt``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class VisionSize:
    """Sizes of the vision transformer; the published ImageReward is ViT-L/16 at 224 pixels.

    Attributes:
        image_size: edge of the square input, in pixels.
        patch_size: edge of a patch, in pixels; must divide ``image_size``.
        width: channels per token; the feed-forward layers are four times as wide.
        depth: number of blocks.
        heads: attention heads; must divide ``width``.
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 1024
    depth: int = 24
    heads: int = 16

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} must divide image_size {self.image_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} must divide width {self.width}")


class ImageRewardModel(nn.Module):
    """Maps normalised pixels and a tokenised text to the raw score, before standardisation.

    Args:
        vision: sizes of the vision transformer.
        text: the BERT configuration, with the key names of ``med_config.json``. Its
            ``encoder_width`` is ignored in favour of the width of the vision transformer (the
            published file states 768 although its ViT-L has a width of 1024).
    """

    def __init__(self, vision: VisionSize, text: Mapping[str, Any]) -> None:
        super().__init__()
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        self.vision = BlipVisionModel(_vision_config(vision))
        self.text = BlipTextModel(_text_config(vision, text), add_pooling_layer=False)
        self.head = _head(int(text["hidden_size"]))

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """pixels [B, 3, S, S], input_ids and attention_mask [B, L] -> [B] float32."""
        patches = self.vision(pixel_values=pixels).last_hidden_state  # [B, 1 + patches, width]
        return self.read(patches, input_ids, attention_mask)

    def read(self, patches: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encoded images [B, 1 + patches, width] and their texts [B, L] -> [B] float32."""
        states = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=patches,
        ).last_hidden_state  # [B, L, hidden]
        # As published, the head is float32 whatever the dtype of the towers: it has no activations,
        # so rounding errors would accumulate from layer to layer.
        return self.head(states[:, 0].to(self.head[0].weight.dtype)).squeeze(-1).float()


def _vision_config(size: VisionSize) -> Any:
    from transformers import BlipVisionConfig

    return BlipVisionConfig(
        image_size=size.image_size,
        patch_size=size.patch_size,
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        attention_dropout=0.0,
    )


def _text_config(vision: VisionSize, text: Mapping[str, Any]) -> Any:
    from transformers import BlipTextConfig

    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    missing = [key for key in sizes if key not in text]
    if missing:
        raise ValueError(
            f"the text configuration lacks {', '.join(missing)}: check med_config.json"
        )
    known: dict[str, Any] = {key: int(text[key]) for key in sizes}
    return BlipTextConfig(
        **known,
        encoder_hidden_size=vision.width,
        max_position_embeddings=int(text.get("max_position_embeddings", 512)),
        hidden_act=text.get("hidden_act", "gelu"),
        layer_norm_eps=float(text.get("layer_norm_eps", 1e-12)),
        hidden_dropout_prob=float(text.get("hidden_dropout_prob", 0.1)),
        attention_probs_dropout_prob=float(text.get("attention_probs_dropout_prob", 0.1)),
        pad_token_id=int(text.get("pad_token_id", 0)),
        bos_token_id=None,
        sep_token_id=None,
        is_decoder=True,  # transformers' name for "has cross-attention"; attention is not causal
        use_cache=False,
    )


def _head(width: int) -> nn.Sequential:
    """Linear layers without activations; the dropouts keep the published indices 0, 2, 4, 6, 7."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


# Parts of key names in ImageReward.pt and in this module, replaced in this order.
_NAMES = (
    ("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
    ("blip.visual_encoder.patch_embed.proj.", "vision.embeddings.patch_embedding."),
    ("blip.visual_encoder.norm.", "vision.post_layernorm."),
    ("blip.visual_encoder.blocks.", "vision.encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    ("blip.text_encoder.", "text."),
    ("mlp.layers.", "head."),
)

# In the published file, but unused by the score: BLIP's contrastive projections and a buffer.
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


def used_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state dict with the names of ``ImageReward.pt`` that the score uses."""
    return {key: value for key, value in state.items() if not key.startswith(_UNUSED)}


def from_imagereward_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts a state dict with the names of ``ImageReward.pt`` to one of ``ImageRewardModel``."""
    return {_renamed(key, _NAMES): value for key, value in used_keys(state).items()}


def to_imagereward_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts ``ImageRewardModel.state_dict()`` to the names of ``ImageReward.pt``."""
    backwards = tuple((ours, theirs) for theirs, ours in _NAMES)
    return {_renamed(key, backwards): value for key, value in state.items()}


def _renamed(key: str, names: tuple[tuple[str, str], ...]) -> str:
    for old, new in names:
        key = key.replace(old, new)
    return key
