"""The registry of rewards: builds a reward from its name and options."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mixgrpo.files.messages import in_one_line
from mixgrpo.rewards.protocol import Reward

# Name -> class. The modules are imported on demand, so that a run imports only what it uses.
KNOWN = {
    "hpsv2": "mixgrpo.rewards.hpsv2:HPSv2",
    "clip_score": "mixgrpo.rewards.clip_score:ClipScore",
    "pickscore": "mixgrpo.rewards.pickscore:PickScore",
    "imagereward": "mixgrpo.rewards.imagereward:ImageReward",
    "jpeg_size": "mixgrpo.rewards.jpeg_size:JpegSize",
    "vlm": "mixgrpo.rewards.vlm:Vlm",
    "ocr": "mixgrpo.rewards.ocr:Ocr",
}


def build_reward(
    kind: str, options: Mapping[str, Any], device: torch.device | str = "cpu"
) -> Reward:
    """Builds the reward that ``kind`` names, on ``device``.

    Args:
        kind: a name in ``KNOWN``, or ``package.module:callable`` for a custom reward. A function
            is the reward itself; a class is instantiated with the options (and with ``device``, if
            it has a parameter of that name).
        options: the reward's own options; see the constructor of each reward.

    Raises:
        ValueError: if the name or an option is unknown, an option is missing, or the path cannot
            be imported.
        FileNotFoundError: if a model folder or checkpoint is missing.
    """
    target = find_reward(kind)
    if not inspect.isclass(target):
        if options:
            raise ValueError(
                f"reward {kind!r} is a function and takes no options, got {sorted(options)}: "
                "remove them or make the reward a class"
            )
        return target
    arguments = dict(options)
    if "device" in inspect.signature(target).parameters:
        arguments["device"] = torch.device(device)
    _check_options(kind, target, options, arguments)
    reward: Any = target(**arguments)
    return reward


def check_call(kind: str, options: Mapping[str, Any]) -> Any:
    """Returns the class or function that ``kind`` names, and checks that it takes these options.

    It is not called.

    Raises:
        ValueError: if the name or an option is unknown, an option is missing, or the path cannot
            be imported.
    """
    target = find_reward(kind)
    if inspect.isclass(target):
        given = dict(options)
        if "device" in inspect.signature(target).parameters:
            given["device"] = None
        _check_options(kind, target, options, given)
    return target


def find_reward(kind: str) -> Any:
    """Imports the class or function that ``kind`` names; raises ValueError if there is none."""
    if kind not in KNOWN and ":" not in kind:
        raise ValueError(_unknown_name(kind))
    return _import(KNOWN.get(kind, kind), kind)


def _unknown_name(kind: str) -> str:
    nearest = difflib.get_close_matches(kind, KNOWN, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return (
        f"unknown reward {kind!r}{hint}; the known rewards are {', '.join(KNOWN)}, and a custom "
        "reward is written package.module:callable"
    )


def _import(spec: str, kind: str) -> Any:
    module_name, _, attribute = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise ValueError(
            f"reward {kind!r} is not of the form package.module:callable, in which the module is "
            "named as in an import, not by its path"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"reward {kind!r}: cannot import {module_name!r} ({error}); "
            "check the spelling and that its folder is on PYTHONPATH"
        ) from error
    except Exception as error:
        raise ValueError(
            f"reward {kind!r}: {module_name!r} cannot be imported ({_told(error)}); correct its "
            "code"
        ) from error
    target = getattr(module, attribute, None)
    if not callable(target):
        what = "has no attribute" if target is None else "holds no callable named"
        raise ValueError(f"reward {kind!r}: module {module_name!r} {what} {attribute!r}")
    return target


def _told(error: Exception) -> str:
    """The error in one line, with the line of the reward's code that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = in_one_line(error, with_kind=True)
    return said if isinstance(error, SyntaxError) else f"{said}, in {last.filename}:{last.lineno}"


def _check_options(
    kind: str, target: Callable[..., Any], options: Mapping[str, Any], arguments: dict[str, Any]
) -> None:
    parameters = inspect.signature(target).parameters
    accepted = [name for name in parameters if name != "device"]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = sorted(set(options) - set(accepted))
    if unknown and not takes_any:
        raise ValueError(
            f"reward {kind!r} has no option {', '.join(unknown)}; "
            f"it accepts {', '.join(accepted) or 'none'}"
        )
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and name not in arguments
    ]
    if missing:
        raise ValueError(f"reward {kind!r} needs the option {', '.join(missing)}: set it")
