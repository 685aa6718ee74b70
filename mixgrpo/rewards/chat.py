"""Client that sends questions about images to OpenAI-compatible servers.

Requests are concurrent and retried, and a batch always returns within its deadline.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import functools
import io
import json
import random
import re
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx
import numpy as np
from numpy.typing import NDArray

from mixgrpo.rewards import excerpts
from mixgrpo.rewards.completion import LARGEST, Failure, PassingFailure, answer_in, decoded

_MAX_BACKOFF = 30.0
# Seconds that the event loop may need after the deadline to cancel pending requests.
_GRACE = 5.0
_SHOWN = 200
# Not the global generator: retries must not change the random numbers of a seeded run.
_JITTER = random.Random()


class Question(NamedTuple):
    """A text and the image [H, W, 3] uint8 that it asks about."""

    text: str
    picture: NDArray[np.uint8]


@dataclass(frozen=True)
class Server:
    """The servers to which questions are sent, and the limits of each request.

    Attributes:
        urls: the URL of ``/v1/chat/completions`` on each host; requests use them in turn.
        body: the fields of every request apart from its messages.
        image_format: png or jpeg.
        key: sent as a bearer token; None sends none.
        concurrency: maximum number of concurrent requests.
        timeout: seconds per attempt, from connecting to the last byte.
        retries: number of retries after a PassingFailure.
        backoff: seconds before the first retry; it doubles with each retry, up to 30, with jitter.
        deadline: seconds for all questions of one ``ask_all``.
        takes_empty: whether an empty reply is an answer, not a failure.
    """

    urls: tuple[str, ...]
    body: Mapping[str, Any]
    image_format: str
    key: str | None = field(repr=False)
    concurrency: int
    timeout: float
    retries: int
    backoff: float
    deadline: float
    takes_empty: bool = False

    def beginning(self, text: str) -> str:
        """The beginning of what a server said, for a message: one line, without the key."""
        return excerpts.beginning(text, self.key, _SHOWN)

    def end(self, text: str) -> str:
        """The end of what a server said, in the same way."""
        return excerpts.end(text, self.key, _SHOWN // 2)


def ask_all(server: Server, questions: Sequence[Question], turn: int) -> list[str | Failure]:
    """Returns the answers in the order of the questions, with a Failure for each missing one.

    ``turn`` is the index of the URL that the first question uses; the other questions use the URLs
    in turn. Returns by the deadline, whatever the servers do.
    """
    late = Failure("no answer within the batch's deadline", f"{server.deadline:g} s")
    answers: list[str | Failure] = [late] * len(questions)
    finished = threading.Event()

    async def run() -> None:
        try:
            await _fill(answers, server, questions, turn)
        except Exception as error:  # of the client itself, such as an unusable proxy
            broken = Failure(type(error).__name__, server.beginning(str(error)))
            answers[:] = [broken if answer is late else answer for answer in answers]
        finally:
            finished.set()

    # In a separate thread, because the caller may be inside an event loop (a notebook); a daemon
    # thread, so that a hanging name server blocks neither the batch nor the end of the program.
    threading.Thread(target=lambda: asyncio.run(run()), daemon=True).start()
    finished.wait(server.deadline + _GRACE)
    return list(answers)


async def _fill(
    answers: list[str | Failure], server: Server, questions: Sequence[Question], turn: int
) -> None:
    slots = asyncio.Semaphore(server.concurrency)
    until = time.monotonic() + server.deadline
    settings: dict[str, Any] = {
        "verify": _certificates(),
        "timeout": None,  # see _try
        "limits": httpx.Limits(max_connections=server.concurrency),
        "headers": headers(server),
    }
    async with httpx.AsyncClient(**settings) as client:

        async def answer(index: int) -> None:
            async with slots:
                try:
                    answers[index] = await _ask(
                        client, server, questions[index], turn + index, until
                    )
                except Failure as failure:
                    answers[index] = failure
                except Exception as error:
                    answers[index] = Failure(type(error).__name__, server.beginning(str(error)))

        tasks = [asyncio.create_task(answer(index)) for index in range(len(questions))]
        _, pending = await asyncio.wait(tasks, timeout=server.deadline)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def headers(server: Server) -> dict[str, str]:
    """The headers of every request."""
    key = {"Authorization": f"Bearer {server.key}"} if server.key else {}
    return {"Accept-Encoding": "identity", "Content-Type": "application/json", **key}


@functools.cache
def _certificates() -> ssl.SSLContext:
    """The TLS context, created once: reading the certificates takes longer than a request."""
    return httpx.create_ssl_context()


async def _ask(
    client: httpx.AsyncClient, server: Server, question: Question, turn: int, until: float
) -> str:
    """Returns one answer; retries as long as that may help and the deadline allows it."""
    body = await asyncio.to_thread(_body, server, question)
    attempt = 0
    while True:
        url = server.urls[(turn + attempt) % len(server.urls)]
        try:
            return await _try(client, server, url, body)
        except PassingFailure as failure:
            wait = max(failure.wait, _backoff(server, attempt))
            attempt += 1
            if attempt > server.retries or time.monotonic() + wait > until:
                raise
        await asyncio.sleep(wait)


def _backoff(server: Server, attempt: int) -> float:
    """The exponential backoff times a factor in [0.5, 1], so that clients do not retry in step."""
    return min(_MAX_BACKOFF, server.backoff * 2**attempt) * _JITTER.uniform(0.5, 1.0)


def _body(server: Server, question: Question) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    # Compression level 1 halves the time and adds a tenth to the size; JPEG quality 95 is as good
    # as lossless here.
    settings = {"compress_level": 1} if server.image_format == "png" else {"quality": 95}
    Image.fromarray(question.picture).save(buffer, format=server.image_format, **settings)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    picture = {"url": f"data:image/{server.image_format};base64,{data}"}
    content = [
        {"type": "image_url", "image_url": picture},
        {"type": "text", "text": question.text},
    ]
    body = {**server.body, "messages": [{"role": "user", "content": content}]}
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        detail = "it contains half of a surrogate pair; correct the prompt"
        raise Failure("the prompt is not valid Unicode", detail) from error


async def _try(client: httpx.AsyncClient, server: Server, url: str, body: bytes) -> str:
    try:
        # httpx's own timeouts restart with every byte; this one does not.
        async with (
            asyncio.timeout(server.timeout),
            client.stream("POST", url, content=body) as response,
        ):
            raw = await _read(response)
    except TimeoutError as error:
        raise PassingFailure("timeout", f"{url} took over {server.timeout:g} s") from error
    except httpx.TransportError as error:
        reason = server.beginning(str(error)) or type(error).__name__
        raise PassingFailure("no connection", f"{url}: {reason}") from error
    if response.status_code != httpx.codes.OK:
        raise _refusal(server, url, response, raw)
    try:
        content = decoded(raw, response.headers)
        return answer_in(content, server.beginning, server.takes_empty)
    except Failure as failure:
        raise Failure(failure.cause, f"{url}: {failure.detail}") from failure


async def _read(response: httpx.Response) -> bytes:
    """The reply as it was sent, or its beginning if it is larger than ``LARGEST``."""
    raw = bytearray()
    async for part in response.aiter_raw():
        raw += part
        if len(raw) > LARGEST:
            break
    return bytes(raw)


def _refusal(server: Server, url: str, response: httpx.Response, raw: bytes) -> Failure:
    status = response.status_code
    location = response.headers.get("Location")
    try:
        said = server.beginning(decoded(raw, response.headers).decode(errors="replace"))
    except Failure as failure:
        said = str(failure)
    if response.is_redirect and location:
        said = f"a redirection to {server.beginning(location)}; correct the address in urls"
    detail = f"{url}: {said}"
    if status == httpx.codes.TOO_MANY_REQUESTS or status >= httpx.codes.INTERNAL_SERVER_ERROR:
        wait = _retry_after(response.headers.get("Retry-After", ""))
        return PassingFailure(f"HTTP {status}", detail, wait)
    return Failure(f"HTTP {status}", detail)


def _retry_after(value: str) -> float:
    """Seconds to wait from either form of the header (RFC 9110, 10.2.3); 0 if it is neither."""
    if re.fullmatch(r"\s*[0-9]+\s*", value):
        return float(value)
    try:
        then = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError, OSError):
        return 0.0
    return max(0.0, then - time.time())
