"""The text that an image should show, and how well a transcription of the image matches it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from mixgrpo.rewards import options
from mixgrpo.types import Metadata

logger = logging.getLogger(__name__)

_DOUBLE = re.compile(r"“([^“”]*)”|„([^„“”]*)[“”]|«([^«»]*)»")
_SINGLE = re.compile(r"(?<!\w)‘([^‘]*?)’(?!\w)")  # noqa: RUF001
_ELISION = re.compile(r"'(?:\d0s|n)\b")


class WantedText:
    """Finds the text that each prompt's images should show.

    Args:
        reward: the kind of the reward, for its messages.
        key: key of the prompts' metadata that holds the text; None takes what the prompt quotes.

    Raises:
        ValueError: if the key is not a string that can be one.
    """

    def __init__(self, reward: str, key: str | None) -> None:
        self.reward = reward
        self.key = key if key is None else options.text(reward, "key", key)
        self.warned = False

    def __call__(self, texts: Sequence[str], metadata: Sequence[Metadata] | None) -> list[str]:
        """B texts and their metadata -> B texts to be shown, empty where there is none.

        The first prompt without one is logged as a warning.
        """
        pairs = zip(texts, metadata or [{}] * len(texts), strict=True)
        wanted = [self.of(text, each) for text, each in pairs]
        missing = [text for text, found in zip(texts, wanted, strict=True) if not found]
        if missing and not self.warned:
            self.warned = True
            logger.warning(
                "%s: the prompt %r %s; images of such prompts have no score (NaN)",
                *(self.reward, missing[0], self._lack()),
            )
        return wanted

    def of(self, text: str, metadata: Metadata) -> str:
        """The text of one prompt; empty if there is none."""
        if self.key is None:
            return quoted_text(text)
        found = metadata.get(self.key)
        return found.strip() if isinstance(found, str) else ""

    def why_missing(self, text: str, metadata: Metadata) -> str:
        """What the prompt lacks and how to mend it; empty if it has a text."""
        if self.of(text, metadata):
            return ""
        remedy = (
            "give every line of a JSONL file this key with the text as a string, or correct the "
            "option key"
            if self.key
            else "put the text that the image should show in quotation marks, or set the option "
            "key to the key of the metadata that holds it"
        )
        return f"{self._lack()}; {remedy}"

    def _lack(self) -> str:
        return f"has no text as its {self.key!r}" if self.key else "quotes no text"


def legibility(transcription: str, target: str) -> float:
    """1 if ``transcription`` contains ``target``, else 1 - min(edit distance, n) / n.

    Both are compared without white space and in lower case; n is the length of the target, which
    must not be empty.
    """
    read, wanted = _plain(transcription), _plain(target)
    if wanted in read:
        return 1.0
    if len(read) >= 2 * len(wanted):
        return 0.0  # the distance is at least the difference in length; a server may say a lot
    return 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def _plain(text: str) -> str:
    return "".join(text.split()).lower()


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: fewest insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))  # distances from the current prefix of a to each prefix of b
    for i, from_a in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, from_b in enumerate(b, 1):
            substituted = diagonal + (from_a != from_b)
            diagonal = row[j]
            row[j] = min(row[j] + 1, row[j - 1] + 1, substituted)
    return row[-1]


def quoted_text(prompt: str) -> str:
    """The texts that a prompt quotes, in order, joined by spaces; empty if it quotes nothing.

    Double quotation marks are used, straight or typographic. Single ones are used only if the
    prompt has no double ones, and only where they cannot be apostrophes (``_single_quoted``).
    """
    parts = _double_quoted(prompt) or _single_quoted(prompt)
    return " ".join(part.strip() for part in parts if part.strip())


def _double_quoted(prompt: str) -> list[str]:
    found = [(match.start(), match[match.lastindex or 0]) for match in _DOUBLE.finditer(prompt)]
    rest = _DOUBLE.sub(lambda match: " " * len(match[0]), prompt)
    marks: list[int] = []
    for match in re.finditer('"', rest):
        if len(marks) % 2 or not rest[match.start() - 1 : match.start()].isdigit():  # 12" pizza
            marks.append(match.start())
    return [text for _, text in sorted(found + _between(prompt, marks))]


def _single_quoted(prompt: str) -> list[str]:
    """The texts in single quotation marks; none unless marks open and close alternately.

    A mark within a word is an apostrophe, as are those of 'n' and '80s and, before the first
    opening mark, one at the end of a word (the dogs' sign).
    """
    typographic = [match[1] for match in _SINGLE.finditer(prompt)]
    if typographic:
        return typographic
    marks: list[int] = []
    for match in re.finditer("'", prompt):
        before, after = prompt[match.start() - 1 : match.start()], prompt[match.end() :][:1]
        opens = not before.isalnum() and after.strip() != ""
        closes = not after.isalnum() and before.strip() != ""
        expected = closes if len(marks) % 2 else opens
        if expected and not (opens and _ELISION.match(prompt, match.start())):
            marks.append(match.start())
        elif marks and (opens or closes):
            return []
    return [text for _, text in _between(prompt, marks)]


def _between(prompt: str, marks: list[int]) -> list[tuple[int, str]]:
    """(position, text) between each pair of marks; none if the number of marks is odd."""
    if len(marks) % 2:
        return []
    pairs = zip(marks[::2], marks[1::2], strict=True)
    return [(start, prompt[start + 1 : end]) for start, end in pairs]
