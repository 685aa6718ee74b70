"""Scores from a vision-language model behind an OpenAI-compatible endpoint.

Examples are UnifiedReward (arXiv 2503.05236) served by vLLM or SGLang, and any other judge that
takes an image and replies with a number; and models that read the text in an image.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mixgrpo.rewards import options
from mixgrpo.rewards.chat import Question, Server, ask_all
from mixgrpo.rewards.completion import Failure
from mixgrpo.rewards.images import to_uint8
from mixgrpo.rewards.rendered_text import WantedText
from mixgrpo.rewards.vlm_server import read_api_key, read_request, read_urls
from mixgrpo.rewards.vlm_tasks import JUDGE, TRANSCRIBE, make_task
from mixgrpo.types import Metadata

logger = logging.getLogger(__name__)

# Upper limits of options. A larger number can only be a mistake, or seconds given in milliseconds.
_TOKENS = 1_000_000
_CONCURRENT = 1024  # each request is an open connection
_RETRIES = 100
_SECONDS = 24 * 3600.0
_FORMATS = ("png", "jpeg")


class JudgeError(RuntimeError):
    """No sample of a batch could be scored."""


class Vlm:
    """The number that a judge replies with, or how well the text that the model reads is the one.

    With the task ``judge``, the score is the number in the reply, unchanged: 1 to 5 for
    UnifiedReward. With ``transcribe``, the model writes down the text that it sees, and the score
    is computed as that of ``ocr``, from 0 to 1; that of a prompt without a text is NaN.

    Each image is one request. With several ``urls``, requests use them in turn: process r (RANK)
    begins with the r-th URL, and a retry uses the next one, so that an unavailable server costs
    time but no samples. The score of a sample that fails is NaN; one warning per batch counts the
    causes. If no sample of a batch could be scored, JudgeError is raised: ``score`` turns it into
    NaNs, or ends the run if the judge has never answered.

    The API key is read from the environment; none is sent if the variable is not set.

    Args:
        urls: the URL of the server, or a list of them: ``http://host:8000``, with or without
            ``/v1`` or ``/v1/chat/completions``.
        model: the model's name on the servers.
        task: judge or transcribe.
        template: the question. Of a judge, ``{prompt}`` is replaced by the text, ``{min}`` and
            ``{max}`` by the range.
        pattern: of a judge: regular expression with a group ``score`` for the score; the value of a
            group ``of``, as in 4/5, must equal ``max``. All matches must give the same score. The
            model's reasoning, ``<think>...</think>``, is removed first.
        min: of a judge: lowest accepted score, at least -1e6; by default 1.
        max: of a judge: highest accepted score, at most 1e6; by default 5.
        rescale: of a judge: return (score - min) / (max - min) instead.
        key: to transcribe: key of the prompts' metadata that holds the text, in place of what the
            prompt quotes.
        image_format: png or jpeg (quality 95, a fifth of the size).
        max_tokens: maximum number of tokens in a reply, at most 1,000,000; a reply that reaches it
            has no score. By default 512 for a judge and 4096 to transcribe.
        request: additional fields of the request body; null removes a field. By default the body
            has ``model``, ``max_tokens`` and, for a judge, ``temperature`` 0, to transcribe,
            ``temperature`` 0.7 and ``top_p`` 0.8.
        api_key_env: name of the environment variable that holds the API key.
        concurrency: maximum number of concurrent requests per process, at most 1024.
        timeout: seconds per attempt of a request; like ``backoff`` and ``deadline`` at most a day.
        retries: number of retries after 429, 5xx, a lost connection or a timeout, at most 100.
        backoff: seconds before the first retry, doubled with each retry, up to 30; the server's
            Retry-After is used if it is longer.
        deadline: seconds for one call, which is one scoring.micro_batch; scores that are missing by
            then are NaN. Keep it below the time that processes wait for each other (NCCL: 10
            minutes).
    """

    def __init__(
        self,
        *,
        urls: str | Sequence[str],
        model: str,
        task: str = JUDGE,
        template: str | None = None,
        pattern: str | None = None,
        min: float | None = None,
        max: float | None = None,
        rescale: bool | None = None,
        key: str | None = None,
        image_format: str = "png",
        max_tokens: int | None = None,
        request: Mapping[str, Any] | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        deadline: float = 300.0,
    ) -> None:
        of_task = {"pattern": pattern, "min": min, "max": max, "rescale": rescale, "key": key}
        self.task = make_task(task, {"template": template, **of_task})
        if image_format not in _FORMATS:
            raise ValueError(
                f"vlm: image_format must be png or jpeg, got {options.shown(image_format)}"
            )
        tokens = self.task.max_tokens if max_tokens is None else max_tokens
        body = {
            "model": options.text("vlm", "model", model),
            **self.task.body,
            "max_tokens": options.whole("vlm", "max_tokens", tokens, 1, _TOKENS),
            **read_request(request),
        }
        self.server = Server(
            urls=read_urls(urls),
            body={name: value for name, value in body.items() if value is not None},
            image_format=image_format,
            key=read_api_key(api_key_env),
            concurrency=options.whole("vlm", "concurrency", concurrency, 1, _CONCURRENT),
            timeout=options.positive("vlm", "timeout", timeout, _SECONDS),
            retries=options.whole("vlm", "retries", retries, 0, _RETRIES),
            backoff=options.positive("vlm", "backoff", backoff, _SECONDS),
            deadline=options.positive("vlm", "deadline", deadline, _SECONDS),
            takes_empty=self.task.takes_empty,
        )
        self.turn = int(os.environ.get("RANK", "0"))

    @staticmethod
    def uses_metadata(*, key: str | None = None, **_: Any) -> bool:
        """Whether scores depend on the prompts' metadata."""
        return key is not None

    @staticmethod
    def unscorable(
        text: str, metadata: Metadata, *, task: str = JUDGE, key: str | None = None, **_: Any
    ) -> str:
        """Why images of this prompt have no score; empty if they have one."""
        return WantedText("vlm", key).why_missing(text, metadata) if task == TRANSCRIBE else ""

    def __call__(
        self, images: Tensor, texts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> Tensor:
        """images [B, 3, H, W] in [0, 1], B texts -> [B] float32, NaN where there is no score.

        metadata: that of the B prompts; only used with ``key``.

        Raises:
            JudgeError: if none of the images that were asked about could be scored.
        """
        subjects = dict(enumerate(self.task.subjects(texts, metadata)))
        asked = {i: subject for i, subject in subjects.items() if subject is not None}
        pictures = to_uint8(images)
        questions = [Question(self.task.question(asked[i]), pictures[i]) for i in asked]
        answers = ask_all(self.server, questions, self.turn)
        self.turn += len(questions)
        results = {
            i: self._score(answer, asked[i]) for i, answer in zip(asked, answers, strict=True)
        }
        _report(results)
        scores = {i: result for i, result in results.items() if not isinstance(result, Failure)}
        values = [scores.get(i, math.nan) for i in subjects]
        return torch.tensor(values, dtype=torch.float32, device=images.device)

    def _score(self, answer: str | Failure, subject: str) -> float | Failure:
        if isinstance(answer, Failure):
            return answer
        score = self.task.score(answer, subject)
        if isinstance(score, Failure):
            ends = f"the reply ends {self.server.end(answer)!r}"
            return Failure(score.cause, f"{score.detail}; {ends}" if score.detail else ends)
        return score


def _report(results: Mapping[int, float | Failure]) -> None:
    """Reports why samples failed: in one warning or, if all of them failed, as a JudgeError."""
    failed = [(i, result) for i, result in results.items() if isinstance(result, Failure)]
    if not failed:
        return
    causes = Counter(failure.cause for _, failure in failed)
    counted = ", ".join(f"{count} x {cause}" for cause, count in causes.most_common())
    first, failure = failed[0]
    message = (
        f"vlm: {len(failed)} of {len(results)} images could not be scored ({counted}); the first "
        f"failure, on image {first}: {failure}"
    )
    if len(failed) == len(results):
        raise JudgeError(message)
    logger.warning(message)
