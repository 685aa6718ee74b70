"""Prompts together with the negative prompts of classifier-free guidance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from mixgrpo.config import ModelConfig
from mixgrpo.models import Text
from mixgrpo.models.registry import family_of
from mixgrpo.text.prompt_files import NEGATIVE, PromptList
from mixgrpo.types import Metadata, TextEmbedding


def negative_for(
    model: ModelConfig, scales: Mapping[str, float | None], negative: str | None
) -> str | None:
    """The negative prompt of guidance with any of these scales; None without guidance.

    Args:
        scales: knob -> its value.
        negative: the knob; None is the family's own.

    Raises:
        FileNotFoundError: there is no model folder.
        ValueError: the family is unknown, or has no classifier-free guidance.
    """
    above = {knob: scale for knob, scale in scales.items() if scale is not None and scale > 1}
    if not above:
        return None
    family = family_of(model)
    if family.negative is None:
        knob, scale = next(iter(above.items()))
        raise ValueError(
            f"{knob} is {scale:g}, but {family.title} has no classifier-free guidance; set "
            f"--{knob} 1 and, for a model distilled for guidance, its --model.guidance"
        )
    return family.negative if negative is None else negative


def negative_prompts(metadata: Sequence[Metadata], default: str) -> list[str]:
    """The negative prompt of each prompt: its metadata's, or else the default."""
    return [each.get(NEGATIVE, default) for each in metadata]


def encoded_texts(files: Iterable[PromptList], negative: str | None) -> list[str]:
    """The prompts of all files and, with guidance, their negative prompts.

    Args:
        negative: the negative prompt of prompts that name none; None without guidance.
    """
    files = list(files)
    texts = [text for prompts in files for text in prompts.texts]
    if negative is not None:
        texts += [n for prompts in files for n in negative_prompts(prompts.metadata, negative)]
    return texts


class GuidedText:
    """Encodes prompts, with negative prompts if there is guidance.

    Args:
        text: encodes both.
        negative: the negative prompt of prompts whose metadata names none; None if there is no
            guidance.
    """

    def __init__(self, text: Text, negative: str | None) -> None:
        self.text = text
        self.negative = negative
        self._shared: dict[str, TextEmbedding] = {}

    def encode(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> TextEmbedding:
        """Embeddings of N prompts; their ``negative`` is one row if all of them share it."""
        text = self.text.encode(prompts)
        if self.negative is None:
            return text
        negatives = negative_prompts(metadata, self.negative)
        if len(set(negatives)) > 1:
            return replace(text, negative=self.text.encode(negatives))
        return replace(text, negative=self._encode_once(negatives[0]))

    def _encode_once(self, negative: str) -> TextEmbedding:
        if negative not in self._shared:
            self._shared = {negative: self.text.encode([negative])}
        return self._shared[negative]
