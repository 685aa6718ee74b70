"""Excerpts of what a server said, for messages: on one line, short, and without the API key.

Servers often repeat a key that they reject, and not always literally: escaped as in JSON, a URL or
HTML, in base64 or hexadecimal, in capitals, or only a part of it.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator

_MASK = "***"
# Characters of a text that are examined: far more than are shown, so that a key that begins within
# the excerpt is recognised as a whole, and few enough to take milliseconds.
_WINDOW = 16384
# As many consecutive characters of the key are masked; fewer reveal nothing.
_PART = 4

_TOKEN = re.compile(
    r"""(?xs)
    \\{1,16}+ (?: u \{ 0{0,8} (?P<braced> [0-9a-fA-F]{1,4} ) \} | u (?P<four> [0-9a-fA-F]{4} )
          | x (?P<two> [0-9a-fA-F]{2} ) | (?P<octal> [0-7]{3} ) | (?P<escaped> [^\\] ) )
    | % (?:25){0,8} (?P<percent> [0-9a-fA-F]{2} )
    | (?P<entity> & \#? \w{1,10} ; )
    | .
    """
)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+")
_HEXADECIMAL = re.compile(r"[0-9a-fA-F]+")
_STANDARD = str.maketrans("-_", "+/")

# A piece of the original text, from one position to another.
Span = tuple[int, int]


def beginning(text: str, key: str | None, most: int) -> str:
    """The first ``most`` characters of a text, on one line and without the key."""
    line = _clean(text.lstrip()[:_WINDOW], key)
    return line if len(line) <= most else f"{line[:most]}..."


def end(text: str, key: str | None, most: int) -> str:
    """The last ``most`` characters of a text, on one line and without the key."""
    line = _clean(text.rstrip()[-_WINDOW:], key)
    return line if len(line) <= most else f"...{line[-most:]}"


def _clean(text: str, key: str | None) -> str:
    line = " ".join(text.split())
    if key:
        line = _masked(line, key)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def _masked(text: str, key: str) -> str:
    literal = [(char, (i, i + 1)) for i, char in enumerate(text)]
    decoded = [(_decoded(token), token.span()) for token in _TOKEN.finditer(text)]
    # Both, because "100%abc" is either characters of a key or one that is percent-encoded. Runs of
    # backslashes were decoded as the beginning of an escape.
    spans = [*_key_in(literal, key), *_key_in(decoded, key.replace("\\", "") or key)]
    result, position = "", 0
    for start, stop in _merged(spans):
        result += text[position:start] + _MASK
        position = stop
    return result + text[position:]


def _merged(spans: list[Span]) -> list[Span]:
    """The same positions in spans that neither overlap nor touch, in order."""
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def _decoded(token: re.Match[str]) -> str:
    """The character for which a token stands."""
    code = token["braced"] or token["four"] or token["two"] or token["percent"]
    if code or token["octal"]:
        return chr(int(code, 16) if code else int(token["octal"], 8))
    # An unknown entity stays as it is; no key is matched by it.
    return html.unescape(token["entity"])[:1] if token["entity"] else token["escaped"] or token[0]


def _key_in(characters: list[tuple[str, Span]], key: str) -> Iterator[Span]:
    """Where the key, or a part of it, is in a text of decoded characters with their positions."""
    # A key has no white space, so white space in it was added; so was a backslash that it lacks.
    added = " " if "\\" in key else " \\"
    kept = [(char, span) for char, span in characters if char.isprintable() and char not in added]
    text = "".join(char for char, _ in kept)
    for start, stop in [*_parts(_ascii(text), key), *_encoded(text, key)]:
        yield kept[start][1][0], kept[stop - 1][1][1]


def _encoded(text: str, key: str) -> Iterator[Span]:
    """Where parts of the key are in base64 or hexadecimal."""
    if len(key) < _PART:
        return  # would be found in any text
    for run in _BASE64.finditer(text):
        # Where the encoding of the key began is unknown.
        for first in range(run.start(), min(run.start() + 4, run.end())):
            digits = text[first : run.end()].translate(_STANDARD)
            data = base64.b64decode(digits + "A" * (-len(digits) % 4))
            for start, stop in _parts(data, key):
                last = first + ((stop - 1) // 3 + 1) * 4
                yield first + start // 3 * 4, min(last, run.end())
    for run in _HEXADECIMAL.finditer(text):
        for first in range(run.start(), min(run.start() + 2, run.end())):
            digits = text[first : run.end()]
            data = bytes.fromhex(digits[: len(digits) // 2 * 2])
            for start, stop in _parts(data, key):
                yield first + start * 2, first + stop * 2


def _parts(data: bytes, key: str) -> Iterator[Span]:
    """Positions of every ``_PART`` consecutive characters of the key, in any case."""
    data, whole = data.lower(), _ascii(key).lower()
    size = min(_PART, len(whole))
    parts = {whole[i : i + size] for i in range(len(whole) - size + 1)}
    for i in range(len(data) - size + 1):
        if data[i : i + size] in parts:
            yield i, i + size


def _ascii(text: str) -> bytes:
    """One byte for each character."""
    return text.encode("ascii", "replace")
