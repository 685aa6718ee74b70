"""Text rendering: is the text that the prompt quotes, or its metadata names, legible in the image?

The score is that of Flow-GRPO's text-rendering task (arXiv 2505.05470), in the variant that does
not penalise additional text.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixgrpo.rewards import options
from mixgrpo.rewards.images import to_uint8
from mixgrpo.rewards.rendered_text import WantedText, legibility
from mixgrpo.types import Metadata

# Lines that the recogniser is less sure of do not count; RapidOCR applies its own limit, which is
# the same, only to lines that its detector found.
_LEAST_SURE = 0.5


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
        detect: find lines of text anywhere in the image. False reads the whole image as one line,
            many times faster; the line must then fill at least a quarter of the image's height.
    """

    def __init__(self, *, threads: int = 0, key: str | None = None, detect: bool = True) -> None:
        self.wanted = WantedText("ocr", key)
        self.detect = options.flag("ocr", "detect", detect)
        self.threads = options.whole("ocr", "threads", threads, 0) or torch.get_num_threads()
        self.readers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(self.threads):
            self.readers.put(_make_reader(self.detect))

    @staticmethod
    def uses_metadata(*, key: str | None = None, **_: Any) -> bool:
        """Whether scores depend on the prompts' metadata."""
        return key is not None

    @staticmethod
    def unscorable(text: str, metadata: Metadata, *, key: str | None = None, **_: Any) -> str:
        """Why images of this prompt have no score; empty if they have one."""
        return WantedText("ocr", key).why_missing(text, metadata)

    def __call__(
        self, images: Tensor, texts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> Tensor:
        """images [B, 3, H, W] in [0, 1], B texts -> [B] float32, NaN if there is no text to read.

        metadata: that of the B prompts; only used with ``key``.
        """
        targets = self.wanted(texts, metadata)
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
            found = reader(np.ascontiguousarray(picture[:, :, ::-1]))  # blue first
        finally:
            self.readers.put(reader)
        lines = zip(found.txts or (), found.scores or (), strict=True)
        return " ".join(line for line, sure in lines if sure >= _LEAST_SURE)


def _make_reader(detect: bool) -> Any:
    from rapidocr import RapidOCR

    # Each reader uses one thread, because readers run concurrently: recognising several images in
    # one batch takes as long for each of them. The log level suppresses RapidOCR's warning about
    # images without text.
    one_thread = {
        f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")
    }
    settings = {"Global.log_level": "critical", "Global.use_det": detect}
    return RapidOCR(params={**one_thread, **settings})
