"""The formats of prompt files: what is read, what is refused, and what remains plain text."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mixgrpo.text.prompt_files import PromptList
from mixgrpo.text.prompts import read_prompts

LINE = b'{"prompt": "a cat", "tag": "x"}\n'
CAT = PromptList(["a cat"], [{"tag": "x"}], "JSONL")


def read(folder: Path, content: bytes | str, name: str = "mine.txt") -> PromptList:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompts(str(path), "batch.prompts_file")


def refusal(folder: Path, content: bytes | str, name: str = "mine.txt") -> str:
    with pytest.raises(ValueError, match=r"batch\.prompts_file is ") as raised:
        read(folder, content, name)
    message = str(raised.value)
    assert repr(str(folder / name)) in message
    assert "\n" not in message
    return message


# ---- JSONL


def test_every_value_of_metadata_survives(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {
        "tag": "counting",
        "include": [{"class": "bench", "count": 2, "box": [0.1, 1e-300, -0.0]}],
        "id": 123456789012345678901234567890,
        "share": 0.1,
        "nothing": None,
        "flag": False,
        "": "an empty key",
        "name\n": "日本 \u2028 \ufeff 😀",
    }
    for ascii_only in (True, False):
        line = json.dumps({**metadata, "prompt": "a bench"}, ensure_ascii=ascii_only)
        found = read(tmp_path, line + "\n")
        assert found == PromptList(["a bench"], [metadata], "JSONL")
        assert json.dumps(found.metadata[0]) == json.dumps(metadata)  # 1 and 1.0 are equal


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.JSONL", "a.txt", "a.json", "a.csv", "a", "a.jsonl.txt"]
)
def test_jsonl_is_recognised_whatever_its_name(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, LINE, name) == CAT


@pytest.mark.parametrize(
    "content",
    [
        b"\n \n" + LINE + b"\n\n",
        LINE.replace(b"\n", b"\r\n"),
        LINE.replace(b"\n", b"\r"),
        b"\xef\xbb\xbf" + LINE,
        "\u200b".encode() + LINE + "\u200b\n".encode(),
        LINE.rstrip(),
        b"\t " + LINE,
        LINE.replace(b"a cat", b"  a cat "),
    ],
    ids=["blank", "crlf", "cr", "bom", "zero width", "no newline", "indented", "spaces"],
)
def test_what_surrounds_an_object_does_not_matter(tmp_path: Path, content: bytes) -> None:
    assert read(tmp_path, content) == CAT


def test_joined_files_and_the_same_prompt_twice(tmp_path: Path) -> None:
    found = read(tmp_path, b"\xef\xbb\xbf" + LINE + b"\xef\xbb\xbf" + LINE.replace(b'"x"', b"1"))
    assert found == PromptList(["a cat"] * 2, [{"tag": "x"}, {"tag": 1}], "JSONL")
    assert found.first(1) == CAT
    assert found.first(0) == found


def test_a_prompt_over_two_lines_is_one_prompt(tmp_path: Path) -> None:
    assert read(tmp_path, '{"prompt": "a cat\\nand a dog"}').texts == ["a cat\nand a dog"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "is an array, not an object; write one whole object on each line"),
        ('"a cat"', "is a string, not an object"),
        ("null", "is null, not an object"),
        ("a cat", "is not a JSON object (Expecting value: column 1)"),
        ("// more", "is not a JSON object"),
        ('{"prompt": "b", "tag', "is not a JSON object (Unterminated string"),
        ('{"prompt": "b"},', "is not a JSON object (Extra data: column 16)"),
        ('{"prompt": "b"} {"prompt": "c"}', "is not a JSON object (Extra data"),
        ('{"prompt": "b",}', "is not a JSON object"),
        ("{'prompt': 'b'}", "is not a JSON object"),
        ('{"caption": "b", "id": 3}', "no key 'prompt' (its keys are 'caption', 'id'); rename"),
        ('{"Prompt": "b"}', "no key 'prompt' (its keys are 'Prompt')"),
        ('{"\ufeffprompt": "b"}', r"no key 'prompt' (its keys are '\ufeffprompt')"),
        (json.dumps({f"k{i}": i for i in range(9)}), "'k6', 'k7', ...)"),
        ("{}", "has no key 'prompt' (it is empty)"),
        ('{"prompt": ""}', "has the prompt '', which is empty"),
        ('{"prompt": " \\n"}', "which is empty"),
        ('{"prompt": "\u200b\ufeff"}', "which is empty"),
        ('{"prompt": "a\\u0000b"}', "contains a NUL character"),
        ('{"prompt": 3}', "has a number as its prompt; write it as a string"),
        ('{"prompt": null}', "has null as its prompt"),
        ('{"prompt": ["b"]}', "has an array as its prompt"),
        ('{"prompt": {"en": "b"}}', "has an object as its prompt"),
        ('{"prompt": true}', "has true or false as its prompt"),
        ('{"prompt": "b", "prompt": "c"}', "has the key 'prompt' twice"),
        ('{"prompt": "b", "m": [{"k": 1, "k": 1}]}', "has the key 'k' twice"),
        ('{"prompt": "b", "m": NaN}', "has a number that is not finite"),
        ('{"prompt": "b", "m": [-Infinity]}', "has a number that is not finite"),
        ('{"prompt": "b", "m": 1e999}', "has a number that is not finite"),
        ('{"prompt": "b\\ud800"}', "has half of a surrogate pair"),
        ('{"prompt": "b", "m": {"\\udc00": 1}}', "has half of a surrogate pair"),
        ('{"prompt": "b", "m": ' + "[" * 60 + "]" * 60 + "}", "has more than 50 objects and arr"),
        ('{"prompt": "b", "m": ' + "[" * 99999 + "]" * 99999 + "}", "has more than 50 objects"),
        ('{"prompt": "b", "m": ' + "1" * 5000 + "}", "has a number of 5,000 digits"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path: Path, line: str, words: str) -> None:
    message = refusal(tmp_path, LINE + b"\n" + line.encode() + b"\n" + LINE, "a.jsonl")
    assert "which is read as JSONL, but line 3 " in message
    assert words in message


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "a\n' + LINE,
        b'{"prompt": "a"},\n{"prompt": "b"}\n',
        b"{'prompt': 'a'}\n",
        b'{"prompt": "a"} {"prompt": "b"}\n',
        b"a cat\n" + LINE,
        b"# from GenEval\n" + LINE,
        b'{"tag": "x", "prompt": "a",}\n',
        b'{"caption": "a\n' + b'{"caption": "b"}\n' * 2,
        b'["a", 1]\n["b", 2]\n',
        json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=1).encode()[:-4],
        json.dumps([{"prompt": "a"}, {"prompt": "b"}]).encode()[:-4],
    ],
)
def test_damaged_jsonl_is_not_trained_on_as_text(tmp_path: Path, content: bytes) -> None:
    assert "which is read as JSONL, but line 1 is " in refusal(tmp_path, content)


# ---- plain text


@pytest.mark.parametrize(
    "lines",
    [
        ["{a cat|a dog} on a mat", "{red} fox"],
        ['{"OPEN"|"CLOSED"} sign', '{"x"}'],
        ["[watercolour] a cat", "[1] b"],
        ["[cat]"],
        ["[[cat]]", "((dog:1.2))"],
        ["a cat, a dog", "prompt engineering, a man, a desk"],
        ["a cat, prompt, 4k"],
        ["cat,dog", "red,blue"],
        ["prompt,art", "a cat", "b, c, d"],
        ["a\tb", "c\td"],
        ["a cat", '{"a": 1}', "b"],
        ["prompt: a cat", "Prompt: a dog"],
        ["a prompt", "a caption, in words"],
        ['"Open" sign', '"a dog"'],
        ["# a", "- b", "// c", "---"],
        ["1", "2", "null"],
        ["<html> tag in neon", "<cat>"],
        ["PK in a cap", "PAR1S", "BZh9"],
        ["a\u2028b", "c\x85d", "e\x0bf\x0cg\x1ch"],
        ["😀", "\U0001fae8", "\ue000"],
        ["a" * 100_000],
        ["a: b", "c: d"],
    ],
)
def test_a_line_of_text_may_contain_anything(tmp_path: Path, lines: list[str]) -> None:
    assert read(tmp_path, "\n".join(lines) + "\n") == PromptList.plain(lines)


def test_invisible_lines_are_blank(tmp_path: Path) -> None:
    assert read(tmp_path, "a\n\u200b\n\u200d\u2060\n\x07\nb\n").texts == ["a", "b"]
    assert "contains no prompts; write one" in refusal(tmp_path, "\u200b\n\ufeff\n\u00a0\n")


def test_a_prompt_that_is_too_long_for_one(tmp_path: Path) -> None:
    for content in ("a\n" + "b" * 100_001, '{"prompt": "a"}\n{"prompt": "' + "b" * 100_001 + '"}'):
        assert "whose line 2 is a prompt of 100,001 char" in refusal(tmp_path, content)


# ---- other formats


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("prompts.txt", "a cat")
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(LINE, mtime=0), "compressed by gzip; unpack it with: gunzip -k "),
        (bz2.compress(LINE), "compressed by bzip2; unpack it"),
        (lzma.compress(LINE), "compressed by xz; unpack it"),
        (b"\x28\xb5\x2f\xfd$\0", "compressed by Zstandard; unpack it"),
        (zipped(), "a ZIP archive; unpack it with: unzip "),
        (b"PAR1\x15\x04PAR1", "a Parquet file; write its rows as JSONL"),
        (b"ARROW1\0\0\xff", "an Arrow file; write its rows as JSONL"),
        (b"\xff\xff\xff\xff\x10", "an Arrow stream"),
        ("a cat".encode("utf-16"), "is UTF-16, not UTF-8; save it as UTF-8"),
        ("a cat".encode("utf-16-le"), "NUL bytes (line 1)"),
        (b"a\nb\0c\n", "NUL bytes (line 2), so it is a binary file"),
        (b"\x89PNG\r\n\x1a\n\0", "NUL bytes"),
        (b"a\ncaf\xe9\n", "not UTF-8 (line 2)"),
        (b"<!DOCTYPE html>\n<html>", "is a web page (HTML); download the file itself"),
        (b"\n<html lang='en'>\n<head><title>", "is a web page"),
        (b"<?xml version='1.0'?>\n<p>a</p>", "is XML; write one prompt per line"),
        (b"{\\rtf1\\ansi a cat}", "is a Rich Text document; save it as plain text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "with: git lfs pull"),
        (b'{"prompts": ["a"]}', "has no key 'prompt' (its keys are 'prompts')"),
        (b'{\n "prompts": ["a"]\n}', "is JSON over several lines, not JSONL"),
        (b'{\n "prompt": "a"\n}\n{\n "prompt": "b"\n}\n', "is JSON over several lines"),
        (b"[]", "is a JSON array"),
        (b"prompt\na cat, a dog\n", "whose first line is 'prompt', the header of a table; delete"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    assert words in refusal(tmp_path, content)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", "a cat\n"), ("a.yaml", "- a cat\n"), ("a.yml", "a\n"), ("a.csv", "a cat, b\n"),
     ("a.TSV", "a\n")],
)  # fmt: skip
def test_a_name_that_says_otherwise(tmp_path: Path, name: str, content: str) -> None:
    assert "rename it to .txt if each line is a prompt, or " in refusal(tmp_path, content, name)


ARRAY = [{"prompt": "a cat", "tag": 1}, {"prompt": "ein Käse", "tag": [2.5]}]
READ = [("a cat", {"tag": 1}), ("ein Käse", {"tag": [2.5]})]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("it's.json", json.dumps(ARRAY), READ),
        ("a.txt", json.dumps(ARRAY, indent=1), READ),
        ("a.txt", '\ufeff["a cat", "a \\" dog"]', [("a cat", {}), ('a " dog', {})]),
        ("a.csv", 'prompt,tag\r\n"a cat, a ""dog""",x\r\n', [('a cat, a "dog"', {"tag": "x"})]),
        ("a.csv", 'tag,prompt\n1,"a cat\nand a dog"\n', [("a cat\nand a dog", {"tag": "1"})]),
        ("a.txt", "\ufeff,prompt\n0,a cat\n", [("a cat", {"": "0"})]),
        ("a.tsv", "id\tprompt\t\n1\ta cat\t\n", [("a cat", {"id": "1", "": ""})]),
        ("a.txt", "seed;prompt\n1;a cat, sitting\n", [("a cat, sitting", {"seed": "1"})]),
        ("a.txt", "seed|prompt\n1|a cat\n", [("a cat", {"seed": "1"})]),
        ("a.txt", 'prompt\n"a cat, sitting"\n', [("a cat, sitting", {})]),
    ],
)  # fmt: skip
def test_the_command_in_the_message_converts(
    tmp_path: Path, name: str, content: str, expected: list[tuple[str, dict]]
) -> None:
    """And touches no file that is there."""
    message = refusal(tmp_path, content, name)
    (tmp_path / "a.jsonl").write_text("mine")
    command = message.split("convert it with: ")[1].replace("python ", f"{sys.executable} ", 1)
    subprocess.run(command, shell=True, check=True)
    found = read_prompts(str(tmp_path / f"{name}.jsonl"), "batch.prompts_file")
    assert list(zip(found.texts, found.metadata, strict=True)) == expected
    assert (tmp_path / "a.jsonl").read_text() == "mine"
    assert (tmp_path / name).read_bytes() == content.encode()


