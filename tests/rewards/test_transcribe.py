"""The model that reads the text in an image, against the same local server as the judge."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from mixgrpo.rewards import RewardError, build_reward, score
from mixgrpo.rewards.vlm import JudgeError, Vlm

from . import tiny
from .judge_server import Asked, JudgeServer, Reply, says
from .test_vlm import is_nan, judge

pytestmark = pytest.mark.usefixtures("surroundings")
PROMPT = 'a shop with a sign "Open Daily"'


def reader(server: JudgeServer, **options: Any) -> Vlm:
    return judge(server, task="transcribe", concurrency=1, **options)


def in_order(*replies: Reply) -> Any:
    """Replies in the order of the requests, which a concurrency of 1 makes that of the images."""
    return lambda asked, number: replies[number]


def test_the_question_is_the_recipes(serve: Any) -> None:
    server = serve(in_order(says("Open Daily"), says("open")))
    assert reader(server)(tiny.images(1, 4, 4), [PROMPT]).tolist() == [1]
    request = {"temperature": 0, "top_p": None, "seed": 3}
    options = {"template": "Which {words}?", "max_tokens": 9, "request": request}
    reader(server, **options)(tiny.images(1, 4, 4), [PROMPT])
    first, second = server.asked
    assert first.text == (
        "Please output only the text content from the image without any additional descriptions "
        "or formatting."
    )
    assert fields(first) == {
        "model": "judge",
        "temperature": 0.7,
        "top_p": 0.8,
        "max_tokens": 4096,
    }
    assert second.text == "Which {words}?"
    assert fields(second) == {"model": "judge", "temperature": 0, "max_tokens": 9, "seed": 3}


def fields(asked: Asked) -> dict[str, Any]:
    return {name: value for name, value in asked.body.items() if name != "messages"}


# The truth has nine letters without its white space.
READ = {
    "The sign says:\nOPEN\tDAILY!": 1,  # further text costs nothing
    "Open Dairy": 1 - 1 / 9,
    "pen daily": 1 - 1 / 9,
    "Open": 1 - 5 / 9,
    "No text": 1 - 8 / 9,
    "": 0,
    " \n": 0,
    "Final Score: 1, and nothing else": 0,
    "<think>Open Daily?</think> Open": 1 - 5 / 9,
}


def test_the_score_is_by_the_formula_of_ocr(serve: Any) -> None:
    server = serve(in_order(*map(says, READ)))
    scores = reader(server)(tiny.images(len(READ), 4, 4), [PROMPT] * len(READ))
    assert scores.tolist() == pytest.approx([*READ.values()])


def test_replies_that_are_no_transcription_are_nan(
    serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bad = (
        says("Open Daily", finish_reason="length"),
        says(None),
        says("<think>Open Daily"),
        Reply(500, "broken"),
    )
    server = serve(in_order(says("Open Daily"), *bad))
    with caplog.at_level(logging.WARNING, logger="mixgrpo"):
        scores = reader(server, retries=0)(tiny.images(5, 4, 4), [PROMPT] * 5)
    assert is_nan(scores) == [False, True, True, True, True]
    (record,) = caplog.records
    for cause in ("the reply is incomplete", "the reply is empty", "unfinished reasoning in the"):
        assert f"1 x {cause}" in record.getMessage()
    assert "1 x HTTP 500" in record.getMessage()


def test_a_prompt_without_text_is_nan_and_not_asked_about(
    serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The numbers in the report of a failure are those of the batch."""
    server = serve(in_order(says("Open Daily"), Reply(404), says("Open")))
    texts = ["a dog", PROMPT, "a cat", PROMPT, PROMPT]
    with caplog.at_level(logging.WARNING, logger="mixgrpo"):
        scores = reader(server)(tiny.images(5, 4, 4), texts)
        assert reader(server)(tiny.images(1, 4, 4), ["a dog"]).isnan().all()
    assert is_nan(scores) == [True, False, True, True, False]
    assert len(server.asked) == 3
    first, failure, _ = (record.getMessage() for record in caplog.records)
    assert first.startswith("vlm: the prompt 'a dog' quotes no text; images of such prompts")
    assert "vlm: 1 of 3 images could not be scored" in failure
    assert "on image 3: HTTP 404" in failure


def test_the_text_under_a_key_of_the_metadata(serve: Any) -> None:
    server = serve(lambda asked, number: says("Open"))
    rewards = {"text": reader(server, key="text")}
    metadata = [{"text": "open"}, {"text": "ope"}, {"text": 5}, {}, {"text": "xy", "other": "Open"}]
    scores = score(rewards, tiny.images(5, 4, 4), [PROMPT] * 5, 2, metadata)["text"]
    assert is_nan(scores) == [False, False, True, True, False]
    assert scores[[0, 1, 4]].tolist() == [1, 1, 0]
    assert len(server.asked) == 3


def test_a_reader_that_never_answered_stops_the_run(serve: Any) -> None:
    server = serve(lambda asked, number: says("Open", finish_reason="length"))
    with pytest.raises(JudgeError, match=r"2 of 2 .*2 x the reply is incomplete"):
        reader(server)(tiny.images(3, 4, 4), [PROMPT, "a dog", PROMPT])
    with pytest.raises(RewardError, match="'text' failed on every sample"):
        score({"text": reader(server)}, tiny.images(2, 4, 4), [PROMPT] * 2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "read"}, "task must be judge or transcribe, got 'read'"),
        ({"task": ["judge"]}, r"task must be judge or transcribe, got \['judge'\]"),
        ({"task": "judge", "key": "text"}, "key is an option of task transcribe and has no effect"),
        ({"key": "text"}, "with task judge; remove it, or set task to transcribe"),
        ({"pattern": "(?P<score>.)"}, "pattern is an option of task judge and has no effect"),
        ({"min": 0}, "min is an option of task judge"),
        ({"max": 1}, "max is an option of task judge"),
        ({"rescale": False}, "rescale is an option of task judge"),
        ({"key": ""}, "vlm: key must be a non-empty string, got ''"),
        ({"template": "Is it {prompt}?"}, "need not read it; remove {prompt}"),
        ({"template": ""}, "template must be a non-empty string"),
        ({"template": 3}, "template must be a non-empty string, got 3"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    of_judge = options.get("task") == "judge" or message.startswith("with task judge")
    task = {} if of_judge else {"task": "transcribe"}
    with pytest.raises(ValueError, match=message):
        build_reward("vlm", {"urls": "http://host:8000", "model": "m", **task, **options})
