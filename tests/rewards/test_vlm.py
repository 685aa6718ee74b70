"""The judge behind HTTP, against a local server into which every failure is injected."""

from __future__ import annotations

import base64
import email.utils
import gzip
import inspect
import json
import logging
import math
import re
import socket
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch

from mixgrpo.assembly import make_rewards
from mixgrpo.commands.train import parse
from mixgrpo.rewards import RewardError, build_reward, score
from mixgrpo.rewards import chat as chat_module
from mixgrpo.rewards.completion import LARGEST
from mixgrpo.rewards.ocr import Ocr
from mixgrpo.rewards.vlm import JudgeError, Vlm
from mixgrpo.rewards.vlm_tasks import Judge, Transcriber

from . import tiny
from .judge_server import Asked, JudgeServer, Reply, completion, says

README = Path(__file__).parents[2] / "mixgrpo" / "rewards" / "README.md"
KEY = 'sk-secret-01/23"45+6789'
ENCODED = {name: {"Content-Encoding": name} for name in ("gzip", "deflate", "br", "gzip, gzip")}
BOMB = gzip.compress(bytes(100 * 2**20), 1)
IMAGES = tiny.images(4, 6, 8)
pytestmark = pytest.mark.usefixtures("surroundings")
TEXTS = ["a zebra", "a {max} of {prompt}", "'quoted' \"text\"", "日本"]


def judge(*servers: JudgeServer | str, **options: Any) -> Vlm:
    urls = [server if isinstance(server, str) else server.url for server in servers]
    fast = {"timeout": 5.0, "backoff": 0.01, "deadline": 20.0}
    return Vlm(urls=urls, model="judge", **{**fast, **options})


def replies(**by_text: Reply) -> Callable[[Asked, int], Reply]:
    """Replies by prompt; to any other the judge says 3."""

    def answer(asked: Asked, number: int) -> Reply:
        for word, reply in by_text.items():
            if f"\n{word}\n" in asked.text:
                return reply
        return says("Final Score: 3")

    return answer


def is_nan(scores: torch.Tensor) -> list[bool]:
    return scores.isnan().tolist()


# --- the question ---------------------------------------------------------------------------------


def test_scores_are_exact_and_in_order_however_the_answers_arrive(serve: Any) -> None:
    images = tiny.images(12, 4, 4)
    texts = [f"text {i}" for i in range(12)]

    def answer(asked: Asked, number: int) -> Reply:
        index = int(re.search(r"text (\d+)", asked.text)[1])  # type: ignore[index]
        time.sleep(0.02 * ((5 * index) % 12))
        return says(f"Good.\nFinal Score: {1 + index / 4}")

    server = serve(answer)
    scores = judge(server, concurrency=12)(images, texts)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1 + i / 4 for i in range(12)]
    assert 1 < server.busiest <= 12


def test_the_question_holds_picture_prompt_and_range(serve: Any) -> None:
    server = serve(replies())
    judge(server, concurrency=1, max=10, request={"seed": 4, "temperature": None})(IMAGES, TEXTS)
    assert len(server.asked) == 4
    expected = IMAGES.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for asked, text, pixels in zip(server.asked, TEXTS, expected, strict=True):
        assert f"\n{text}\n" in asked.text
        assert "from 1 (" in asked.text and "to 10 (" in asked.text
        assert asked.path == "/v1/chat/completions"
        assert asked.data_url.startswith("data:image/png;base64,")
        np.testing.assert_array_equal(asked.pixels, pixels)
        assert "Authorization" not in asked.headers
        fields = {name: value for name, value in asked.body.items() if name != "messages"}
        assert fields == {"model": "judge", "max_tokens": 512, "seed": 4}


def test_jpeg_and_template(serve: Any) -> None:
    server = serve(replies())
    smooth = torch.full([1, 3, 16, 16], 0.5)
    judge(server, image_format="jpeg", template="{max}? {prompt}")(smooth, ["{min}"])
    (asked,) = server.asked
    assert asked.text == "5? {min}"
    assert asked.data_url.startswith("data:image/jpeg;base64,/9j/")
    assert abs(asked.pixels.astype(int) - 128).max() <= 1


