"""A family's text encoders, where they are kept, and what identifies them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixgrpo.config import ModelConfig
from mixgrpo.files.fingerprint import fingerprint
from mixgrpo.models.family import Family
from mixgrpo.models.files import part_settings, quiet
from mixgrpo.models.folder import checked_family, open_pipeline, require_parts
from mixgrpo.models.registry import family_of
from mixgrpo.types import TextEmbedding


class TextEncoders:
    """A family's text encoders, frozen; see ``mixgrpo.models.TextEncoder``.

    Args:
        family: encodes with them.
        pipeline: holds the encoders and tokenizers.
        text_length: the most tokens of a prompt; longer ones are truncated.
        device: where the embeddings are needed.
        placement: "device" keeps the encoders on the device, "cpu" keeps and runs them on the CPU,
            "offload" keeps them on the CPU and copies them to the device for each ``encode``.
    """

    def __init__(
        self,
        family: Family,
        pipeline: Any,
        text_length: int,
        device: torch.device,
        placement: str,
    ) -> None:
        self.family = family
        self.pipeline = pipeline
        self.text_length = text_length
        self.device = device
        self.placement = placement
        for encoder in self._own().values():
            encoder.requires_grad_(False).eval()
            encoder.to(device if placement == "device" else "cpu")

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> TextEncoders:
        """Loads only the encoders, without the rest of the model.

        Raises:
            FileNotFoundError: if the folder or one of the encoders is missing.
        """
        family = checked_family(config)
        require_parts(config.path, family.text_parts)
        dtypes = {"default": getattr(torch, config.compute_dtype)}
        without = ("transformer", "vae", "scheduler")
        pipeline = open_pipeline(family, config.path, dtypes, without)
        return cls(family, pipeline, config.text_length, device, "device")

    @staticmethod
    def identify(config: ModelConfig) -> dict[str, str | int]:
        """Everything that embeddings depend on: digests of encoders and tokenizers, length, dtype.

        Raises:
            FileNotFoundError: if the folder or a part is missing.
        """
        parts = require_parts(config.path, checked_family(config).text_parts)
        digests = {part.name: fingerprint(part) for part in parts}
        return {**digests, "text_length": config.text_length, "dtype": config.compute_dtype}

    @staticmethod
    def bytes_per_prompt(config: ModelConfig) -> int:
        """The most bytes of one prompt's embedding.

        Raises:
            OSError, ValueError: an encoder's configuration cannot be read.
        """
        family = family_of(config)
        folder = Path(config.path)
        settings = {part: part_settings(family, folder / part) for part in family.encoders}
        values = family.embedding_values(settings, config.text_length)
        return values * getattr(torch, config.compute_dtype).itemsize

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        # Prompts are encoded one at a time: rounding depends on the batch shape, and an embedding
        # must depend neither on the number of processes nor on where and when it was computed.
        with quiet(), self._at_hand():  # diffusers would warn about each truncated prompt
            return TextEmbedding.join([self._encode_one(prompt) for prompt in prompts])

    def _encode_one(self, prompt: str) -> TextEmbedding:
        where = torch.device("cpu") if self.placement == "cpu" else self.device
        text = self.family.encode(self.pipeline, prompt, self.text_length, where)
        return text.to(self.device)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        tokenizer = getattr(self.pipeline, self.family.main_tokenizer)
        return self.family.count_tokens(tokenizer, prompts)

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return sum(length > self.text_length for length in self.lengths(prompts))

    @contextlib.contextmanager
    def _at_hand(self) -> Iterator[None]:
        """Context with the encoders where they run; "offload" drops the device copies afterwards.

        The weights are frozen, so they need not be copied back to the CPU.
        """
        own = self._own()
        try:
            if self.placement == "offload":
                for part, encoder in own.items():
                    setattr(self.pipeline, part, _copy_on(encoder, self.device))
            yield
        finally:
            for part, encoder in own.items():
                setattr(self.pipeline, part, encoder)

    def _own(self) -> dict[str, Any]:
        return {part: getattr(self.pipeline, part) for part in self.family.encoders}


def _copy_on(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy whose tensors are on the device; shared tensors stay shared."""
    tensors = chain(module.parameters(), module.buffers())
    # deepcopy takes objects in its memo as already copied.
    return copy.deepcopy(module, {id(tensor): _on(tensor, device) for tensor in tensors})


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.to(device), requires_grad=False)
    return tensor.to(device)
