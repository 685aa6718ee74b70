"""Checks of the rewards: their files and options, and whether a judge's servers answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from mixgrpo.config import Config, RewardConfig
from mixgrpo.doctor.lines import Line, error, fetching, ok, size, warning
from mixgrpo.files.weight_files import find_shards
from mixgrpo.rewards.registry import check_call
from mixgrpo.rewards.vlm import Vlm
from mixgrpo.rewards.weights import NotReadable

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


def options_of(knobs: RewardConfig) -> dict[str, Any]:
    """The arguments with which the reward is constructed."""
    given = {"model": knobs.model, "checkpoint": knobs.checkpoint}
    return {key: value for key, value in given.items() if value is not None} | knobs.options


def _check_servers(name: str, judge: Vlm) -> Iterator[Line]:
    for url in judge.server.urls:
        yield _check_server(name, url, judge)


def _check_server(name: str, url: str, judge: Vlm) -> Line:
    key = judge.server.key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    listing = url.removesuffix("/chat/completions") + "/models"
    try:
        found = httpx.get(listing, headers=headers, timeout=TIMEOUT)
    except (httpx.HTTPError, httpx.InvalidURL) as caught:
        return error(
            "rewards",
            f"{name}: {listing} does not answer within {TIMEOUT:g} s ({type(caught).__name__})",
            f"start the server, or set --rewards.{name}.options.urls to its address",
        )
    if found.status_code in _REFUSED:
        sent = "the key that it was sent" if key else "a request without a key"
        remedy = "export the key in the variable that the reward's option api_key_env names"
        return error("rewards", f"{name}: {listing} refuses {sent}", remedy)
    models = _listed(found)
    wanted = judge.server.body.get("model")
    if models is not None and wanted not in models:
        return warning(
            "rewards",
            f"{name}: {listing} serves {', '.join(models[:5]) or 'no model'}, not {wanted}",
            f"set --rewards.{name}.model to one of them",
        )
    return ok("rewards", f"{name}: {listing} answers (HTTP {found.status_code})")


def _listed(response: httpx.Response) -> list[str] | None:
    """The names of the served models; None where the server does not list them."""
    try:
        models: list[dict[str, Any]] = response.json()["data"]
        return [str(model["id"]) for model in models]
    except (ValueError, LookupError, TypeError):
        return None
