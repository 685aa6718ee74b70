"""What a vision-language model is asked about an image, and what its reply is worth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mixgrpo.rewards import options
from mixgrpo.rewards.completion import Failure
from mixgrpo.rewards.rendered_text import WantedText, legibility
from mixgrpo.rewards.verdict import PATTERN, answer_without_reasoning, read_score
from mixgrpo.types import Metadata

TEMPLATE = """\
The picture was made by a model from this text:

{prompt}

Judge the picture against the text. Does it show everything that the text asks for: the objects, \
how many they are, their properties, where they are, the style? Is it coherent, without broken \
shapes or blurred details, and good to look at? Say in a few sentences what speaks for and against \
it. Then end with one line of exactly this form, where X is a number from {min} (does not fit the \
text at all) to {max} (fits it perfectly and looks flawless), decimals allowed:

Final Score: X"""

# The question and the sampling of verl-omni's text-rendering recipe.
QUESTION = (
    "Please output only the text content from the image without any additional descriptions or "
    "formatting."
)
_SAMPLING = {"temperature": 0.7, "top_p": 0.8}

JUDGE, TRANSCRIBE = "judge", "transcribe"
TASKS = (JUDGE, TRANSCRIBE)
# Options that belong to one task alone.
_OF_TASK = {
    **dict.fromkeys(("pattern", "min", "max", "rescale"), JUDGE),
    **dict.fromkeys(("key",), TRANSCRIBE),
}
# Upper limit of scores. A larger number can only be a mistake.
_SCORES = 1e6


class Task(Protocol):
    """A question about an image and how its answer is scored.

    Attributes:
        body: fields of the requests.
        max_tokens: maximum number of tokens in a reply, unless an option sets another.
        takes_empty: whether an empty reply is an answer.
    """

    body: Mapping[str, Any]
    max_tokens: int
    takes_empty: bool

    def subjects(
        self, texts: Sequence[str], metadata: Sequence[Metadata] | None
    ) -> list[str | None]:
        """What the image of each prompt is compared with; None if there is nothing to ask."""
        ...

    def question(self, subject: str) -> str:
        """The question about an image that is to be compared with ``subject``."""
        ...

    def score(self, reply: str, subject: str) -> float | Failure:
        """The score that a reply means."""
        ...


class Judge:
    """The model judges how well the image fits the prompt; the score is the number it writes."""

    body: Mapping[str, Any] = {"temperature": 0}
    max_tokens = 512
    takes_empty = False

    def __init__(
        self,
        template: str = TEMPLATE,
        pattern: str = PATTERN,
        min: float = 1.0,
        max: float = 5.0,
        rescale: bool = False,
    ) -> None:
        self.low = options.number("vlm", "min", min, _SCORES)
        self.high = options.number("vlm", "max", max, _SCORES)
        if self.low >= self.high:
            raise ValueError(f"vlm: min ({min:.15g}) must be below max ({max:.15g})")
        self.template = _template(template, self.low, self.high)
        self.pattern = _pattern(pattern)
        self.rescale = options.flag("vlm", "rescale", rescale)

    def subjects(
        self, texts: Sequence[str], metadata: Sequence[Metadata] | None
    ) -> list[str | None]:
        return list(texts)

    def question(self, subject: str) -> str:
        return self.template.replace("{prompt}", subject)

    def score(self, reply: str, subject: str) -> float | Failure:
        score = read_score(reply, self.pattern, self.low, self.high)
        if isinstance(score, Failure) or not self.rescale:
            return score
        return (score - self.low) / (self.high - self.low)


class Transcriber:
    """The model writes down the text in the image; the score is ``legibility`` of what it wrote.

    An empty reply says that the image shows no text.
    """

    body: Mapping[str, Any] = _SAMPLING
    max_tokens = 4096
    takes_empty = True

    def __init__(self, template: str = QUESTION, key: str | None = None) -> None:
        self.wanted = WantedText("vlm", key)
        self.template = options.text("vlm", "template", template)
        if "{prompt}" in template:
            raise ValueError(
                "vlm: the template of task transcribe contains {prompt}, but a model that is told "
                "the text need not read it; remove {prompt}"
            )

    def subjects(
        self, texts: Sequence[str], metadata: Sequence[Metadata] | None
    ) -> list[str | None]:
        return [text or None for text in self.wanted(texts, metadata)]

    def question(self, subject: str) -> str:
        return self.template

    def score(self, reply: str, subject: str) -> float | Failure:
        transcription = answer_without_reasoning(reply)
        if isinstance(transcription, Failure):
            return transcription
        return legibility(transcription, subject)


def make_task(task: str, given: Mapping[str, Any]) -> Task:
    """The task of this name with the given options, of which None are not set.

    Raises:
        ValueError: there is no such task, an option belongs to another one or has a value that
            cannot work.
    """
    if task not in TASKS:
        raise ValueError(f"vlm: task must be {' or '.join(TASKS)}, got {options.shown(task)}")
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in chosen:
        if _OF_TASK.get(name, task) != task:
            raise ValueError(
                f"vlm: {name} is an option of task {_OF_TASK[name]} and has no effect with task "
                f"{task}; remove it, or set task to {_OF_TASK[name]}"
            )
    return Judge(**chosen) if task == JUDGE else Transcriber(**chosen)


def _template(template: str, low: float, high: float) -> str:
    if "{prompt}" not in options.text("vlm", "template", template):
        raise ValueError("vlm: the template lacks {prompt}; add it where the text belongs")
    return template.replace("{min}", f"{low:.15g}").replace("{max}", f"{high:.15g}")


def _pattern(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(options.text("vlm", "pattern", pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"vlm: pattern is not a valid regular expression ({error}); correct it"
        ) from error
    if "score" not in compiled.groupindex:
        raise ValueError(
            r"vlm: the pattern has no group `score`; write the number as (?P<score>[\d.]+)"
        )
    return compiled
