"""What distinguishes a model family: everything about it that the other families do not share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mixgrpo.maths.schedule import Spacing
from mixgrpo.models.lora_names import without_prefix
from mixgrpo.types import TextEmbedding

Settings = Mapping[str, Any]
"""The content of a part's configuration file."""


# diffusers' names of the projections of attention over an image and its text together.
JOINT_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"


@dataclass(frozen=True)
class Setup:
    """What a prediction depends on beside its tensors and the weights.

    Attributes:
        transformer: the configuration of the transformer.
        height, width: of the images, in pixels.
        guidance: value of the distilled guidance embedding, for families that have one.
    """

    transformer: Settings
    height: int
    width: int
    guidance: float


@dataclass(frozen=True)
class Published:
    """A family's published model, whose sizes a plan assumes where there is no model folder.

    Attributes:
        name: its name in messages.
        settings: transformer and vae -> what their configurations set otherwise than their classes.
        encoders: text encoder -> its number of parameters.
    """

    name: str
    settings: Mapping[str, Settings]
    encoders: Mapping[str, int]


class Family(ABC):
    """A model family that diffusers has a pipeline for.

    A family has no state. The methods get what they need: a pipeline, or a network and a setup.

    Attributes:
        name: its name in the registry.
        title: its name in messages.
        pipeline: the diffusers class of a whole model.
        weighted: the parts that have weights -> their class, and for classes of transformers the
            class of their configuration. ``transformer`` comes first, then ``vae``.
        tokenizers: the tokenizers' parts -> the part that reads their tokens.
        main_tokenizer: the tokenizer whose tokens ``model.text_length`` limits.
        unused: parts of the pipeline that are never loaded.
        shared: sizes that two parts must share: (the transformer's value, another part, its value,
            a factor on that). A text encoder's values are those of ``models.folder.part_settings``.
        side: pixels along an edge of the square that a latent token stands for.
        longest_text: the largest ``model.text_length``; None if the family sets no limit.
        masks: whether predictions mask the padding of texts.
        negative: the prompt whose prediction guidance leads away from, by default; None if the
            family has no guidance by two predictions.
        lora_targets: value of ``model.lora_targets`` -> a pattern of the full names of layers.
        lora_marks: a pattern found in names of layers that only this family's LoRAs change.
        published: the model whose sizes a plan assumes where there is no model folder.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    pipeline: ClassVar[Any]
    weighted: ClassVar[Mapping[str, tuple[Any, Any]]]
    tokenizers: ClassVar[Mapping[str, str]]
    main_tokenizer: ClassVar[str]
    unused: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[tuple[str, str, str, int], ...]] = ()
    side: ClassVar[int] = 16
    longest_text: ClassVar[int | None] = None
    masks: ClassVar[bool] = False
    negative: ClassVar[str | None] = None
    lora_targets: ClassVar[Mapping[str, str]]
    lora_marks: ClassVar[str | None] = None
    published: ClassVar[Published]

    # ---- known without weights

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders among the parts."""
        return tuple(part for part in self.weighted if part not in ("transformer", "vae"))

    @property
    def text_parts(self) -> tuple[str, ...]:
        """The parts that make text embeddings."""
        return (*self.encoders, *self.tokenizers)

    @property
    def parts(self) -> tuple[str, ...]:
        """All parts of a model folder."""
        return ("transformer", "vae", *self.text_parts, "scheduler")

    @property
    def transformer(self) -> Any:
        """The diffusers class of the network."""
        return self.weighted["transformer"][0]

    def tokens(self, height: int, width: int) -> int:
        """Number of latent tokens S of an image of this size in pixels."""
        return (height // self.side) * (width // self.side)

    @abstractmethod
    def latent_channels(self, transformer: Settings) -> int:
        """Channels C of a latent token."""

    @abstractmethod
    def text_widths(self, transformer: Settings) -> tuple[int, int]:
        """Values of a token in a text embedding, and of the pooled embedding; 0 if there is none.

        Args:
            transformer: the configuration of the transformer.
        """

    @abstractmethod
    def spacing(self, scheduler: Settings, tokens: int, steps: int) -> Spacing:
        """The schedule that the family's own inference uses.

        Args:
            scheduler: content of the scheduler's configuration file; empty if there is no folder.
            tokens: latent tokens of an image.
            steps: number of denoising steps.
        """

    @abstractmethod
    def embedding_values(self, settings: Mapping[str, Settings], length: int) -> int:
        """The most values that the embedding of a prompt has.

        Args:
            settings: text encoder -> its configuration, as `models.folder.part_settings` has it.
            length: the largest number of tokens, ``model.text_length``.
        """

    def check(self, folder: Path, without: Sequence[str]) -> None:  # noqa: B027
        """Checks what only this family requires of the parts of a model folder.

        Args:
            without: parts that will not be loaded.

        Raises:
            OSError, ValueError: a part cannot be used; the message says how to mend it.
        """

    def layers_of(self, name: str) -> tuple[str, ...]:
        """diffusers' names of the layers that a LoRA file means by ``name``.

        In the order of the layer's outputs; none if the family has no such layer. Underscores may
        stand for the dots in them.
        """
        return (without_prefix(name),)

    def is_swapped(self, name: str) -> bool:
        """Whether diffusers has the two halves of this layer's outputs the other way round."""
        return False

    # ---- text

    @abstractmethod
    def encode(
        self, pipeline: Any, prompt: str, length: int, device: torch.device
    ) -> TextEmbedding:
        """The embedding of one prompt, N = 1 and without padding that the model does not see."""

    @abstractmethod
    def count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        """The tokens of each prompt's embedding, by the main tokenizer and before truncation."""

    # ---- the network

    def prepare(self, module: Any, dtype: torch.dtype) -> None:  # noqa: B027
        """Registers hooks on a new network whose matrix products are computed in ``dtype``."""

    def mend(self, module: Any, device: torch.device) -> None:  # noqa: B027
        """Makes tensors that are neither weights nor buffers again, on the device that computes.

        A network that was made on the meta device lacks their values.
        """

    def unused_weights(self, transformer: Settings) -> list[str]:
        """Names of weights, or prefixes of them, that no prediction depends on.

        They are never trained, and checkpoints of runs do not contain them.

        Args:
            transformer: the configuration of the transformer.
        """
        return []

    def uses(self, name: str, transformer: Settings) -> bool:
        """Whether predictions depend on the weight of this name, or on the layer."""
        return not name.startswith(tuple(self.unused_weights(transformer)))

    @abstractmethod
    def predict(
        self, module: nn.Module, x: Tensor, sigma: Tensor, text: TextEmbedding, setup: Setup
    ) -> Tensor:
        """The velocity x1 - x0 at (x [N, S, C], sigma [N]) that the network predicts for the text.

        Args:
            module: the network, or a wrapper that an engine put around it.
        """

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance u + w (c - u) (Ho and Salimans, arXiv 2207.12598) of velocities
        [N, S, C], with w the scale."""
        return unconditional + scale * (conditional - unconditional)

    @abstractmethod
    def decode(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """Latents [N, S, C] at sigma 0 -> images [N, 3, H, W], data in [-1, 1]."""
