"""What messages quote: errors of libraries in one line, and the beginnings of long texts."""

from __future__ import annotations

_MOST = 300  # characters; some errors list everything that they have tried


def in_one_line(error: BaseException, with_kind: bool = False) -> str:
    """The text of an error in one line of limited length, or its kind if it has no text.

    Args:
        with_kind: begins with the kind, such as KeyError.
    """
    kind, text = type(error).__name__, " ".join(str(error).split())
    if not text:
        return kind
    whole = f"{kind}: {text}" if with_kind else text
    return whole if len(whole) <= _MOST else f"{whole[: _MOST - 3]}..."


def shortened(text: str) -> str:
    """At most 60 characters of a text, for a message."""
    return text if len(text) <= 60 else f"{text[:57]}..."
