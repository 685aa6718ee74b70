"""Replies of OpenAI-compatible servers: their size, their form, and the one answer in them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any

import httpx

# Bytes of a reply, also after decompression: a thousand times what judges write.
LARGEST = 4 * 2**20
# How servers say that the model ended its reply itself. Small servers omit the field, or send null.
_ENDED = (None, "stop", "eos", "eos_token", "stop_sequence", "end_turn")


class Failure(Exception):
    """Why a question has no answer: a ``cause``, which is counted, and a ``detail``."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.detail = detail


class PassingFailure(Failure):
    """A failure that a retry may resolve, after at least ``wait`` seconds."""

    def __init__(self, cause: str, detail: str = "", wait: float = 0.0) -> None:
        super().__init__(cause, detail)
        self.wait = wait


def decoded(raw: bytes, headers: httpx.Headers) -> bytes:
    """The content of a reply.

    It is decompressed here, although the requests ask for none that is compressed: httpx would
    decompress without a limit.

    Raises:
        Failure: if it is larger than ``LARGEST`` or cannot be decompressed.
    """
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    content = raw
    if encoding in ("gzip", "x-gzip", "deflate"):
        unzip = zlib.decompressobj(zlib.MAX_WBITS | 32)  # either format, by its header
        try:
            content = unzip.decompress(raw, LARGEST + 1)
        except zlib.error as error:
            raise Failure("the reply cannot be decompressed", str(error)) from error
        if not unzip.eof and len(content) <= LARGEST:
            raise Failure("the reply cannot be decompressed", "it is incomplete")
    elif encoding not in ("", "identity"):
        raise Failure("the reply cannot be decompressed", "only gzip and deflate are understood")
    if len(content) > LARGEST:
        raise Failure("the reply is too large", f"over {LARGEST // 2**20} MiB")
    return content


def answer_in(content: bytes, excerpt: Callable[[str], str], takes_empty: bool = False) -> str:
    """Returns the answer in a chat completion, which must hold exactly one, and a complete one.

    With ``takes_empty``, an empty text is an answer as well; null never is.

    Raises:
        Failure: if it does not; its detail has an ``excerpt`` of the content.
    """
    try:
        completion = json.loads(content)
        message, reason = _only_choice(completion)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Failure("the reply is not a chat completion", excerpt(_text(content))) from error
    except Failure as failure:
        raise Failure(failure.cause, failure.detail or excerpt(_text(content))) from failure
    if (reason.lower() if isinstance(reason, str) else reason) not in _ENDED:
        remedy = "; raise max_tokens" if reason == "length" else ""
        told = f"its finish_reason is {excerpt(str(reason))!r}{remedy}"
        raise Failure("the reply is incomplete", told)
    empty = isinstance(message, str) and not message.strip()
    if message is None or (empty and not takes_empty):
        raise Failure("the reply is empty", excerpt(_text(content)))
    if not isinstance(message, str):
        raise Failure("the reply is not a chat completion", excerpt(_text(content)))
    return message


def _only_choice(completion: Any) -> tuple[Any, Any]:
    """The content of the only choice, and why it ended."""
    choices = completion.get("choices")
    if completion.get("error") or (choices and choices[0].get("error")):
        raise Failure("the server reports an error")
    choice, *others = choices
    if others:
        raise Failure("several choices in the reply", "only one can be scored")
    return choice["message"]["content"], choice.get("finish_reason")


def _text(content: bytes) -> str:
    return content.decode(errors="replace")
