"""FLUX's text encoders, CLIP (pooled vector) and T5 (tokens), and what identifies them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from mixgrpo.config import ModelConfig
from mixgrpo.files.fingerprint import fingerprint
from mixgrpo.models.flux_files import quiet, read_object
from mixgrpo.models.flux_folder import open_pipeline
from mixgrpo.types import TextEmbedding

TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


class FluxText:
    """Both text encoders, frozen; see ``mixgrpo.models.TextEncoder``.

    Args:
        pipeline: holds the encoders and tokenizers.
        text_length: number of tokens of T5's input.
        device: where the embeddings are needed.
        placement: "device" keeps the encoders on the device, "cpu" keeps and runs them on the CPU,
            "offload" keeps them on the CPU and copies them to the device for each ``encode``.
    """

    def __init__(
        self, pipeline: FluxPipeline, text_length: int, device: torch.device, placement: str
    ) -> None:
        self.pipeline = pipeline
        self.text_length = text_length
        self.device = device
        self.placement = placement
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
            encoder.requires_grad_(False).eval()
            encoder.to(device if placement == "device" else "cpu")

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> FluxText:
        """Loads only the encoders, without the rest of the model.

        Raises:
            FileNotFoundError: if the folder or one of the encoders is missing.
        """
        require_parts(config.path, TEXT_PARTS)
        dtypes = {"default": getattr(torch, config.compute_dtype)}
        pipeline = open_pipeline(config.path, dtypes, without=("transformer", "vae", "scheduler"))
        return cls(pipeline, config.text_length, device, "device")

    @staticmethod
    def identify(config: ModelConfig) -> dict[str, str | int]:
        """Everything that embeddings depend on: digests of encoders and tokenizers, length, dtype.

        Raises:
            FileNotFoundError: if the folder or a part is missing.
        """
        parts = require_parts(config.path, TEXT_PARTS)
        digests = {part.name: fingerprint(part) for part in parts}
        return {**digests, "text_length": config.text_length, "dtype": config.compute_dtype}

    @staticmethod
    def bytes_per_prompt(config: ModelConfig) -> int:
        """Size of one prompt's embedding, in bytes."""
        pooled = _read_size(config, "text_encoder", "hidden_size")
        values = config.text_length * _read_size(config, "text_encoder_2", "d_model") + pooled
        return values * getattr(torch, config.compute_dtype).itemsize

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        # Prompts are encoded one at a time: rounding depends on the batch shape, and an embedding
        # must depend neither on the number of processes nor on where and when it was computed. T5
        # pads every prompt to text_length tokens, which keeps a GPU busy without batching.
        with quiet(), self._at_hand():  # diffusers would warn about each truncated prompt
            each = [self._encode_one(prompt) for prompt in prompts]
        return TextEmbedding(
            torch.cat([text.tokens for text in each]), torch.cat([text.pooled for text in each])
        )

    def _encode_one(self, prompt: str) -> TextEmbedding:
        tokens, pooled, _ = self.pipeline.encode_prompt(
            prompt=[prompt], device=self.device, max_sequence_length=self.text_length
        )
        return TextEmbedding(tokens, pooled)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """T5 tokens of each prompt before truncation."""
        return list(map(len, self.pipeline.tokenizer_2(list(prompts), verbose=False).input_ids))

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return sum(length > self.text_length for length in self.lengths(prompts))

    @contextlib.contextmanager
    def _at_hand(self) -> Iterator[None]:
        """Context with the encoders where they run; "offload" drops the device copies afterwards.

        The weights are frozen, so they need not be copied back to the CPU.
        """
        pipeline, own = self.pipeline, (self.pipeline.text_encoder, self.pipeline.text_encoder_2)
        try:
            if self.placement == "offload":
                pipeline.text_encoder, pipeline.text_encoder_2 = (
                    _copy_on(encoder, self.device) for encoder in own
                )
            yield
        finally:
            pipeline.text_encoder, pipeline.text_encoder_2 = own


def _read_size(config: ModelConfig, part: str, key: str) -> int:
    path = Path(config.path) / part / "config.json"
    try:
        return int(read_object(path)[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read as a text encoder's configuration; fetch it again"
        ) from error


def _copy_on(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy whose tensors are on the device; shared tensors stay shared."""
    tensors = chain(module.parameters(), module.buffers())
    # deepcopy takes objects in its memo as already copied.
    return copy.deepcopy(module, {id(tensor): _on(tensor, device) for tensor in tensors})


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.to(device), requires_grad=False)
    return tensor.to(device)


def require_parts(path: str, parts: Sequence[str]) -> list[Path]:
    """Returns the paths of the named parts of a pipeline folder.

    Raises:
        FileNotFoundError: if the folder or one of the parts is missing.
    """
    folder = Path(path)
    for part in ("", "model_index.json", *parts):
        if not (folder / part).exists():
            raise FileNotFoundError(
                f"model.path is {str(folder)!r}, but {str(folder / part)!r} does not exist; "
                "set --model.path to a diffusers FLUX pipeline folder"
            )
    return [folder / part for part in parts]
