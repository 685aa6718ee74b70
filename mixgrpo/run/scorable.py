"""Prompts that a reward cannot score, found before a run starts: those without a text to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mixgrpo.config import Config, RewardConfig
from mixgrpo.rewards.registry import check_call
from mixgrpo.text.prompt_files import PromptList

TRAINING, VALIDATION = "batch.prompts_file", "validation.prompts_file"
_SHOWN = 80
_REMEDY = "correct these prompts or the reward's options"


@dataclass(frozen=True)
class Unscorable:
    """Prompts of one file that one reward cannot score.

    Attributes:
        reward: the reward's name in the recipe.
        knob: the dotted name of the knob that holds the file.
        count: how many prompts it cannot score.
        total: how many prompts there are.
        first: the first of them.
        lack: what that one lacks.
        remedy: how to mend it.
    """

    reward: str
    knob: str
    count: int
    total: int
    first: str
    lack: str
    remedy: str

    def exceeds(self, most: float) -> bool:
        """Whether these are more than the fraction ``most`` of the prompts."""
        return self.count > most * self.total

    def told(self, most: float) -> str:
        """What was found, without the remedy."""
        limit = f", more than scoring.max_failed allows ({most:g})" if self.exceeds(most) else ""
        shown = self.first if len(self.first) <= _SHOWN else f"{self.first[:_SHOWN]}..."
        return (
            f"rewards.{self.reward} cannot score {self.count:,} of the {self.total:,} prompts of "
            f"{self.knob}{limit}: {shown!r} {self.lack}"
        )


def options_of(knobs: RewardConfig) -> dict[str, Any]:
    """The arguments with which the reward is constructed."""
    given = {"model": knobs.model, "checkpoint": knobs.checkpoint}
    return {key: value for key, value in given.items() if value is not None} | knobs.options


def check_scorable(config: Config, training: PromptList, validation: PromptList) -> None:
    """Requires that every reward can score enough of the prompts that it will be asked about.

    Raises:
        ValueError: one cannot score more than the fraction ``scoring.max_failed`` of the prompts of
            a file, or its options are wrong.
    """
    most = config.scoring.max_failed
    for found in find_unscorable(config, {TRAINING: training, VALIDATION: validation}):
        if found.exceeds(most):
            raise ValueError(f"{found.told(most)}; {found.remedy}")


def find_unscorable(config: Config, files: Mapping[str, PromptList]) -> Iterator[Unscorable]:
    """Finds the prompts that rewards cannot score; ``files`` are prompts by knob.

    A reward that is held out is only asked about the prompts of validation.

    Raises:
        ValueError: a reward is unknown, or its options are wrong.
    """
    for name, knobs in config.rewards.items():
        for knob, prompts in files.items():
            if knobs.weight > 0 or knob == VALIDATION:
                found = _unscorable(name, knobs, knob, prompts)
                if found is not None:
                    yield found


def _unscorable(
    name: str, knobs: RewardConfig, knob: str, prompts: PromptList
) -> Unscorable | None:
    """What the reward's own ``unscorable`` says about a file; None if it has no complaint."""
    options = options_of(knobs)
    try:
        why_not = getattr(check_call(knobs.kind, options), "unscorable", None)
        if why_not is None:
            return None
        pairs = zip(prompts.texts, prompts.metadata, strict=True)
        reasons = [why_not(text, metadata, **options) for text, metadata in pairs]
    except ValueError as error:
        raise ValueError(f"rewards.{name}: {error}") from error
    at = [i for i, reason in enumerate(reasons) if reason]
    if not at:
        return None
    lack, _, remedy = reasons[at[0]].partition("; ")
    first = prompts.texts[at[0]]
    return Unscorable(name, knob, len(at), len(reasons), first, lack, remedy or _REMEDY)
