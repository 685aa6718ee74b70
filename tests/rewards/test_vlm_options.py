"""Options of the judge that cannot work: each is refused in one sentence."""

from __future__ import annotations

import math
from datetime import date
from typing import Any

import pytest

from mixgrpo.rewards import build_reward


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, "urls is empty"),
        ({"urls": None}, "urls must be a list of strings"),
        ({"urls": [3]}, "urls must be a list of strings"),
        ({"urls": "localhost:8000"}, "'localhost:8000' is not the URL of a server"),
        ({"urls": "http://"}, "'http://' is not the URL of a server"),
        ({"urls": "http://host:99999"}, r"'http://host:99999' is not a URL \(Port"),
        ({"model": " "}, "model must be a non-empty string, got ' '"),
        ({"template": "judge this"}, "lacks {prompt}"),
        ({"pattern": "(?P<score>"}, "not a valid regular expression"),
        ({"pattern": r"(\d)"}, "no group `score`"),
        ({"min": 5, "max": 5}, r"min \(5\) must be below max \(5\)"),
        ({"max": "5"}, "max must be a finite number, got '5'"),
        ({"min": math.nan}, "min must be a finite number, got nan"),
        ({"rescale": "false"}, "rescale must be true or false, got 'false'"),
        ({"image_format": "gif"}, "image_format must be png or jpeg, got 'gif'"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ({"request": [1]}, "request must be a mapping"),
        ({"request": {"messages": []}}, "fields other than messages"),
        ({"concurrency": 0}, "concurrency must be an integer of at least 1, got 0"),
        ({"concurrency": True}, "concurrency must be an integer of at least 1, got True"),
        ({"timeout": -1}, "timeout must be positive, got -1"),
        ({"retries": -1}, "retries must be an integer of at least 0, got -1"),
        ({"retries": 1.5}, "retries must be an integer of at least 0"),
        ({"backoff": 0}, "backoff must be positive, got 0"),
        ({"deadline": "1h"}, "deadline must be a finite number, got '1h'"),
        ({"urls": "http://ho st:80"}, "is not a URL .it contains white space"),
        ({"urls": "http://host\n:80"}, "is not a URL .it contains white space"),
        ({"urls": "http://[::1"}, "is not a URL .Invalid IPv6"),
        ({"urls": "http://a..b"}, "is not a URL .*label empty or too long"),
        ({"urls": b"http://host"}, "urls must be a list of strings"),
        ({"model": "a\ud800"}, "model must be valid Unicode, but it contains half"),
        ({"template": "{prompt}\ud83d"}, "template must be valid Unicode"),
        ({"pattern": "(?P<score>a{99999999999999})"}, "not a valid regular expression"),
        ({"pattern": "(" * 5000}, "not a valid regular expression"),
        ({"min": -math.inf}, "min must be a finite number, got -inf"),
        ({"min": -1e7}, "min must be at least -1000000, got -10000000.0"),
        ({"max": 1e39}, "max must be at most 1000000, got 1e"),
        ({"max": 10**400}, "max must be a finite number, got 1000"),
        ({"max": 10**5000}, "max must be a finite number, got a value of type int"),
        ({"max_tokens": 10**9}, "max_tokens must be at most 1000000, got 1000000000"),
        ({"max_tokens": 1e9}, "max_tokens must be an integer"),
        ({"concurrency": 1_000_000}, "concurrency must be at most 1024, got 1000000"),
        ({"retries": 10**6}, "retries must be at most 100, got 1000000"),
        ({"timeout": math.inf}, "timeout must be a finite number, got inf"),
        ({"timeout": math.nan}, "timeout must be a finite number, got nan"),
        ({"timeout": 60_000_000}, "timeout must be at most 86400, got 60000000"),
        ({"backoff": 1e308}, "backoff must be at most 86400, got 1e"),
        ({"deadline": 1e10}, "deadline must be at most 86400, got 10000000000.0"),
        ({"request": ""}, "request must be a mapping"),
        ({"request": {1: 2}}, "request must be a mapping"),
        ({"request": {"stream": True}}, "request must not set stream to True"),
        ({"request": {"n": 3}}, "request must not set n to 3"),
        ({"request": {"temperature": math.nan}}, "request cannot be sent as JSON"),
        ({"request": {"since": date(2020, 1, 1)}}, "request cannot be sent as JSON"),
        ({"request": {"stop": "\ud800"}}, "request cannot be sent as JSON"),
        ({"timout": 3}, "'vlm' has no option timout; it accepts urls, model"),
        ({"checkpoint": "x"}, "has no option checkpoint"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as info:
        build_reward("vlm", {"urls": "http://host:8000", "model": "judge", **options})
    assert len(str(info.value)) < 400


def test_options_that_are_missing() -> None:
    with pytest.raises(ValueError, match="'vlm' needs the option urls, model"):
        build_reward("vlm", {})
