"""Files that are not regular are neither read, which could wait for ever, nor replaced."""

from __future__ import annotations

import ast
import io
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from environment import output_file

import mixgrpo
from mixgrpo.commands import main
from mixgrpo.commands.output import make_lenient
from mixgrpo.files.disk import check_replaceable, write_text_whole, write_whole
from mixgrpo.files.json_files import DEEPEST, parse_json, read_json
from mixgrpo.files.json_lines import read_objects
from mixgrpo.files.named_paths import find_path, split_name
from mixgrpo.files.regular import read_regular


def special_files(folder):
    os.mkfifo(folder / "fifo")
    (folder / "to_zero").symlink_to("/dev/zero")
    (folder / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(folder / "socket"))
    return [folder / name for name in ("fifo", "to_zero", "folder", "socket")]


def test_what_is_not_a_regular_file_is_refused_at_once_and_kept(tmp_path):
    for path in special_files(tmp_path):
        kind = os.stat(path).st_mode
        with pytest.raises(ValueError, match="not a regular file"):
            read_regular(path, 100)
        with pytest.raises(ValueError, match="not a regular file"):
            write_whole(path, lambda partial: partial.write_text("replaced"))
        assert os.stat(path).st_mode == kind
        assert not list(tmp_path.glob("partial_*"))


def test_a_regular_file_is_read_up_to_the_limit_also_through_a_link(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 100)
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", 100) == b"x" * 100
    with pytest.raises(ValueError, match="larger than"):
        read_regular(tmp_path / "file", 99)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "missing", 99)


def test_a_sparse_file_is_refused_without_reading_it(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"larger than 0\.5 MiB"):
        read_regular(tmp_path / "sparse", 2**19)


# ---- what is written


def test_what_a_killed_process_left_is_replaced_and_a_link_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("kept")
    for leave in (
        os.mkfifo,
        lambda path: path.symlink_to(elsewhere),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.write_text("half"),
    ):
        leave(tmp_path / "partial_table.md")
        write_text_whole(tmp_path / "table.md", "whole")
        assert (tmp_path / "table.md").read_text() == "whole"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "table.md"]
    assert elsewhere.read_text() == "kept"


@pytest.mark.parametrize("text", ["\u0416\u6f22\U0001f984", "half \ud800 \udcff", "", "a\r\nb\0"])
def test_text_is_utf_8_whatever_is_in_it(tmp_path, text):
    write_text_whole(tmp_path / "a.json", text)
    assert (tmp_path / "a.json").read_bytes() == text.encode(errors="backslashreplace")


def test_the_message_names_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"is a device, .* so it is not replaced; name another pa"):
        check_replaceable(Path("/dev/null"))
    check_replaceable(tmp_path / "new")
    for folder in (Path("/"), Path(), Path("..")):
        with pytest.raises(
            ValueError, match=r"is a folder, .* so it is not replaced; name another"
        ):
            check_replaceable(folder)
    (tmp_path / "partial_new").mkdir()
    with pytest.raises(ValueError, match="partial_new is a folder"):
        check_replaceable(tmp_path / "new")
    with pytest.raises(OSError, match=r"error: '/proc/self/mem'"):
        read_regular(Path("/proc/self/mem"), 99)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    check_replaceable(tmp_path / "dangling")


def test_outputs_of_benchmarks_are_checked_before_the_measurements():
    with pytest.raises(Exception, match="/dev/full is a device"):
        output_file("/dev/full")
    assert output_file("new.json") == Path("new.json")


# ---- what is read


NEST = 100_000
BAD_JSON = {
    "nests more than 100 levels": ["[" * NEST + "]" * NEST, '{"a":' * NEST, "[" * 101 + "]" * 101],
    "NaN is not a number in JSON": ['{"a": NaN}', "[1, NaN]"],
    "Infinity is not a number": ["Infinity", "[-Infinity]"],
    "the number '1e999' is too large": ["[1e999]", '{"a": {"b": 1e999}}'],
    "the number '.*' is too large": ["1" * 5000, "-1e999", "[-" + "9" * 309 + "]"],
    "the name 'a' occurs twice": ['{"a": 1, "a": 1}', '[{"b": {"a": 1, "b": 2, "a": 3}}]'],
    "Expecting": ["", "{", "[1,]", "{a: 1}", "{'a': 1}", "nul", "// no", "\0"],
    "Extra data": ["{} {}", "1 2"],
    "control character": ['"a\nb"'],
    "codec can't decode": [b"\xff\xfe{\0}\0", b'"\xe4"', b'"\xed\xa0\x80"'],
}


