"""The interface of a reward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Reward(Protocol):
    """Scores images: the higher the score, the better the image matches its text."""

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] float in [0, 1] on any device, B texts -> [B] float32.

        The score of a sample that could not be scored is NaN, never 0, so that the sample is
        excluded from the statistics of its group.

        A reward that also has a parameter ``metadata`` receives by it B dicts, what the prompt
        file says about each prompt beside its text (see ``takes_metadata``). One that can tell from
        a prompt alone that it cannot score its images has a static method ``unscorable(text,
        metadata, **options)``: it returns why and, after a semicolon, the remedy, or an empty
        string. Before a run starts it is asked about every prompt.
        """
        ...


def depends_on_metadata(kind: Any, options: Mapping[str, Any]) -> bool:
    """Whether scores by this class or function depend on the prompts' metadata.

    A class that takes metadata, but only uses it with some of its options, tells so by a static
    method ``uses_metadata(**options)``.
    """
    uses: Callable[..., bool] | None = getattr(kind, "uses_metadata", None)
    return takes_metadata(kind) and (uses is None or uses(**options))


def takes_metadata(reward: Any) -> bool:
    """Whether a reward is called with ``metadata``, that is, whether it names such a parameter.

    For a class, this is whether its instances are.
    """
    kind: Any = reward if inspect.isclass(reward) else type(reward)
    call = kind.__call__ if inspect.isclass(reward) else reward
    if kind.__call__ is nn.Module.__call__:
        call = reward.forward  # nn.Module.__call__ takes anything
    try:
        return "metadata" in inspect.signature(call).parameters
    except (TypeError, ValueError):  # some callables written in C have no signature
        return False
