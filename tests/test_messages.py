"""Errors of libraries become a part of one line."""

from __future__ import annotations

import pytest

from mixgrpo.files.messages import in_one_line


@pytest.mark.parametrize(
    ("error", "plain", "with_kind"),
    [
        (ValueError("a\n  b\tc "), "a b c", "ValueError: a b c"),
        (RuntimeError(), "RuntimeError", "RuntimeError"),
        (OSError(" \n"), "OSError", "OSError"),
        (OSError(28, "No space left", "/a"), "[Errno 28] No space left: '/a'", None),
        (KeyError("a"), "'a'", "KeyError: 'a'"),
        (ValueError("a" * 1000), "a" * 297 + "...", "ValueError: " + "a" * 285 + "..."),
    ],
)
def test_an_error_in_one_line(error: Exception, plain: str, with_kind: str | None) -> None:
    assert in_one_line(error) == plain
    if with_kind is not None:
        assert in_one_line(error, with_kind=True) == with_kind