def test_no_more_requests_at_once_than_concurrency(serve: Any) -> None:
    both = threading.Barrier(2, timeout=20)  # two must come together to be answered

    def answer(asked: Asked, number: int) -> Reply:
        both.wait()
        time.sleep(0.03)
        return says("Final Score: 2")

    server = serve(answer)
    scores = judge(server, concurrency=2, timeout=30.0, deadline=60.0)(IMAGES, TEXTS)
    assert scores.tolist() == [2] * 4
    assert server.busiest == 2


def test_range_and_rescaling(serve: Any) -> None:
    server = serve(replies(one=says("Final Score: 2.5"), two=says("Final Score: 10")))
    images, texts = IMAGES[:2], ["one", "two"]
    assert judge(server, min=0, max=10)(images, texts).tolist() == [2.5, 10]
    assert judge(server, min=0, max=10, rescale=True)(images, texts).tolist() == [0.25, 1]


def test_from_a_recipes_options(serve: Any) -> None:
    server = serve(replies())
    reward = build_reward("vlm", {"urls": server.url, "model": "judge"}, "cpu")
    assert score({"vlm": reward}, IMAGES, TEXTS, 3)["vlm"].tolist() == [3] * 4


def test_the_readmes_recipes_build(tmp_path: Path) -> None:
    """As the train command reads it: the knobs and the options are the rewards' own."""
    recipe, made = tmp_path / "recipe.yaml", []
    for block in re.findall(r"```yaml\n(rewards:\n.*?)```", README.read_text(), re.DOTALL):
        recipe.write_text(block)
        made.append(make_rewards(parse(["--recipe", str(recipe)]), torch.device("cpu")))
    rewards, one_line, transcribed = made
    unified: Any = rewards["unified"]
    assert unified.server.body["model"] == "UnifiedReward"
    assert unified.server.concurrency == 32
    assert unified.server.urls[1] == "http://judge-2:8080/v1/chat/completions"
    assert isinstance(rewards["text"], Ocr)
    line: Any = one_line["text"]
    assert (line.wanted.key, line.detect) == ("text", False)
    reader: Any = transcribed["text"]
    assert isinstance(reader.task, Transcriber)
    assert reader.server.body["model"] == "Qwen/Qwen3-VL-8B-Instruct"


def test_the_readme_lists_every_option_and_its_default() -> None:
    table = README.read_text().split("| option of `vlm` |")[1].split("\n\n")[0]
    of_judge = inspect.signature(Judge).parameters
    for name, parameter in {**inspect.signature(Vlm).parameters, **of_judge}.items():
        if name == "model":
            continue  # a knob of every reward
        (row,) = [line for line in table.splitlines() if f"`{name}`" in line.split("|")[1]]
        default = Judge.max_tokens if name == "max_tokens" else parameter.default
        if isinstance(default, int | float):
            assert re.search(rf"\b{default:g}\b|false", row.split("|")[2])


def test_no_picture_no_question(serve: Any) -> None:
    server = serve(replies())
    assert judge(server)(IMAGES[:0], []).shape == (0,)
    assert server.asked == []


# --- the reply ------------------------------------------------------------------------------------


def test_a_pattern_of_ones_own(serve: Any) -> None:
    server = serve(
        replies(one=says("<s>0.25</s>"), two=says("<s>high</s>"), three=says("Final Score: 1"))
    )
    own = judge(server, pattern="<s>(?P<score>.*?)</s>", min=0, max=1)
    scores = own(IMAGES[:3], ["one", "two", "three"])
    assert scores[0] == 0.25
    assert is_nan(scores) == [False, True, True]


FOUR = json.dumps(completion("Final Score: 4"))


def whole(**fields: Any) -> Reply:
    """A chat completion with the score 4 and these fields."""
    return Reply(body=json.dumps({**completion("Final Score: 4"), **fields}))


