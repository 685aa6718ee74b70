"""Scores from a vision-language model behind an OpenAI-compatible endpoint.

Examples are UnifiedReward (arXiv 2503.05236) served by vLLM or SGLang, and any other judge that
takes an image and replies with a number.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from torch import Tensor

from mixgrpo.rewards import options
from mixgrpo.rewards.chat import Question, Server, ask_all
from mixgrpo.rewards.completion import Failure
from mixgrpo.rewards.images import to_uint8
from mixgrpo.rewards.verdict import PATTERN, read_score

logger = logging.getLogger(__name__)

TEMPLATE = """\
The picture was made by a model from this text:

{prompt}

Judge the picture against the text. Does it show everything that the text asks for: the objects, \
how many they are, their properties, where they are, the style? Is it coherent, without broken \
shapes or blurred details, and good to look at? Say in a few sentences what speaks for and against \
it. Then end with one line of exactly this form, where X is a number from {min} (does not fit the \
text at all) to {max} (fits it perfectly and looks flawless), decimals allowed:

Final Score: X"""

# Upper limits of options. A larger number can only be a mistake, or seconds given in milliseconds.
_SCORES = 1e6
_TOKENS = 1_000_000
_CONCURRENT = 1024  # each request is an open connection
_RETRIES = 100
_SECONDS = 24 * 3600.0
# Fields of a request that decide the form of the reply, and the only value that can be read.
_FIXED = {"stream": False, "n": 1}
_FORMATS = ("png", "jpeg")
_PATH = "/v1/chat/completions"


class JudgeError(RuntimeError):
    """No sample of a batch could be scored."""


class Vlm:
    """The number that the judge replies with, unchanged: 1 to 5 for UnifiedReward.

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
        template: the question; ``{prompt}`` is replaced by the text, ``{min}`` and ``{max}`` by the
            range.
        pattern: regular expression with a group ``score`` for the score; the value of a group
            ``of``, as in 4/5, must equal ``max``. All matches must give the same score. The model's
            reasoning, ``<think>...</think>``, is removed first.
        min: lowest accepted score; at least -1e6.
        max: highest accepted score; at most 1e6.
        rescale: return (score - min) / (max - min) instead.
        image_format: png or jpeg (quality 95, a fifth of the size).
        max_tokens: maximum number of tokens in a reply, at most 1,000,000; a reply that reaches it
            has no score.
        request: additional fields of the request body; null removes a field. By default the body
            has ``model``, ``temperature`` 0 and ``max_tokens``.
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
        template: str = TEMPLATE,
        pattern: str = PATTERN,
        min: float = 1.0,
        max: float = 5.0,
        rescale: bool = False,
        image_format: str = "png",
        max_tokens: int = 512,
        request: Mapping[str, Any] | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        deadline: float = 300.0,
    ) -> None:
        self.low = options.number("vlm", "min", min, _SCORES)
        self.high = options.number("vlm", "max", max, _SCORES)
        if self.low >= self.high:
            raise ValueError(f"vlm: min ({min:.15g}) must be below max ({max:.15g})")
        if image_format not in _FORMATS:
            raise ValueError(
                f"vlm: image_format must be png or jpeg, got {options.shown(image_format)}"
            )
        body = {
            "model": options.text("vlm", "model", model),
            "temperature": 0,
            "max_tokens": options.whole("vlm", "max_tokens", max_tokens, 1, _TOKENS),
            **_request(request),
        }
        self.server = Server(
            urls=_urls(urls),
            body={name: value for name, value in body.items() if value is not None},
            image_format=image_format,
            key=_key(api_key_env),
            concurrency=options.whole("vlm", "concurrency", concurrency, 1, _CONCURRENT),
            timeout=options.positive("vlm", "timeout", timeout, _SECONDS),
            retries=options.whole("vlm", "retries", retries, 0, _RETRIES),
            backoff=options.positive("vlm", "backoff", backoff, _SECONDS),
            deadline=options.positive("vlm", "deadline", deadline, _SECONDS),
        )
        self.template = _template(template, self.low, self.high)
        self.pattern = _pattern(pattern)
        self.rescale = options.flag("vlm", "rescale", rescale)
        self.turn = int(os.environ.get("RANK", "0"))

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1], B texts -> [B] float32, NaN where there is no score.

        Raises:
            JudgeError: if no image could be scored.
        """
        questions = [
            Question(self.template.replace("{prompt}", text), picture)
            for text, picture in zip(texts, to_uint8(images), strict=True)
        ]
        answers = ask_all(self.server, questions, self.turn)
        self.turn += len(questions)
        results = [self._score(answer) for answer in answers]
        _report(results)
        values = [math.nan if isinstance(result, Failure) else result for result in results]
        return torch.tensor(values, dtype=torch.float32, device=images.device)

    def _score(self, answer: str | Failure) -> float | Failure:
        if isinstance(answer, Failure):
            return answer
        score = read_score(answer, self.pattern, self.low, self.high)
        if isinstance(score, Failure):
            ends = f"the reply ends {self.server.end(answer)!r}"
            return Failure(score.cause, f"{score.detail}; {ends}" if score.detail else ends)
        return (score - self.low) / (self.high - self.low) if self.rescale else score


def _report(results: Sequence[float | Failure]) -> None:
    """Reports why samples failed: in one warning or, if all of them failed, as a JudgeError."""
    failed = [(i, result) for i, result in enumerate(results) if isinstance(result, Failure)]
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


# --- options ----------------------------------------------------------------------------------


def _urls(urls: str | Sequence[str]) -> tuple[str, ...]:
    given = [urls] if isinstance(urls, str) else urls
    if not isinstance(given, Sequence) or not all(isinstance(url, str) for url in given):
        raise ValueError("vlm: urls must be a list of strings such as http://host:8000")
    if not given:
        raise ValueError("vlm: urls is empty; name at least one server, such as http://host:8000")
    return tuple(_url(url) for url in given)


def _url(url: str) -> str:
    # The URL is not shown, because it may contain a password.
    if set(url) & set("@?#"):
        raise ValueError(
            "vlm: a URL must have the form http://host:8000, without user, password or query; "
            "put the key into an environment variable (api_key_env)"
        )
    try:
        if not url.isprintable() or " " in url:
            raise ValueError("it contains white space or control characters")
        parts = urlsplit(url)
        _ = parts.port, httpx.URL(url), (parts.hostname or "").encode("idna")
    except (ValueError, httpx.InvalidURL) as error:
        raise ValueError(
            f"vlm: {options.shown(url)} is not a URL ({error}); write it as http://host:8000"
        ) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"vlm: {options.shown(url)} is not the URL of a server; write it as http://host:8000"
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}{_PATH}"


def _request(fields: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if fields is None:
        return {}
    named = isinstance(fields, Mapping) and all(isinstance(name, str) for name in fields)
    if not named or "messages" in fields:
        raise ValueError(
            "vlm: request must be a mapping of named fields other than messages, got "
            f"{options.shown(fields)}; put the text of the question into template"
        )
    for name, value in _FIXED.items():
        if fields.get(name) not in (None, value):
            raise ValueError(
                f"vlm: request must not set {name} to {options.shown(fields[name])}, because a "
                "reply must be one whole message; remove it"
            )
    try:
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"vlm: request cannot be sent as JSON ({error}); correct its values"
        ) from error
    return fields


def _key(variable: str) -> str | None:
    # The value is not shown, because it may be the key itself.
    if not isinstance(variable, str) or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise ValueError(
            "vlm: api_key_env must be the name of an environment variable, in capitals, such as "
            "OPENAI_API_KEY; export the key under that name and keep it out of the recipe"
        )
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"vlm: the key in {variable} has characters that no key contains; set it again"
        )
    return key or None


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
