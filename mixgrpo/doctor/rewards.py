"""Checks of the rewards: their files and options, and whether a judge's servers answer."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from mixgrpo.config import Config, RewardConfig
from mixgrpo.doctor.lines import Line, error, fetching, ok, size, warning
from mixgrpo.files.weight_sets import find_shards
from mixgrpo.rewards import chat
from mixgrpo.rewards.completion import LARGEST, Failure, decoded
from mixgrpo.rewards.registry import check_call
from mixgrpo.rewards.vlm import Vlm
from mixgrpo.rewards.weights import NotReadable
from mixgrpo.run.scorable import options_of

TIMEOUT = 3.0  # seconds, for one server
_REFUSED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


def check_rewards(config: Config, processes: int) -> Iterator[Line]:
    for name, knobs in config.rewards.items():
        try:
            yield from _check(name, knobs)
        except NotReadable as caught:
            text = f"{name}: {caught}, so its weights are only checked when they are loaded"
            yield warning("rewards", text, "use a .safetensors file, which can be checked")
        except (ValueError, OSError) as caught:
            wanted = knobs.checkpoint or knobs.model or ""
            otherwise = (
                f"set --rewards.{name}.model and --rewards.{name}.checkpoint to existing files"
            )
            yield error("rewards", f"{name}: {caught}", fetching(wanted, otherwise))


def _check(name: str, knobs: RewardConfig) -> Iterator[Line]:
    options = options_of(knobs)
    target = check_call(knobs.kind, options)
    held_out = ", held out" if not knobs.weight else ""
    if knobs.kind == "vlm":
        yield from _check_servers(name, Vlm(**options))
    elif hasattr(target, "check_files"):
        file: Path = target.check_files(**options)
        files = find_shards(file) if file.suffix == ".json" else [file]
        total = size(sum(each.stat().st_size for each in files))
        yield ok("rewards", f"{name}: {total}, weight names and shapes fit the model{held_out}")
    else:
        yield ok("rewards", f"{name}: {knobs.kind} is importable{held_out}")


def _check_servers(name: str, judge: Vlm) -> Iterator[Line]:
    for url in judge.server.urls:
        yield _check_server(name, url, judge)


def _check_server(name: str, url: str, judge: Vlm) -> Line:
    listing = url.removesuffix("/chat/completions") + "/models"
    try:
        status, models = _ask(listing, judge)
    except (httpx.HTTPError, httpx.InvalidURL) as caught:
        return error(
            "rewards",
            f"{name}: {listing} does not answer within {TIMEOUT:g} s ({type(caught).__name__})",
            f"start the server, or set --rewards.{name}.options.urls to its address",
        )
    if status in _REFUSED:
        sent = "the key that it was sent" if judge.server.key else "a request without a key"
        remedy = "export the key in the variable that the reward's option api_key_env names"
        return error("rewards", f"{name}: {listing} refuses {sent}", remedy)
    wanted = judge.server.body.get("model")
    if models is not None and wanted not in models:
        served = judge.server.beginning(", ".join(models[:5])) or "no model"
        return warning(
            "rewards",
            f"{name}: {listing} serves {served}, not {wanted}",
            f"set --rewards.{name}.model to one of them",
        )
    return ok("rewards", f"{name}: {listing} answers (HTTP {status})")


def _ask(listing: str, judge: Vlm) -> tuple[int, list[str] | None]:
    """The status of a server's reply and the names of its models, None if it does not list them."""
    headers, until = chat.headers(judge.server), time.monotonic() + TIMEOUT
    raw = bytearray()
    with httpx.stream("GET", listing, headers=headers, timeout=TIMEOUT) as response:
        for part in response.iter_raw():
            raw += part
            if len(raw) > LARGEST:
                break
            if time.monotonic() > until:
                raise httpx.ReadTimeout("the reply does not end")
    try:
        models: list[dict[str, Any]] = json.loads(decoded(bytes(raw), response.headers))["data"]
        return response.status_code, [str(model["id"]) for model in models]
    except (Failure, ValueError, LookupError, TypeError, RecursionError):
        return response.status_code, None