@pytest.mark.parametrize(
    ("sentence", "content"), [(key, each) for key, many in BAD_JSON.items() for each in many],
    ids=lambda value: str(value[:20]),
)  # fmt: skip
def test_what_is_no_json_is_one_sentence(tmp_path, sentence, content):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=sentence) as caught:
        read_json(path)
    said = str(caught.value)
    assert said.startswith(f"{path} is not valid JSON (")
    assert "\n" not in said
    assert len(said) < 400


def test_json_of_all_kinds():
    deep = "[" * DEEPEST + "]" * DEEPEST
    for text in ('{"a": [1, -2.5e3, null, true, "\\ud83e\\udd84"]}', deep, "1", '"x"'):
        parse_json(text)
    assert parse_json("\t[ 1 ]\n") == [1]


def test_a_file_of_json_may_begin_with_a_mark(tmp_path):
    (tmp_path / "a.json").write_text("{}", encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {}


def test_lines_that_are_no_json_objects_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for bad in ("[" * NEST, "1" * 5000, "{", "\0"):
        path.write_text('{"a": 1}\n' + bad + '\n{"a": "2"}\n')
        assert read_objects(path) == [{"a": 1}, {"a": "2"}]
    path.write_bytes(b'{"a": "\xff"}\n')
    assert read_objects(path) == []
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is a FIFO"):
        read_objects(path)


@pytest.mark.parametrize(
    "text",
    [
        "x" * 256,
        "x" * 5000,
        "a\0b",
        "~nobody_at_all/x",
        "",
        "\ud800",
        "a/" * 3000,
        "\n",
        "|",
        "?" * 300,
    ],
)
def test_a_text_that_is_no_path(text):
    assert find_path(text) is None
    if text.startswith("~") or not text.strip() or "\0" in text:
        with pytest.raises(ValueError, match=r"no path|no home folder|null character"):
            split_name(f"name={text}")
    elif "=" not in text:
        assert split_name(f"name={text}") == ("name", Path(text))


def test_a_text_that_is_a_path(tmp_path, monkeypatch):
    assert find_path(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").write_text("")
    assert find_path("~/here") == tmp_path / "here"


# ---- the terminal and the locale


def test_printing_never_fails(monkeypatch):
    """Not even where characters cannot be shown, or half characters come from names of files."""
    for encoding in ("ascii", "latin-1", "utf-8"):
        said = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        complained = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        monkeypatch.setattr(sys, "stdout", said)
        monkeypatch.setattr(sys, "stderr", complained)
        make_lenient()
        assert main(["\u6f22\udcff"]) == 2
        print("\u6f22\udcff \ud800")
        sys.stdout.write("\u6f22")
        written = said.buffer.getvalue() + complained.buffer.getvalue()
        assert b"\\udcff" in written
        assert ("\u6f22".encode() if encoding == "utf-8" else b"\\u6f22") in written


def lacking_an_encoding(tree: ast.AST) -> Iterator[int]:
    """Lines that open a file as text in the encoding of the locale."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
        if ast.unparse(function) in ("os.open", "Image.open"):
            continue
        words = {word.arg for word in node.keywords}
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and a.value in MODES]
        of_text = name in ("open", "fdopen", "read_text", "write_text") and not modes
        if of_text and "encoding" not in words:
            yield node.lineno


MODES = ("rb", "wb", "ab", "r+b", "w+b", "xb")


def test_text_files_have_an_encoding():
    """With LC_ALL=C, Python's default is ASCII."""
    files = sorted(Path(mixgrpo.__file__).parent.rglob("*.py"))
    assert len(files) > 100
    lines = [f"{f}:{n}" for f in files for n in lacking_an_encoding(ast.parse(f.read_text()))]
    assert lines == []
    code = "p.write_text('a')\nopen(p, 'w')\nopen(p, 'rb')\nos.fdopen(1)\np.read_text(encoding='x')"
    assert list(lacking_an_encoding(ast.parse(code))) == [1, 2, 4]
