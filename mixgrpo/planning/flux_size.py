"""Parameter and operation counts of a FLUX transformer, computed from its configuration.

D is the width, N image tokens, L text tokens, S = N + L.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixgrpo.files.json_files import read_object
from mixgrpo.files.regular import MIB

_CLASS = "FluxTransformer2DModel"
_LARGEST_JSON = 64 * MIB
_TIME = 256  # size of the first embedding of sigma and guidance


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a part of a model folder. Raises OSError, ValueError: they cannot be read."""
    try:
        return read_object(path, _LARGEST_JSON)
    except ValueError as error:
        raise ValueError(f"{error}; fetch it again") from error


@dataclass(frozen=True)
class FluxSize:
    """The values of a transformer/config.json; the defaults are those published for FLUX.1-dev."""

    num_layers: int = 19
    num_single_layers: int = 38
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    in_channels: int = 64
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FluxSize:
        """From a configuration file's content; missing values have diffusers' defaults.

        Raises:
            ValueError: the configuration is that of another model.
        """
        kind = config.get("_class_name", _CLASS)
        if kind != _CLASS:
            raise ValueError(
                f"memory and time can be estimated only for {_CLASS}, but this is a {kind}"
            )
        named = {name: config[name] for name in cls.__dataclass_fields__ if name in config}
        return cls(**{"guidance_embeds": False, **named})

    @classmethod
    def of_folder(cls, model: Path) -> FluxSize:
        """From a model folder; FLUX.1-dev's values if the folder does not exist."""
        path = model / "transformer" / "config.json"
        return cls.from_config(read_settings(path)) if path.is_file() else cls()

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def blocks(self) -> int:
        return self.num_layers + self.num_single_layers

    @property
    def double_block(self) -> int:
        """Parameters of a double-stream block: all modules exist twice, once per kind of token."""
        d = self.width
        modulation, attention, norms = _linear(d, 6 * d), 4 * _linear(d, d), self.attention_head_dim
        feed_forward = _linear(d, 4 * d) + _linear(4 * d, d)
        return 2 * (modulation + attention + 2 * norms + feed_forward)

    @property
    def single_block(self) -> int:
        """Parameters of a single-stream block."""
        d = self.width
        attention = 3 * _linear(d, d) + 2 * self.attention_head_dim
        return _linear(d, 3 * d) + attention + _linear(d, 4 * d) + _linear(5 * d, d)

    @property
    def outside(self) -> int:
        """Parameters outside the blocks: embeddings and the output layer."""
        d = self.width
        times = (1 + self.guidance_embeds) * (_linear(_TIME, d) + _linear(d, d))
        pooled = _linear(self.pooled_projection_dim, d) + _linear(d, d)
        tokens = _linear(self.joint_attention_dim, d) + _linear(self.in_channels, d)
        return times + pooled + tokens + _linear(d, 2 * d) + _linear(d, self.in_channels)

    @property
    def parameters(self) -> int:
        inside = self.num_layers * self.double_block + self.num_single_layers * self.single_block
        return inside + self.outside

    def adapters(self, rank: int, targets: str) -> int:
        """Parameters of adapters of this rank on the attention projections, or on "all"."""
        d = self.width
        double, single = 8 * (d + d), 3 * (d + d)
        if targets == "all":
            double += 4 * (d + 4 * d)
            single += (d + 4 * d) + (5 * d + d)
        return rank * (self.num_layers * double + self.num_single_layers * single)

    def products(self, image_tokens: int, text_tokens: int) -> Products:
        """Floating-point operations of one evaluation for one image."""
        d, tokens = self.width, image_tokens + text_tokens
        # Each token takes part in twelve D x D products in either kind of block.
        blocks = self.blocks * 24 * tokens * d * d
        modulation = self.num_layers * 24 * d * d + self.num_single_layers * 6 * d * d
        times = (1 + self.guidance_embeds) * 2 * (_TIME * d + d * d)
        pooled = 2 * (self.pooled_projection_dim * d + d * d)
        ends = 4 * image_tokens * self.in_channels * d + 4 * d * d
        text = 2 * text_tokens * self.joint_attention_dim * d
        return Products(
            weights=blocks + modulation + times + pooled + ends + text,
            attention=self.blocks * 4 * tokens * tokens * d,
        )


@dataclass(frozen=True)
class Products:
    """Operations in products with weights, and in products between tokens (attention)."""

    weights: int
    attention: int

    @property
    def total(self) -> int:
        return self.weights + self.attention

    def backward(self, train_all: bool) -> int:
        """Operations of a backward pass: twice each product, or once for products with frozen
        weights."""
        return (2 if train_all else 1) * self.weights + 2 * self.attention


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
