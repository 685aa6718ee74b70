"""Signs of one word, and their captions; every caption parses back."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

CONSONANTS = "BDFHLMNPRSTVYZ"  # without those that make words one would not put on a sign
VOWELS = "AEIOU"
GROUNDS = ("red", "green", "blue", "gray")
INKS = ("white", "yellow")
FONTS = ("sans", "serif")
LETTERS = "".join(sorted(CONSONANTS + VOWELS))
# Every word of the captions, for the tokenizer; the letters of the signs' words are tokens of their
# own.
VOCABULARY = ("a", "sign", "in", "letters", *GROUNDS, *INKS, *FONTS)

# One in eight of all words is held out for testing and never rendered for training.
TEST_SHARE = 8


@dataclass(frozen=True)
class Sign:
    """A word of three letters, in one ink and font on a plain ground."""

    word: str
    ground: str
    ink: str
    font: str

    @property
    def caption(self) -> str:
        return f'a {self.ground} sign "{self.word}" in {self.ink} {self.font} letters'


def parse(caption: str) -> Sign:
    """The sign that a caption describes.

    Raises:
        ValueError: if it is not a caption of this world.
    """
    found = _CAPTION.fullmatch(" ".join(caption.split()))
    if found is None:
        raise ValueError(
            f"not a caption of the world of words: {caption!r}; captions read like "
            f"{Sign('NOB', 'red', 'white', 'serif').caption!r}"
        )
    return Sign(found["word"].upper(), *(found[name].lower() for name in ("ground", "ink", "font")))


_CAPTION = re.compile(
    rf"a (?P<ground>{'|'.join(GROUNDS)}) sign "
    rf'"(?P<word>[{CONSONANTS}][{VOWELS}][{CONSONANTS}])" '
    rf"in (?P<ink>{'|'.join(INKS)}) (?P<font>{'|'.join(FONTS)}) letters",
    re.IGNORECASE,
)


def all_words() -> list[str]:
    """Every word, in a fixed order: a vowel between two consonants, 980 in all."""
    return ["".join(letters) for letters in itertools.product(CONSONANTS, VOWELS, CONSONANTS)]


def is_test(word: str) -> bool:
    """Whether a word is held out; decided by the word alone, so it never changes."""
    return hashlib.sha256(word.encode()).digest()[0] % TEST_SHARE == 0


def split(test: bool) -> list[str]:
    """All training or all test words, in a fixed order. The two are disjoint."""
    return [word for word in all_words() if is_test(word) == test]


def draw(words: Sequence[str], count: int, rng: random.Random) -> list[Sign]:
    """Signs with words and looks at random."""
    return [
        Sign(rng.choice(words), rng.choice(GROUNDS), rng.choice(INKS), rng.choice(FONTS))
        for _ in range(count)
    ]


def alter(sign: Sign, rng: random.Random) -> Sign:
    """The same sign with one of its six facts (three letters, ground, ink, font) changed."""
    fact = rng.randrange(6)
    if fact < 3:
        among = VOWELS if fact == 1 else CONSONANTS
        letter = _another(among, sign.word[fact], rng)
        return replace(sign, word=sign.word[:fact] + letter + sign.word[fact + 1 :])
    if fact == 3:
        return replace(sign, ground=_another(GROUNDS, sign.ground, rng))
    if fact == 4:
        return replace(sign, ink=_another(INKS, sign.ink, rng))
    return replace(sign, font=_another(FONTS, sign.font, rng))


def _another(among: Sequence[str], than: str, rng: random.Random) -> str:
    return rng.choice([each for each in among if each != than])
