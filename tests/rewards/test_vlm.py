"""The judge behind HTTP, against a local server into which every failure is injected."""

from __future__ import annotations

import email.utils
import inspect
import json
import logging
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixgrpo.assembly import make_rewards
from mixgrpo.commands.train import parse
from mixgrpo.rewards import RewardError, build_reward, score
from mixgrpo.rewards import chat as chat_module
from mixgrpo.rewards.chat import Failure
from mixgrpo.rewards.ocr import Ocr
from mixgrpo.rewards.vlm import PATTERN, JudgeError, Vlm, read_score

from . import tiny
from .judge_server import Asked, JudgeServer, Reply, says

README = Path(__file__).parents[2] / "mixgrpo" / "rewards" / "README.md"
KEY = "sk-secret-0123456789"
IMAGES = tiny.images(4, 6, 8)
TEXTS = ["a zebra", "a {max} of {prompt}", "'quoted' \"text\"", "日本"]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy between here and the local server, no key and no rank but the tests' own."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Asked, int], Reply]], JudgeServer]]:
    servers: list[JudgeServer] = []

    def start(answer: Callable[[Asked, int], Reply]) -> JudgeServer:
        servers.append(JudgeServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


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


def test_the_readmes_recipe_builds(tmp_path: Path) -> None:
    """As the train command reads it: the knobs and the options are the rewards' own."""
    (block,) = re.findall(r"```yaml\n(rewards:\n.*?)```", README.read_text(), re.DOTALL)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(block)
    rewards = make_rewards(parse(["--recipe", str(recipe)]), torch.device("cpu"))
    unified: Any = rewards["unified"]
    assert unified.server.body["model"] == "UnifiedReward"
    assert unified.server.concurrency == 32
    assert unified.server.urls[1] == "http://judge-2:8080/v1/chat/completions"
    assert isinstance(rewards["text"], Ocr)


def test_the_readme_lists_every_option_and_its_default() -> None:
    table = README.read_text().split("| option of `vlm` |")[1].split("\n\n")[0]
    for name, parameter in inspect.signature(Vlm).parameters.items():
        if name == "model":
            continue  # a knob of every reward
        (row,) = [line for line in table.splitlines() if f"`{name}`" in line.split("|")[1]]
        if isinstance(parameter.default, int | float):
            assert re.search(rf"\b{parameter.default:g}\b|false", row.split("|")[2])


def test_no_picture_no_question(serve: Any) -> None:
    server = serve(replies())
    assert judge(server)(IMAGES[:0], []).shape == (0,)
    assert server.asked == []


# --- the reply ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Final Score: 4", 4),
        ("final score:4.", 4),
        ("The sky is 3 shades off.\n\n**Final Score:** 3.62\nThat is all.", 3.62),
        ("**Final Score: 2.5**", 2.5),
        ("Final Score (1-5): 4", 4),
        ("Final Score: 4/5", 4),
        ("Final Score: 4 / 5.0 because", 4),
        ('{"final score": "1"}', 1),
        ("Final  Score = .5e", "out of range"),
        ("Final Score: 4\n- 3 details are wrong", 4),
        ("Final Score: 5.0", 5),
        ("Final Score: 5.01", "out of range"),
        ("Final Score: 0", "out of range"),
        ("Final Score: -4", "out of range"),
        ("Final Score: 8/10", "out of range"),
        ("Final Score: 4/10", "out of range"),
        ("Final Score: 4-5", "no score"),
        ("Final Score: 4 to 5", "no score"),
        ("Final Score: 4 or 5", "no score"),
        ("Final Score: 4,5", "no score"),
        ("Final Score: 4.5.1", "no score"),
        ("Final Score: 80%", "no score"),
        ("Final Score: X", "no score"),
        ("Final Score: four", "no score"),
        ("Score: 4", "no score"),
        ("semifinal score: 4", "no score"),
        ("4", "no score"),
        ("Final Score: nan", "no score"),
        ("Final Score: 4\nFinal Score: 2", "several scores"),
        ("Final Score: 4\nFinal Score: 4", "several scores"),
    ],
)
def test_exactly_one_score_in_the_range_counts(reply: str, expected: float | str) -> None:
    found = read_score(reply, re.compile(PATTERN), 1, 5)
    if isinstance(expected, str):
        assert isinstance(found, Failure)
        assert expected in found.cause
    else:
        assert found == expected