NO_COMPLETION = {
    "parts": says([{"text": "Final Score: 4"}]),
    "html": Reply(body="<html>Final Score: 4</html>"),
    "nothing": Reply(),
    "list": Reply(body="[]"),
    "null": Reply(body="null"),
    "text": Reply(body='"Final Score: 4"'),
    "choiceless": whole(choices=[]),
    "mapped": whole(choices={"0": completion("Final Score: 4")["choices"][0]}),
    "spelled": whole(choices="abc"),
    "nulls": whole(choices=[None]),
    "legacy": whole(choices=[{"text": "Final Score: 4"}]),
    "number": says(math.nan),
    "twice": Reply(body=2 * FOUR),
    "stream": Reply(body=f"data: {FOUR}\n\ndata: [DONE]\n"),
    "binary": Reply(body=b"\x00\xff"),
    "latin1": Reply(body=FOUR.replace("Final", "\xe9 Final").encode("latin-1")),
    "digits": Reply(body=f'{{"id": {"9" * 9000}}}'),
    "deep": Reply(body="[" * 100_000),
}
INCOMPLETE = ("length", "LENGTH", "content_filter", "tool_calls", "abort", "", 3, ["stop"])
BAD = {
    "high": says("Final Score: 6"),
    "rubbish": says("I cannot judge this."),
    "endless": says("<think>Final Score: 4"),
    "empty": says(" \n"),
    "none": says(None, message={"content": None, "reasoning_content": "Final Score: 4"}),
    **NO_COMPLETION,
    **{f"cut{i}": says("Final Score: 3.", finish_reason=r) for i, r in enumerate(INCOMPLETE)},
    "several": whole(choices=2 * completion("Final Score: 4")["choices"]),
    "error": Reply(body='{"error": {"message": "overloaded"}}'),
    "error2": whole(error={"message": "overloaded"}),
    "error3": says("Final Score: 4", error={"code": 502}),
    "forbidden": Reply(status=403, body="no"),
    "moved": Reply(status=302, headers={"Location": "/elsewhere"}),
    "created": Reply(status=201, body=FOUR),
}


