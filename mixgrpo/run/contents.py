"""Digests of the files that a run reads: resuming it needs the same contents, at whatever paths."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from mixgrpo.config import Config, dotted
from mixgrpo.engines.distributed import Process, gather_objects
from mixgrpo.files.fingerprint import fingerprint, fingerprint_files
from mixgrpo.files.sources import identify
from mixgrpo.rewards.registry import KNOWN

PREFIX = "contents."
_MOST = 1000  # files in a folder; models have fewer, and data sets would take long


def read_contents(config: Config, process: Process) -> dict[str, str]:
    """The result of ``contents_of`` on every process; only the first one reads.

    Raises:
        OSError: on every process.
    """
    found, fault = {}, None
    if process.rank == 0:
        try:
            found = contents_of(config)
        except OSError as error:
            fault = OSError(f"{error.filename} cannot be read ({error.strerror}); make it readable")
    found, fault = gather_objects(process, (found, fault))[0]
    if fault is not None:
        raise fault
    return found


def contents_of(config: Config) -> dict[str, str]:
    """``contents.`` and a knob -> digest of the files that the knob names.

    The knobs are those of the prompts, the model, and the rewards with the paths among their
    options; ``contents.rewards.NAME.code`` is for the sources of a reward of the user's own.
    What does not exist is left out, since loading it reports that.

    Raises:
        OSError: a file cannot be read.
    """
    found: dict[str, str | None] = {
        "batch.prompts_file": _digest_of_prompts(config.batch.prompts_file),
        "validation.prompts_file": _digest_of_prompts(config.validation.prompts_file),
        "model.path": _digest_of_model(config),
    }
    digest_of_code = functools.cache(_digest_of_code)  # rewards may share a module
    for name, knobs in config.rewards.items():
        for knob, value in dotted(asdict(knobs)).items():
            if knob.partition(".")[0] in ("model", "checkpoint", "options"):
                found[f"rewards.{name}.{knob}"] = _digest_of_paths(value)
        if knobs.kind not in KNOWN:
            found[f"rewards.{name}.code"] = digest_of_code(knobs.kind.partition(":")[0])
    return {f"{PREFIX}{key}": digest for key, digest in found.items() if digest is not None}


def _digest_of_prompts(file: str) -> str | None:
    if not os.path.isfile(file):
        return None
    return _digest(Path(file).read_bytes())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _digest_of_model(config: Config) -> str | None:
    from mixgrpo.models.policy import DiffusersPolicy  # imports diffusers, which takes seconds

    try:
        parts = DiffusersPolicy.identify(config.model)
    except FileNotFoundError:
        return None
    return _digest(json.dumps(parts, sort_keys=True).encode())


def _digest_of_code(module: str) -> str | None:
    sources = identify([module])
    return _digest(json.dumps(sources).encode()) if sources else None


def _digest_of_paths(value: Any) -> str | None:
    """Of a path or a list of paths; None for any other value."""
    words = value if isinstance(value, list) else [value]
    if not words or not all(isinstance(word, str) and word for word in words):
        return None
    digests = [_digest_of_path(word) for word in words]
    return None if None in digests else "-".join(map(str, digests))


def _digest_of_path(word: str) -> str | None:
    name = os.path.expanduser(word)
    if os.path.isfile(name):  # unlike Path.is_file, False for text that cannot be a path
        return fingerprint_files([Path(name)])
    is_model = os.path.isdir(name) and len(list(islice(Path(name).rglob("*"), _MOST + 1))) <= _MOST
    return fingerprint(Path(name)) if is_model else None


def binding(
    saved: Mapping[str, Any], config: Config, contents: Mapping[str, str]
) -> dict[str, str]:
    """The digests that must be those of the saved run.

    An option of a reward of the user's own may name a file that changes, such as a cache. Unless
    the path is another one, its contents are not compared.
    """
    free, now = _free(config), dotted(asdict(config))
    return {
        key: digest
        for key, digest in contents.items()
        if not key.startswith(free) or saved.get(_knob(key)) != now.get(_knob(key))
    }


def changes(saved: Mapping[str, Any], config: Config, contents: Mapping[str, str]) -> Iterator[str]:
    """A warning for every file of the user's own rewards that changed since the run was saved."""
    free = _free(config)
    for key, digest in contents.items():
        if key.startswith(free) and saved.get(key, digest) != digest:
            yield (
                f"the contents of {_knob(key)} have changed since this run was saved; scores from "
                "before and after may not be comparable"
            )


def _free(config: Config) -> tuple[str, ...]:
    """Beginnings of the keys that only lead to a warning."""
    own = [name for name, knobs in config.rewards.items() if knobs.kind not in KNOWN]
    return tuple(f"{PREFIX}rewards.{name}.{what}" for name in own for what in ("code", "options."))


def _knob(key: str) -> str:
    return key.removeprefix(PREFIX)
