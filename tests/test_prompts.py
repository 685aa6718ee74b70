"""Reading prompt files, and drawing them in epochs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tiny_world import ROOT

from mixgrpo.rewards.rendered_text import quoted_text
from mixgrpo.text.prompt_files import PromptList
from mixgrpo.text.prompts import PromptBatches, read_prompts


def written(folder: Path, content: bytes) -> str:
    path = folder / "prompts.txt"
    path.write_bytes(content)
    return str(path)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"a cat\na dog\n", ["a cat", "a dog"]),
        (b"a cat\na dog", ["a cat", "a dog"]),
        (b"\n\na cat\n   \n\t\na dog\n\n", ["a cat", "a dog"]),
        (b"a cat\r\na dog\r\n", ["a cat", "a dog"]),
        (b"a cat\ra dog\r", ["a cat", "a dog"]),
        (b"\xef\xbb\xbfa cat\na dog\n", ["a cat", "a dog"]),
        (b"\xef\xbb\xbfa cat\n\xef\xbb\xbfa dog\n", ["a cat", "a dog"]),
        (b"  a cat \n", ["a cat"]),
        (b"a cat\na dog\na cat\n", ["a cat", "a dog", "a cat"]),
        ("ein Käse, 一只猫\n".encode(), ["ein Käse, 一只猫"]),
    ],
    ids=[
        *("plain", "no-last-newline", "blank", "crlf", "cr", "bom", "bom-inside", "spaces"),
        *("duplicates", "unicode"),
    ],
)
def test_one_prompt_a_line(tmp_path: Path, content: bytes, prompts: list[str]) -> None:
    read = read_prompts(written(tmp_path, content), "batch.prompts_file")
    assert read == PromptList.plain(prompts)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"\xffa cat\n", 1),
        (b"a cat\nna\xefve\na dog\n", 2),
        (b"a cat\r\n\r\na dog\r\ncaf\xe9\r\n", 4),
        (b"\xef\xbb\xbfa\ncaf\xe9\n", 2),
        (b"\xef\xbb\xbfa\n\xe9\n", 2),
    ],
)
def test_not_utf8_names_the_line(tmp_path: Path, content: bytes, line: int) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=rf"not UTF-8 \(line {line}\)") as raised:
        read_prompts(path, "validation.prompts_file")
    assert "validation.prompts_file" in str(raised.value)
    assert path in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n", b"\xef\xbb\xbf"])
def test_no_prompt_at_all(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"batch\.prompts_file is .* contains no prompt"):
        read_prompts(written(tmp_path, content), "batch.prompts_file")


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"set --batch\.prompts_file") as raised:
            read_prompts(str(path), "batch.prompts_file")
        assert str(path) in str(raised.value)


# --- batches --------------------------------------------------------------------------------------

PROMPTS = PromptList.plain([f"prompt {index}" for index in range(12)])


def drawn(iterations: int, per_iteration: int, world_size: int = 1, seed: int = 3) -> list[str]:
    """What all processes together take, in the order of the global batch."""
    texts: list[str] = []
    for iteration in range(iterations):
        batches = [
            PromptBatches(PROMPTS, per_iteration, seed, rank, world_size).at(iteration)
            for rank in range(world_size)
        ]
        positions = [position for batch in batches for position in batch.positions]
        assert positions == list(range(per_iteration))
        texts += [text for batch in batches for text in batch.texts]
    return texts


@pytest.mark.parametrize("per_iteration", [1, 4, 8, 24])
def test_every_prompt_once_per_epoch(per_iteration: int) -> None:
    """Also where an iteration crosses an epoch's end, or is longer than one."""
    texts = drawn(72 // per_iteration, per_iteration)
    for start in range(0, 72, len(PROMPTS)):
        assert Counter(texts[start : start + len(PROMPTS)]) == Counter(PROMPTS.texts)


def test_duplicates_in_the_file_are_drawn_as_often() -> None:
    batches = PromptBatches(PromptList.plain(["a", "b", "a"]), 3, seed=0)
    assert Counter(batches.at(5).texts) == {"a": 2, "b": 1}


@pytest.mark.parametrize("world_size", [1, 2])
def test_metadata_stays_with_its_prompt(world_size: int) -> None:
    """Also where a prompt is there twice with different metadata; other processes' stays there."""
    prompts = PromptList(["a", "b", "a", "c"], [{"n": i} for i in range(4)], "JSONL")
    drawn = []
    for rank in range(world_size):
        batch = PromptBatches(prompts, 4, 0, rank, world_size).at(3)
        assert len(batch.metadata) == len(batch.texts) == 4 // world_size
        drawn += [(text, each["n"]) for text, each in zip(batch.texts, batch.metadata, strict=True)]
    assert sorted(drawn) == [("a", 0), ("a", 2), ("b", 1), ("c", 3)]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = drawn(1, 12), drawn(2, 12)[12:]
    assert first != second
    assert first != PROMPTS.texts
    assert first != drawn(1, 12, seed=4)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_batch_of_one(world_size: int) -> None:
    assert drawn(5, 8, world_size) == drawn(5, 8)


def test_a_resumed_run_takes_the_same_prompts() -> None:
    """Iteration 7 needs no iteration before it."""
    whole = PromptBatches(PROMPTS, 4, seed=3)
    expected = [whole.at(iteration) for iteration in range(10)]
    assert PromptBatches(PROMPTS, 4, seed=3).at(7) == expected[7]
    assert whole.at(2) == expected[2]


# ---- what is shipped


def test_the_shipped_prompts_are_enough_and_do_not_overlap():
    training = read_prompts(str(ROOT / "data" / "prompts.txt"), "batch.prompts_file").texts
    test = read_prompts(str(ROOT / "data" / "prompts_test.txt"), "validation.prompts_file").texts
    assert len(set(training)) == len(training) >= 256
    assert len(set(test)) == len(test) >= 64
    assert not set(training) & set(test)
    for prompts in (training, test):
        assert sum(prompt.count('"') == 2 for prompt in prompts) >= 5  # text to be drawn


def test_the_shipped_prompts_for_text_rendering_quote_one_text_each() -> None:
    training, test = (
        read_prompts(str(ROOT / "data" / "ocr" / name), "batch.prompts_file").texts
        for name in ("prompts.txt", "prompts_test.txt")
    )
    assert (len(training), len(test)) == (256, 64)
    assert len({prompt.lower() for prompt in [*training, *test]}) == 320
    quoted = []
    for prompt in [*training, *test]:
        before, text, after = prompt.split('"')  # exactly one pair of marks
        assert not set(prompt) & set("“”„«»‘’"), prompt  # noqa: RUF001
        assert prompt == " ".join(prompt.split()), prompt
        assert before.endswith(" "), prompt
        assert after == "" or after[0] in " ,.;", prompt
        assert quoted_text(prompt) == text == text.strip() != "", prompt
        assert len(text) <= 32, prompt
        assert len(text.split()) <= 6, prompt
        assert 10 <= len(prompt.split()) <= 40, prompt
        quoted.append("".join(text.lower().split()))  # as the reward compares them
    assert len(set(quoted)) == 320
    assert min(map(len, quoted)) >= 3