def test_every_bad_reply_is_nan_for_its_sample_alone(
    serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(replies(**BAD))
    texts = ["good", *BAD, "fine"]
    with caplog.at_level(logging.WARNING, logger="mixgrpo"):
        scores = judge(server, retries=2)(tiny.images(len(texts), 4, 4), texts)
    assert is_nan(scores) == [False, *[True] * len(BAD), False]
    assert scores[0] == scores[-1] == 3
    assert len(server.asked) == len(texts), "none of these is tried again"
    (record,) = caplog.records
    message = record.getMessage()
    assert f"{len(BAD)} of {len(texts)} images could not be scored" in message
    for count, cause in (
        *((len(NO_COMPLETION), "the reply is not a chat completion"), (2, "the reply is empty")),
        *((len(INCOMPLETE), "the reply is incomplete"), (3, "the server reports an error")),
        *((1, "several choices in the reply"), (1, "unfinished reasoning in the reply")),
        *((1, "no score in the reply"), (1, "HTTP 403"), (1, "HTTP 302"), (1, "HTTP 201")),
    ):
        assert f"{count} x {cause}" in message
    assert message.endswith(
        "the first failure, on image 1: score out of range: 6 is not in 1..5; the reply ends "
        "'Final Score: 6'"
    )


FINE = {
    "stop": says("Final Score: 4.", finish_reason="STOP"),
    "eos": says("Final Score: 4", finish_reason="eos_token"),
    "null": says("Final Score: 4", finish_reason=None),
    "omitted": Reply(body='{"choices": [{"message": {"content": "Final Score: 4"}}]}'),
    "error": whole(error=None),
    "infinite": whole(created=math.inf),
    "surrogate": says("\ud800 Final Score: 4"),
    "bom": Reply(body=b"\xef\xbb\xbf" + FOUR.encode()),
    "thought": says("<think>Final Score: 2</think>\nFinal Score: 4"),
    "gzip": Reply(body=gzip.compress(FOUR.encode()), headers=ENCODED["gzip"]),
    "deflate": Reply(body=zlib.compress(FOUR.encode()), headers=ENCODED["deflate"]),
}


def test_unusual_replies_that_are_clear(serve: Any) -> None:
    reward = judge(serve(replies(**FINE)))
    assert reward(tiny.images(len(FINE), 4, 4), list(FINE)).tolist() == [4] * len(FINE)


@pytest.mark.parametrize(
    ("reply", "message", "requests"),
    [
        (Reply(body="{" + " " * LARGEST), "the reply is too large: .*: over 4 MiB", 1),
        (Reply(body=" " * 65536, endless=True), "the reply is too large", 1),
        (Reply(body=BOMB, headers=ENCODED["gzip"]), "the reply is too large: .*: over 4 MiB", 1),
        (Reply(404, BOMB, ENCODED["gzip"]), "HTTP 404: .*: the reply is too large", 1),
        (Reply(500, BOMB, ENCODED["gzip"]), "HTTP 500: .*: the reply is too large", 2),
        (Reply(500, "e" * 65536, endless=True), "HTTP 500: .*: the reply is too large", 2),
        (Reply(body=gzip.compress(BOMB), headers=ENCODED["gzip, gzip"]), "be decompressed", 1),
        (Reply(body=b"{}", headers=ENCODED["br"]), "decompressed: .*only gzip and deflate", 1),
        (Reply(body=b"{}", headers=ENCODED["gzip"]), "the reply cannot be decompressed", 1),
        (Reply(body=BOMB[:99], headers=ENCODED["gzip"]), "decompressed: .*it is incomplete", 1),
        (Reply(302, headers={"Location": "http://a"}), "a redirection to http://a; correct", 1),
    ],
    ids=range(11),
)
def test_replies_of_any_size_take_little_memory(
    serve: Any, reply: Reply, message: str, requests: int
) -> None:
    server = serve(lambda asked, number: reply)
    tracemalloc.start()
    with pytest.raises(JudgeError, match=message):
        judge(server, retries=1)(IMAGES[:1], TEXTS[:1])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * LARGEST
    assert len(server.asked) == requests


def test_a_prompt_that_is_no_text_fails_alone(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(replies())
    scores = judge(server)(IMAGES, ["a", "half \ud800", "{min} {", "\x00"])
    assert is_nan(scores) == [False, True, False, False]
    assert "1 x the prompt is not valid Unicode" in caplog.text
    assert len(server.asked) == 3


def test_a_batch_without_failure_warns_of_nothing(
    serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        judge(serve(replies()))(IMAGES, TEXTS)
    assert caplog.records == []


# --- trying again ---------------------------------------------------------------------------------


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that were asked for; none of them is waited for."""
    asked_for: list[float] = []
    sleep = chat_module.asyncio.sleep

    async def nap(seconds: float) -> None:
        asked_for.append(seconds)
        await sleep(0)

    monkeypatch.setattr(chat_module.asyncio, "sleep", nap)
    return asked_for


def in_turn(*given: Reply) -> Callable[[Asked, int], Reply]:
    return lambda asked, number: given[min(number, len(given) - 1)]


def test_retry_after_in_seconds_is_honoured(serve: Any, naps: list[float]) -> None:
    busy = Reply(status=429, body="slow down", headers={"Retry-After": "7"})
    server = serve(in_turn(busy, says("Final Score: 4")))
    assert judge(server)(IMAGES[:1], TEXTS[:1]).tolist() == [4]
    assert naps == [7]
    assert len(server.asked) == 2


def test_retry_after_as_a_date_is_honoured(serve: Any, naps: list[float]) -> None:
    date = email.utils.formatdate(time.time() + 90, usegmt=True)
    server = serve(in_turn(Reply(429, headers={"Retry-After": date}), says("Final Score: 4")))
    assert judge(server, deadline=500.0)(IMAGES[:1], TEXTS[:1]).tolist() == [4]
    assert 30 < naps[0] <= 90


@pytest.mark.parametrize(
    "header", ["soon", "-3", "", "0x9", "9e9", "Mon, 01 Jan 0001 00:00:00 GMT"]
)
def test_a_retry_after_that_is_none_falls_back_to_the_backoff(
    serve: Any, naps: list[float], header: str
) -> None:
    busy = Reply(429, headers={"Retry-After": header})
    server = serve(in_turn(busy, says("Final Score: 4")))
    assert judge(server, backoff=0.01)(IMAGES[:1], TEXTS[:1]).tolist() == [4]
    assert 0.005 <= naps[0] <= 0.01


@pytest.mark.parametrize("header", ["3600", "9" * 500, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_retry_after_beyond_the_deadline_is_not_waited_for(
    serve: Any, naps: list[float], header: str
) -> None:
    server = serve(in_turn(Reply(429, headers={"Retry-After": header})))
    with pytest.raises(JudgeError, match="1 x HTTP 429"):
        judge(server)(IMAGES[:1], TEXTS[:1])
    assert naps == []


def test_a_server_error_that_passes(serve: Any, naps: list[float]) -> None:
    server = serve(in_turn(Reply(500), Reply(503), says("Final Score: 4")))
    assert judge(server, backoff=1.0)(IMAGES[:1], TEXTS[:1]).tolist() == [4]
    assert 0.5 <= naps[0] <= 1 <= naps[1] <= 2


def test_a_server_error_that_stays_fails_after_the_retries(serve: Any, naps: list[float]) -> None:
    def answer(asked: Asked, number: int) -> Reply:
        return Reply(500, "broken") if "zebra" in asked.text else says("Final Score: 4")

    server = serve(answer)
    scores = judge(server, retries=5, backoff=8.0, deadline=500.0)(IMAGES, TEXTS)
    assert is_nan(scores) == [True, False, False, False]
    assert len(server.asked) == 6 + 3
    assert len(naps) == 5
    assert max(naps) <= 30, "the backoff is bounded"


def test_a_cut_connection_is_tried_again(serve: Any) -> None:
    cut = Reply(body='{"choices": [', cut=True)
    server = serve(in_turn(cut, says("Final Score: 4")))
    assert judge(server)(IMAGES[:1], TEXTS[:1]).tolist() == [4]


def test_waits_leave_the_global_random_numbers_alone(serve: Any) -> None:
    import random

    server = serve(in_turn(Reply(500), says("Final Score: 4")))
    random.seed(1)
    expected = random.random()
    random.seed(1)
    judge(server)(IMAGES[:1], TEXTS[:1])
    assert random.random() == expected


# --- nothing hangs --------------------------------------------------------------------------------


def test_a_hanging_request_ends_at_its_timeout_and_is_tried_again(serve: Any) -> None:
    server = serve(in_turn(Reply(hang=True), says("Final Score: 4")))
    assert judge(server, timeout=1.0)(IMAGES[:1], TEXTS[:1]).tolist() == [4]


def test_a_reply_that_drips_ends_at_the_timeout_too(serve: Any) -> None:
    """Each byte comes in time, the whole does not: 60 bytes take 3 s."""
    drip = says("Final Score: 4")
    drip.drip = True
    with pytest.raises(JudgeError, match=r"1 x timeout.*took over 0.3 s"):
        judge(serve(in_turn(drip)), timeout=0.3, retries=0)(IMAGES[:1], TEXTS[:1])


def test_the_deadline_ends_a_batch_with_what_has_arrived(
    serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(replies(stuck=Reply(hang=True)))
    start = time.monotonic()
    reward = judge(server, timeout=100.0, deadline=2.0)
    scores = reward(IMAGES, ["stuck", "b", "c", "stuck"])
    assert time.monotonic() - start < 30
    assert is_nan(scores) == [True, False, False, True]
    assert "2 x no answer within the batch's deadline" in caplog.text


def test_the_deadline_counts_for_those_that_wait_for_a_slot(serve: Any) -> None:
    server = serve(replies(stuck=Reply(hang=True)))
    reward = judge(server, timeout=100.0, deadline=2.0, concurrency=1)
    scores = reward(IMAGES[:3], ["a", "stuck", "c"])
    assert is_nan(scores) == [False, True, True]
    assert len(server.asked) == 2


def test_waiting_for_a_slot_does_not_count_as_a_requests_time(serve: Any) -> None:
    """Four replies of 0.7 s one after another, each allowed 2.1 s."""
    server = serve(lambda asked, number: time.sleep(0.7) or says("Final Score: 2"))
    reward = judge(server, concurrency=1, timeout=2.1, retries=0)
    assert reward(IMAGES, TEXTS).tolist() == [2] * 4


def test_connection_refused() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(JudgeError, match=rf"4 of 4 .*4 x no connection.*{url}"):
        judge(url, retries=1)(IMAGES, TEXTS)


def test_inside_somebody_elses_event_loop(serve: Any) -> None:
    import asyncio

    server = serve(replies())

    async def notebook() -> list[float]:
        return judge(server)(IMAGES, TEXTS).tolist()

    assert asyncio.run(notebook()) == [3] * 4


# --- several servers ------------------------------------------------------------------------------


def test_urls_take_turns_over_requests_and_calls(serve: Any) -> None:
    servers = [serve(replies()) for _ in range(3)]
    reward = judge(*servers)
    reward(IMAGES, TEXTS)
    assert [len(server.asked) for server in servers] == [2, 1, 1]
    reward(IMAGES[:2], TEXTS[:2])
    assert [len(server.asked) for server in servers] == [2, 2, 2]


def test_processes_begin_with_different_urls(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = [serve(replies()) for _ in range(3)]
    for rank in range(5):
        monkeypatch.setenv("RANK", str(rank))
        judge(*servers)(IMAGES[:1], TEXTS[:1])
    assert [len(server.asked) for server in servers] == [2, 2, 1]


def test_a_retry_goes_to_the_next_url(serve: Any) -> None:
    broken, well = serve(in_turn(Reply(500))), serve(replies())
    assert judge(broken, well, retries=1)(IMAGES, TEXTS).tolist() == [3] * 4
    assert (len(broken.asked), len(well.asked)) == (2, 4)


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/judge/v1"])
def test_forms_of_a_url(serve: Any, path: str) -> None:
    server = serve(replies())
    judge(server.url + path)(IMAGES[:1], TEXTS[:1])
    prefix = "/judge" if "judge" in path else ""
    assert server.asked[0].path == f"{prefix}/v1/chat/completions"


# --- a batch that failed as a whole ---------------------------------------------------------------


def test_a_judge_that_never_answered_stops_the_run(serve: Any) -> None:
    server = serve(in_turn(Reply(404, '{"error": "no model judge"}')))
    with pytest.raises(RewardError, match=r"4 x HTTP 404.*no model judge"):
        score({"vlm": judge(server)}, IMAGES, TEXTS, 4)
    assert len(server.asked) == 4


def test_a_judge_that_has_answered_may_be_away_for_a_while(
    serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(replies())
    rewards = {"vlm": judge(server, retries=0)}
    score(rewards, IMAGES, TEXTS, 4)
    server.answer = in_turn(Reply(503, "restarting"))
    assert score(rewards, IMAGES, TEXTS, 4)["vlm"].isnan().all()
    (record,) = caplog.records
    assert "4 of 4 images could not be scored (4 x HTTP 503)" in record.getMessage()


# --- the key --------------------------------------------------------------------------------------


def escaped(text: str) -> str:
    return "".join(f"\\u{ord(char):04x}" for char in text)


def test_the_key_is_sent_and_never_shown(
    serve: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    echoes = {
        "refused": Reply(401, f"wrong key {KEY}"),
        "repeated": says(f"your key is {KEY}"),
        "cut": says("." * 90 + KEY + "." * 90),
        "html": Reply(body=f"<b>{KEY}</b>"),
        "error": Reply(body=f'{{"error": "{escaped(KEY)}"}}'),
        "reason": says("Final Score: 4", finish_reason=KEY),
        "moved": Reply(302, headers={"Location": f"http://a/?key={quote(KEY, safe='')}"}),
        "encoded": Reply(400, base64.b64encode(f"Bearer {KEY}".encode())),
        "halves": Reply(400, f"{KEY[:10]} and {KEY[10:]}"),
        "malformed": Reply(headers={f"{KEY}:": KEY}),
    }
    reward = judge(serve(replies(**echoes)), api_key_env="JUDGE_KEY", retries=0)
    with caplog.at_level(logging.DEBUG, logger="mixgrpo"):
        for text in echoes:
            assert is_nan(reward(IMAGES[:2], [text, "good"])) == [True, False]
            with pytest.raises(JudgeError) as info:
                reward(IMAGES[:1], [text])
            assert "***" in str(info.value)
            assert not hidden(str(info.value))
    assert not hidden(caplog.text)
    assert not hidden(repr(reward.server))


def hidden(text: str) -> list[str]:
    """The parts of the key that a text shows."""
    text = text.replace(escaped(KEY), KEY).replace("\\", "")
    return [KEY[i : i + 4] for i in range(len(KEY) - 3) if KEY[i : i + 4] in text]


def test_the_key_is_sent_in_the_header_alone(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(replies())
    judge(server)(IMAGES[:1], TEXTS[:1])
    (asked,) = server.asked
    assert asked.headers["Authorization"] == f"Bearer {KEY}"
    assert not hidden(json.dumps(asked.body))


def test_a_key_in_the_recipe_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="must be the name of an environment variable") as info:
        judge("http://host", api_key_env=KEY)
    assert KEY not in str(info.value)
    for url in (
        f"http://me:{KEY}@host",
        f"http://host/v1?key={KEY}",
        f"http://host#{KEY}",
        f"http://me:{KEY}@host:99999",
        f"http://me:{KEY}@[::1",
    ):
        with pytest.raises(ValueError, match="without user, password or query") as info:
            judge(url)
        assert KEY not in str(info.value)


def test_a_key_that_cannot_be_one_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(ValueError, match="the key in OPENAI_API_KEY has characters") as info:
        judge("http://host")
    assert KEY not in str(info.value)