def test_a_pattern_of_ones_own(serve: Any) -> None:
    server = serve(
        replies(one=says("<s>0.25</s>"), two=says("<s>high</s>"), three=says("Final Score: 1"))
    )
    own = judge(server, pattern="<s>(?P<score>.*?)</s>", min=0, max=1)
    scores = own(IMAGES[:3], ["one", "two", "three"])
    assert scores[0] == 0.25
    assert is_nan(scores) == [False, True, True]


BAD = {
    "high": says("Final Score: 6"),
    "rubbish": says("I cannot judge this."),
    "empty": says(""),
    "none": says(None),
    "parts": says([{"text": "Final Score: 4"}]),
    "html": Reply(body="<html>Final Score: 4</html>"),
    "nothing": Reply(),
    "list": Reply(body="[]"),
    "choiceless": Reply(body='{"choices": []}'),
    "binary": Reply(body="\x00\x01"),
    "forbidden": Reply(status=403, body="no"),
    "moved": Reply(status=302, headers={"Location": "/elsewhere"}),
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
    assert "5 x the reply is not a chat completion, 3 x the reply is empty" in message
    assert "1 x HTTP 403" in message
    assert (
        "the first failure, on image 1: score out of range: 'Final Score: 6' is not in 1..5"
        in message
    )


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


@pytest.mark.parametrize("header", ["soon", "-3", ""])
def test_a_retry_after_that_is_none_falls_back_to_the_backoff(
    serve: Any, naps: list[float], header: str
) -> None:
    busy = Reply(429, headers={"Retry-After": header})
    server = serve(in_turn(busy, says("Final Score: 4")))
    assert judge(server, backoff=0.01)(IMAGES[:1], TEXTS[:1]).tolist() == [4]
    assert 0.005 <= naps[0] <= 0.01


def test_a_retry_after_beyond_the_deadline_is_not_waited_for(serve: Any, naps: list[float]) -> None:
    server = serve(in_turn(Reply(429, headers={"Retry-After": "3600"})))
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


def test_the_key_is_sent_and_never_shown(
    serve: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    server = serve(
        replies(
            refused=Reply(401, f"wrong key {KEY}"),
            repeated=says(f"your key is {KEY}"),
            html=Reply(body=f"<b>{KEY}</b>"),
        )
    )
    reward = judge(server, api_key_env="JUDGE_KEY")
    with caplog.at_level(logging.DEBUG):
        for text in ("refused", "repeated", "html"):
            assert is_nan(reward(IMAGES[:2], [text, "good"])) == [True, False]
            with pytest.raises(JudgeError) as info:
                reward(IMAGES[:1], [text])
            assert "***" in str(info.value)
            assert KEY not in str(info.value)
    assert {asked.headers["Authorization"] for asked in server.asked} == {f"Bearer {KEY}"}
    assert KEY not in caplog.text
    assert KEY not in repr(reward.server)
    assert KEY not in json.dumps([asked.body for asked in server.asked])


def test_a_key_in_the_recipe_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="must be the name of an environment variable") as info:
        judge("http://host", api_key_env=KEY)
    assert KEY not in str(info.value)
    for url in (f"http://me:{KEY}@host", f"http://host/v1?key={KEY}", f"http://host#{KEY}"):
        with pytest.raises(ValueError, match="without user, password or query") as info:
            judge(url)
        assert KEY not in str(info.value)


def test_a_key_that_cannot_be_one_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(ValueError, match="the key in OPENAI_API_KEY has characters") as info:
        judge("http://host")
    assert KEY not in str(info.value)


# --- options --------------------------------------------------------------------------------------


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
        ({"request": {"messages": []}}, "other than messages"),
        ({"concurrency": 0}, "concurrency must be an integer of at least 1, got 0"),
        ({"concurrency": True}, "concurrency must be an integer of at least 1, got True"),
        ({"timeout": -1}, "timeout must be positive, got -1"),
        ({"retries": -1}, "retries must be an integer of at least 0, got -1"),
        ({"retries": 1.5}, "retries must be an integer of at least 0"),
        ({"backoff": 0}, "backoff must be positive, got 0"),
        ({"deadline": "1h"}, "deadline must be a finite number, got '1h'"),
        ({"timout": 3}, "'vlm' has no option timout; it accepts urls, model"),
        ({"checkpoint": "x"}, "has no option checkpoint"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_reward("vlm", {"urls": "http://host:8000", "model": "judge", **options})


def test_options_that_are_missing() -> None:
    with pytest.raises(ValueError, match="'vlm' needs the option urls, model"):
        build_reward("vlm", {})
