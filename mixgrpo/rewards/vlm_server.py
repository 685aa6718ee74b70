"""Checks of the options that say which servers a vision-language model answers at."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from mixgrpo.rewards import options

# Fields of a request that decide the form of the reply, and the only value that can be read.
_FIXED = {"stream": False, "n": 1}
_PATH = "/v1/chat/completions"


def read_urls(urls: str | Sequence[str]) -> tuple[str, ...]:
    """The URL of ``/v1/chat/completions`` of each server.

    Each function here raises a ValueError that names the option and says how to mend it.
    """
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


def read_request(fields: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The additional fields of a request, which can be sent as JSON."""
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


def read_api_key(variable: str) -> str | None:
    """The API key in the environment variable of this name; None if it is not set."""
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
