"""Excerpts of what servers said: no form of the key is in them."""

from __future__ import annotations

import base64
import html
import json
import re
import time
from collections.abc import Callable
from urllib.parse import quote

import pytest

from mixgrpo.rewards.excerpts import beginning, end

KEYS = ["sk-secret-0123456789", 'ab/cd+"e\\f&gh<ij>k=%zz~!', "EMPTY", "sk-proj-" + "aZ9_-/+" * 12]
FORMS: dict[str, Callable[[str], str]] = {
    "literal": lambda key: key,
    "upper case": lambda key: key.upper(),
    "JSON": json.dumps,
    "JSON in JSON in JSON": lambda key: json.dumps(json.dumps(json.dumps(key))),
    "JSON with slashes": lambda key: json.dumps(key).replace("/", "\\/"),
    "unicode": lambda key: "".join(f"\\u{ord(c):04x}" for c in key),
    "unicode in capitals": lambda key: "".join(f"\\\\u{ord(c):04X}" for c in key),
    "unicode in braces": lambda key: "".join(f"\\u{{{ord(c):x}}}" for c in key),
    "bytes": lambda key: "".join(f"\\x{ord(c):02x}" for c in key),
    "octal": lambda key: "".join(f"\\{ord(c):03o}" for c in key),
    "URL": lambda key: quote(key, safe=""),
    "URL in URL": lambda key: quote(quote(key, safe=""), safe=""),
    "URL in lower case": lambda key: "".join(f"%{ord(c):02x}" for c in key),
    "HTML": html.escape,
    "HTML, decimal": lambda key: "".join(f"&#{ord(c)};" for c in key),
    "HTML, hexadecimal": lambda key: "".join(f"&#x{ord(c):x};" for c in key),
    "base64": lambda key: base64.b64encode(key.encode()).decode(),
    "base64 of the header": lambda key: base64.b64encode(f"Bearer {key}".encode()).decode(),
    "base64 of a user": lambda key: base64.urlsafe_b64encode(f"me:{key}".encode()).decode(),
    "base64 in a URL": lambda key: quote(base64.b64encode(key.encode()).decode(), safe=""),
    "base64 in lines": lambda key: base64.encodebytes(b"before it " * 6 + key.encode()).decode(),
    "hexadecimal": lambda key: "a" + key.encode().hex(),
    "repr": lambda key: repr(key.encode()),
    "spaced": " ".join,
    "with zero-width spaces": "\u200b".join,
    "UTF-16": "\0".join,
    "in two lines": lambda key: f"{key[:2]}\n{key[2:]}",
    "in two parts": lambda key: f"{key[:8]}; then: {key[8:]}",
    "cut": lambda key: f"{key[:8]}...",
}


# What remains of these beside the mask and punctuation.
REST = {
    "base64 of the header": "QmVhcmVy",  # "Bearer"
    "base64 of a user": "bWU6",  # "me:"
    "base64 in lines": base64.b64encode(b"before it " * 6).decode(),
    "hexadecimal": "a",
    "repr": "b",
    "in two parts": "then",
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("form", FORMS)
def test_no_form_of_the_key_is_shown(form: str, key: str) -> None:
    shown = beginning(f"wrong key <{FORMS[form](key)}> given", key, 1000)
    assert "***" in shown
    (rest,) = re.fullmatch("wrong key <(.*)> given", shown).groups()  # type: ignore[union-attr]
    assert re.sub(r"%3D|\W", "", rest) == REST.get(form, "")


def test_a_key_across_the_cut_is_masked_before_it() -> None:
    key = KEYS[0]
    for dots in range(80, 101):
        assert "sk-" not in beginning("." * dots + key + "after", key, 100)
        assert "789" not in end("before" + key + "." * dots, key, 100)


def test_what_is_not_the_key_is_shown() -> None:
    text = 'Unknown model "judge" at 100%25 in C:\\new &amp; \\u0041; see dGhpcyBvbmU='
    assert beginning(text, KEYS[0], 200) == text
    assert end(text, None, 200) == text


def test_an_excerpt_is_one_short_printable_line() -> None:
    assert beginning("  a\r\n\tb\x1b[2J\ud800 ", None, 99) == "a b\ufffd[2J\ufffd"
    assert beginning("abcdef", None, 3) == "abc..."
    assert end("abcdef", None, 3) == "...def"
    assert beginning("", "key", 3) == end("", "key", 3) == ""


@pytest.mark.parametrize("part", ["a", "\\", "%25", "&#", "\\u{0", "aa%61\\u0061 "])
def test_a_long_text_takes_no_longer_than_a_short_one(part: str) -> None:
    start = time.monotonic()
    beginning(part * 1_000_000, KEYS[0], 200)
    assert time.monotonic() - start < 3
