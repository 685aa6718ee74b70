"""The text-rendering reward: formula, quotation marks, and rendered words."""

from __future__ import annotations

import functools
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mixgrpo.rewards import build_reward, score
from mixgrpo.rewards.ocr import Ocr
from mixgrpo.rewards.rendered_text import edit_distance, legibility, quoted_text
from mixgrpo.rewards.vlm import Vlm

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def drawn(text: str, width: int = 256, height: int = 256, points: int = 44) -> Tensor:
    """[3, height, width]: the words on a white page."""
    page = Image.new("RGB", (width, height), "white")
    font = ImageFont.truetype(str(FONT), points)
    ImageDraw.Draw(page).multiline_text((12, height // 3 - 2), text, font=font, fill="black")
    return torch.from_numpy(np.array(page)).permute(2, 0, 1) / 255


def line_of(text: str) -> Tensor:
    """[3, 40, 80]: a page that holds one line and little else."""
    return drawn(text, 80, 40, 18)


def without_connections() -> Any:
    """The models lie in the package: a connection would be an error."""
    refuse = mock.Mock(side_effect=AssertionError("ocr opened a connection"))
    return mock.patch.object(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def ocr() -> Iterator[Ocr]:
    with without_connections():
        yield Ocr(threads=1)


@pytest.fixture(scope="module")
def one_line() -> Iterator[Ocr]:
    with without_connections():
        yield Ocr(threads=1, detect=False)


class Output(NamedTuple):
    txts: tuple[str, ...] | None
    scores: tuple[float, ...] | None


def reads(*lines: str) -> Output:
    """What a reader returns that is sure of these lines."""
    return Output(lines, (1.0,) * len(lines)) if lines else Output(None, None)


def with_readers(*readers: Callable[[np.ndarray], Output]) -> Ocr:
    """An Ocr whose readers are others."""
    own = Ocr(threads=len(readers))
    for reader in readers:
        own.readers.get_nowait()
        own.readers.put(reader)
    return own


# --- the formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("abcd", "acbd", 2),
        ("same", "same", 0),
        ("intention", "execution", 5),
    ],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("transcription", "target", "expected"),
    [
        ("Hello World", "hello world", 1),
        ("HEL LO\nWorld", "Hello World", 1),
        ("Welcome: OPEN daily", "open", 1),  # further text costs nothing
        ("opne", "open", 1 - 2 / 4),
        ("ope", "open", 1 - 1 / 4),
        ("0pen daily", "open", 0),  # 6 edits, more than the 4 letters
        ("", "open", 0),
        ("xyz", "open", 0),
        ("stop signs", "stop sign!", 1 - 1 / 9),
        ("abcdefo", "open", 0),  # shorter than twice the target
        ("opxn" * 2, "open", 0),
        ("opxn" * 10**6, "open", 0),  # at once, by its length
    ],
)
def test_legibility_by_hand(transcription: str, target: str, expected: float) -> None:
    assert legibility(transcription, target) == pytest.approx(expected)


# --- what the prompt quotes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('A sign that says "Open"', "Open"),
        ('"Hello" above, "World" below', "Hello World"),
        ("A sign that says “Grand Opening”.", "Grand Opening"),
        ("Ein Schild: „Geöffnet“", "Geöffnet"),
        ("Une enseigne « Ouvert »", "Ouvert"),
        ('First “one”, then "two", then “three”', "one two three"),
        ('写着"你好"的招牌', "你好"),
        ('A sign " Open " in a window', "Open"),
        ('"Don\'t stop" on a wall', "Don't stop"),
        ('A "5\'10" chart', "5'10"),
        ('A 12" pizza in a box with "Mario\'s" on it', "Mario's"),
        ('"Hi" on a 7" tablet', "Hi"),
        ('A 5" x 7" card', ""),
        ('"Route 66" sign', "Route 66"),
        ("He said \"it is 'fine'\" to me", "it is 'fine'"),
        ("A sign that says 'Open'", "Open"),
        ("'Hello' above, 'World' below", "Hello World"),
        ("A shop called 'Joe's Diner'", "Joe's Diner"),
        ("The dogs' sign says 'Woof!'.", "Woof!"),
        ("Rock 'n' roll in the '80s, with 'Live' on the drum", "Live"),
        ("A mug with \u2018Best Dad\u2019 on it", "Best Dad"),
        ("\u2018Joe\u2019s Diner\u2019 at night", "Joe\u2019s Diner"),
        # Apostrophes, or nobody can tell.
        ("It's a dog's life", ""),
        ("The dogs' bowls and the cats' toys", ""),
        ("Rock 'n' roll", ""),
        ("A party of the '90s", ""),
        ("A sign 'Woof' at the dogs' home", ""),
        ("An open 'quote", ""),
        ('An open "quote', ""),
        ("Joe\u2019s diner", ""),
        ('An empty "" sign', ""),
        ("", ""),
    ],
)
def test_quoted_text(prompt: str, text: str) -> None:
    assert quoted_text(prompt) == text
    assert (Ocr.unscorable(prompt, {}) == "") == bool(text)


