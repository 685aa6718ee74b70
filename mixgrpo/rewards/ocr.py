"""Text rendering: is the text that the prompt quotes, or its metadata names, legible in the image?

The score is that of Flow-GRPO's text-rendering task (arXiv 2505.05470), in the variant that does
not penalise additional text.
"""

from __future__ import annotations

import logging
import math
import queue
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixgrpo.rewards import options
from mixgrpo.rewards.images import to_uint8
from mixgrpo.types import Metadata

logger = logging.getLogger(__name__)

_DOUBLE = re.compile(r"“([^“”]*)”|„([^„“”]*)[“”]|«([^«»]*)»")
_SINGLE = re.compile(r"(?<!\w)‘([^‘]*?)’(?!\w)")  # noqa: RUF001
_ELISION = re.compile(r"'(?:\d0s|n)\b")


class Ocr:
    """How legibly the image shows the text in the prompt's quotation marks: from 0 to 1.

    The score is 1 if the text that is read from the image contains the quoted text, and otherwise
    1 - min(d, n) / n, where n is the length of the quoted text and d its edit distance to the text
    that is read. White space and case are ignored. The score of a prompt without such a text is
    NaN; the first such prompt is logged as a warning.

    Text is read by RapidOCR (with the PP-OCRv6 models in its package) on the CPU.

    Args:
        threads: images read concurrently, each on one thread; 0 uses torch's number of threads.
        key: key of the prompts' metadata that holds the text, in place of what the prompt quotes.
    """

    def __init__(self, *, threads: int = 0, key: str | None = None) -> None:
        self.key = key if key is None else options.text("ocr", "key", key)
        self.threads = options.whole("ocr", "threads", threads, 0) or torch.get_num_threads()
        self.readers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(self.threads):
            self.readers.put(_make_reader())
        self.warned = False

    def __call__(
        self, images: Tensor, texts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> Tensor:
        """images [B, 3, H, W] in [0, 1], B texts -> [B] float32, NaN if there is no text to read.

        metadata: that of the B prompts; only used with ``key``.
        """
        if self.key is None:
            targets = [quoted_text(text) for text in texts]
        else:
            targets = [_text_under(self.key, each) for each in metadata or [{}] * len(texts)]
        self._warn_of_missing(texts, targets)
        pictures = to_uint8(images)
        wanted = [i for i, target in enumerate(targets) if target]
        with ThreadPoolExecutor(self.threads) as pool:
            read = dict(zip(wanted, pool.map(self._read, pictures[wanted]), strict=True))
        scores = [
            legibility(read[i], target) if target else math.nan for i, target in enumerate(targets)
        ]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _read(self, picture: NDArray[np.uint8]) -> str:
        """All text in the image [H, W, 3], from top to bottom."""
        reader = self.readers.get()  # one per thread: a reader holds state while it reads
        try:
            bgr = np.ascontiguousarray(picture[:, :, ::-1])
            return " ".join(reader(bgr).txts or ())
        finally:
            self.readers.put(reader)

    def _warn_of_missing(self, texts: Sequence[str], targets: Sequence[str]) -> None:
        missing = [text for text, target in zip(texts, targets, strict=True) if not target]
        if missing and not self.warned:
            self.warned = True
            logger.warning(
                "ocr: the prompt %r %s; images of such prompts have no score (NaN)",
                missing[0],
                f"has no text as its {self.key!r}" if self.key else "quotes no text",
            )


def _text_under(key: str, metadata: Metadata) -> str:
    """The text that the metadata has under the key; empty if it is none."""
    found = metadata.get(key)
    return found.strip() if isinstance(found, str) else ""


def _make_reader() -> Any:
    from rapidocr import RapidOCR

    # Each reader uses one thread, because readers run concurrently. The log level suppresses
    # RapidOCR's warning about images without text.
    one_thread = {
        f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")
    }
    return RapidOCR(params={**one_thread, "Global.log_level": "critical"})


def legibility(transcription: str, target: str) -> float:
    """1 if ``transcription`` contains ``target``, else 1 - min(edit distance, n) / n.

    Both are compared without white space and in lower case; n is the length of the target, which
    must not be empty.
    """
    read, wanted = _plain(transcription), _plain(target)
    if wanted in read:
        return 1.0
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