def test_headers_of_tables_in_other_words(tmp_path: Path) -> None:
    assert "is a table with tabs (TSV)" in refusal(tmp_path, "Prompt\tCategory\na cat\tAnimals\n")
    assert "is a CSV file" in refusal(tmp_path, "Prompts,Category\na cat,Animals\n")
    assert "is a CSV file" in refusal(tmp_path, "image_id,caption\n1,a cat\n")


def test_a_row_that_does_not_fit_is_not_cut(tmp_path: Path) -> None:
    """The command fails: the comma would take the rest of the prompt away."""
    message = refusal(tmp_path, "prompt,tag\na cat, sitting, 4k,x\n", "a.csv")
    command = message.split("convert it with: ")[1].replace("python ", f"{sys.executable} ", 1)
    assert subprocess.run(command, shell=True, check=False, stderr=-1).returncode != 0
    assert not (tmp_path / "a.csv.jsonl").read_text()


# ---- what is not a file of text


def test_paths_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_text("a red cat\n")
    monkeypatch.setattr("mixgrpo.text.prompts.LARGEST", 8)
    for path, words in (
        ("/dev/zero", "is a device, not a regular file"),
        (str(tmp_path / "fifo"), "is a FIFO, not a regular file"),
        (str(tmp_path / "large"), "is larger than "),
        ("x" * 5000, "File name too long"),
        ("", "is not a file"),
        ("no\0file", "is not a file"),
    ):
        with pytest.raises((ValueError, OSError), match=words) as raised:
            read_prompts(path, "prompts_file")
        assert "; set --prompts_file to a file of prompts" in str(raised.value)