@pytest.mark.parametrize("metadata", [{}, {"text": 5}, {"text": " "}, {"text": None}])
def test_what_a_prompt_lacks(metadata: dict[str, Any]) -> None:
    """The transcriber needs the same texts as ocr; a judge needs none."""
    for lack in (Ocr.unscorable, functools.partial(Vlm.unscorable, task="transcribe")):
        assert lack("a dog", metadata).startswith("quotes no text; put the text that the image")
        assert lack('"Hi"', metadata, key="text").startswith("has no text as its 'text'; give ")
        assert lack('"Hi"', metadata, threads=2) == ""
        assert lack("a dog", {"text": "Hi"}, key="text") == ""
    assert Vlm.unscorable("a dog", metadata, urls="http://host", model="m") == ""


# --- rendered words -------------------------------------------------------------------------------


def test_exact_words_score_1(ocr: Ocr) -> None:
    words = ["Open", "Grand\nOpening", "Stop 42"]
    images = torch.stack([drawn(word) for word in words])
    assert ocr(images, [f'a page that says "{word}"' for word in words]).tolist() == [1] * 3


def test_damaged_words_score_what_the_formula_says(ocr: Ocr) -> None:
    """One letter wrong, one missing, one too many, another word, none."""
    images = torch.stack([drawn(word) for word in ("Maxket", "Maret", "Marrket", "Sun", "")])
    scores = ocr(images, ['a stall with "Market" above it'] * 5)
    torch.testing.assert_close(scores, torch.tensor([5 / 6, 5 / 6, 5 / 6, 0, 0]))


def test_one_line_is_read_without_the_detector_as_with_it(ocr: Ocr, one_line: Ocr) -> None:
    """The whole word, one with a wrong letter, no text, and noise, which is no text either."""
    noise = torch.rand(3, 40, 80, generator=torch.Generator().manual_seed(0))
    images = torch.stack([*map(line_of, ("Market", "Marret", "")), noise])
    texts = ['a stall with "Market" above it'] * 4
    scores = one_line(images, texts)
    torch.testing.assert_close(scores, torch.tensor([1, 5 / 6, 0, 0]))
    assert scores.tolist() == ocr(images, texts).tolist()


def test_every_word_of_one_line_is_read(one_line: Ocr) -> None:
    words = ["Open", "Stop 42", "Bread", "Exit 9", "Closed", "Taxi"]
    images, texts = torch.stack([*map(line_of, words)]), [f'says "{word}"' for word in words]
    assert one_line(images, texts).tolist() == [1] * 6
    alone = [
        one_line(image[None], [text]).item()
        for image, text in zip(images, texts[1:] + texts[:1], strict=True)
    ]
    together = one_line(images, texts[1:] + texts[:1]).tolist()
    assert together == alone, "a score depends on no other image"
    assert max(together) < 1


# --- around the reader ----------------------------------------------------------------------------


def test_lines_that_the_reader_is_unsure_of_do_not_count() -> None:
    """RapidOCR drops them itself, but not if it reads without its detector."""
    output = Output(("Open", "x", "daily"), (0.5, 0.49, 1.0))
    own = with_readers(lambda picture: output)
    assert own(torch.ones(1, 3, 4, 4), ['"opendaily"']).tolist() == [1]


def test_channels_arrive_in_the_order_that_the_reader_expects() -> None:
    """RapidOCR takes OpenCV's: blue first."""
    seen = []

    def reader(picture: np.ndarray) -> Output:
        seen.append(picture)
        return reads("a", "b")

    image = torch.tensor([0.2, 0.4, 1.0])[:, None, None].expand(3, 4, 4)
    assert with_readers(reader)(image[None], ['"ab"']).tolist() == [1]
    assert seen[0].shape == (4, 4, 3)
    assert seen[0][0, 0].tolist() == [255, 102, 51]
    assert seen[0].flags["C_CONTIGUOUS"]


def test_readers_work_at_once_and_keep_the_order() -> None:
    """Two readers meet at a barrier; one that worked alone would break it."""
    barrier = threading.Barrier(2, timeout=20)

    def reader(picture: np.ndarray) -> Output:
        barrier.wait()
        return reads(str(picture[0, 0, 0]))

    levels = torch.tensor([10, 20, 30, 40])
    images = (levels / 255)[:, None, None, None].expand(4, 3, 2, 2)
    scores = with_readers(reader, reader)(images, ['"10"', '"20"', '"30"', '"50"'])
    assert scores.tolist() == [1, 1, 1, 0.5]


def test_a_reader_that_raises_is_not_lost() -> None:
    def reader(picture: np.ndarray) -> Output:
        if picture.max() == 0:
            raise MemoryError("no memory")
        return reads("a")

    own = with_readers(reader)
    with pytest.raises(MemoryError):
        own(torch.zeros(1, 3, 4, 4), ['"a"'])
    assert own(torch.ones(1, 3, 4, 4), ['"a"']).tolist() == [1]


def test_prompts_without_text_are_nan_and_told_about_once(caplog: pytest.LogCaptureFixture) -> None:
    own = with_readers(lambda picture: reads("Open"))
    texts = ["a dog's bowl", 'says "Open"', "a cat"]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            scores = score({"ocr": own}, torch.ones(3, 3, 4, 4), texts, 2)["ocr"]
            assert scores.isnan().tolist() == [True, False, True]
            assert scores[1] == 1
    (record,) = caplog.records
    assert """ocr: the prompt "a dog's bowl" quotes no text""" in record.getMessage()


def test_the_text_under_a_key_of_the_metadata(caplog: pytest.LogCaptureFixture) -> None:
    """In place of what the prompt quotes; what is no text has no score."""
    own = with_readers(lambda picture: reads("Open"))
    own.wanted.key = "text"
    metadata = [
        {"text": "open"}, {"text": " OPE "}, {"text": "x", "other": "Open"},
        {}, {"text": 5}, {"text": " "}, {"text": None}, {"text": ["Open"]},
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        images, texts = torch.ones(8, 3, 4, 4), ['a sign "Stop"'] * 8
        scores = score({"ocr": own}, images, texts, 4, metadata)["ocr"]
    assert scores[:3].tolist() == [1, 1, 0]
    assert scores[3:].isnan().all()
    (record,) = caplog.records
    assert "has no text as its 'text'; images of such" in record.getMessage()
    own.wanted.key = None
    assert score({"ocr": own}, images[:1], ['"Open"'], 1, [{"text": "x"}])["ocr"].tolist() == [1]


def test_a_picture_without_text() -> None:
    own = with_readers(lambda picture: reads())
    assert own(torch.ones(1, 3, 4, 4), ['"Open"']).tolist() == [0]


def test_from_a_recipes_options() -> None:
    reward = build_reward("ocr", {"threads": 2}, "cpu")
    assert isinstance(reward, Ocr)
    assert reward.readers.qsize() == 2
    assert build_reward("ocr", {}).threads == torch.get_num_threads()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": -1}, "ocr: threads must be an integer of at least 0, got -1"),
        ({"threads": "2"}, "ocr: threads must be an integer of at least 0, got '2'"),
        ({"thread": 2}, "'ocr' has no option thread; it accepts threads, key, detect"),
        ({"key": ""}, "ocr: key must be a non-empty string, got ''"),
        ({"key": 3}, "ocr: key must be a non-empty string, got 3"),
        ({"detect": "no"}, "ocr: detect must be true or false, got 'no'"),
        ({"model": "x"}, "'ocr' has no option model"),
    ],
)
def test_options_that_cannot_work(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_reward("ocr", options)


def test_no_picture() -> None:
    own = with_readers(lambda picture: reads())
    assert own(torch.zeros(0, 3, 8, 8), []).shape == (0,)
