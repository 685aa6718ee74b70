"""Files that are no prompt files: recognises their format and refuses them, with the way out of it.

Only strong evidence counts, because a line of plain text may contain anything: commas, tabs,
brackets or braces. All functions here raise a ValueError with a relative clause about the file
("which is a CSV file, ...; convert it with: ...").
"""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Sequence

EXAMPLE = '{"prompt": "a cat"}'

# ---- bytes

_BINARY = {
    b"\x1f\x8b": "is compressed by gzip; unpack it with: gunzip -k {path}",
    b"PK\x03\x04": "is a ZIP archive; unpack it with: unzip {path}",
    b"\x28\xb5\x2f\xfd": "is compressed by Zstandard; unpack it with: unzstd {path}",
    b"\xfd7zXZ\x00": "is compressed by xz; unpack it with: xz -dk {path}",
    b"BZh91AY&SY": "is compressed by bzip2; unpack it with: bunzip2 -k {path}",
    b"ARROW1\x00\x00": "is an Arrow file; {tabular}",
    b"\xff\xff\xff\xff": "is an Arrow stream; {tabular}",
    b"\xff\xfe": "is UTF-16, not UTF-8; save it as UTF-8",
    b"\xfe\xff": "is UTF-16, not UTF-8; save it as UTF-8",
}
_TABULAR = "write its rows as JSONL, with pandas: to_json(PATH, orient='records', lines=True)"


def decoded(content: bytes, path: str) -> str:
    """The text of a UTF-8 file; refuses binary files and other encodings."""
    known = next((says for start, says in _BINARY.items() if content.startswith(start)), None)
    if content.startswith(b"PAR1") and content.endswith(b"PAR1"):
        known = "is a Parquet file; {tabular}"
    if known is not None:
        raise ValueError("which " + known.format(path=shlex.quote(path), tabular=_TABULAR))
    if (position := content.find(b"\0")) >= 0:
        line = content[:position].count(b"\n") + 1
        raise ValueError(
            f"which contains NUL bytes (line {line}), so it is a binary file or UTF-16; save it as "
            "UTF-8 text"
        )
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"which is not UTF-8 (line {line}); save it as UTF-8") from error


# ---- text

_DOCUMENTS = re.compile(
    r"(?P<page><!doctype html|<html[^>]*>\s*<head)|(?P<pointer>version https://git-lfs\.)"
    r"|(?P<rich>\{\\rtf1)|(?P<xml><\?xml )",
    re.IGNORECASE,
)
_SAYS = {
    "page": "is a web page (HTML); download the file itself",
    "pointer": "is a Git LFS pointer instead of the file; fetch the file with: git lfs pull",
    "rich": "is a Rich Text document; save it as plain text",
    "xml": f"is XML; write one prompt per line, as plain text or as an object such as {EXAMPLE}",
}
# All or nothing: a row that does not fit the header fails (a name that is None is no keyword).
_FROM_JSON = (
    'import json, sys; print(*[json.dumps(each if isinstance(each, dict) else {"prompt": each}) '
    'for each in json.load(open(sys.argv[1], encoding="utf-8-sig"))], sep="\\n")'
)
_FROM_CSV = (
    "import csv, json, sys; print(*[json.dumps(dict(**row)) for row in csv.DictReader("
    'open(sys.argv[1], encoding="utf-8-sig", newline=""), delimiter="DELIMITER")], sep="\\n")'
)


def refuse_documents(lines: Sequence[str], path: str) -> None:
    """Refuses files whose lines, without surrounding white space, are one document together."""
    found = _DOCUMENTS.match("\n".join(lines[:3]))
    if found:
        raise ValueError(f"which {_SAYS[found.lastgroup or '']}")
    if lines[0][0] not in "[{":
        return
    whole = "\n".join(lines)
    try:
        value, end = json.JSONDecoder().raw_decode(whole)
    except (ValueError, RecursionError):
        return
    if end == len(whole) and isinstance(value, list):
        raise ValueError(f"which is a JSON array, not JSONL; {_convert(_FROM_JSON, path)}")
    if "\n" in whole[:end]:
        raise ValueError(
            "which is JSON over several lines, not JSONL; write each prompt as an object on a line "
            f"of its own, such as {EXAMPLE}"
        )


def refuse_suffix(suffix: str, path: str) -> None:
    """Refuses files that are named as a format which their contents need not reveal."""
    delimiter = {".csv": ",", ".tsv": "\t"}.get(suffix)
    if delimiter:
        convert = _convert_table(delimiter, path)
    else:
        convert = f"write each prompt as an object on a line of its own, such as {EXAMPLE}"
    if delimiter or suffix in (".json", ".yaml", ".yml"):
        raise ValueError(
            f"which is not JSONL nor, by its suffix {suffix}, plain text; rename it to .txt if "
            f"each line is a prompt, or {convert}"
        )


def refuse_tables(text: str, path: str) -> None:
    """Refuses a table whose first line names a column of prompts, if all rows are as long."""
    rows = [line for line in text.lstrip("\ufeff").split("\n") if line.strip()]
    header = rows[0].replace('"', "").strip(" ")
    if not re.fullmatch(r"([\w.-]*[,;|\t])*(prompt|caption)s?([,;|\t][\w.-]*)*", header, re.I):
        return
    for delimiter, kind in _TABLES.items():
        try:
            lengths = {len(row) for row in csv.reader(rows, delimiter=delimiter)}
        except csv.Error:
            continue
        if len(rows) > 1 and len(lengths) == 1 and lengths != {1}:
            convert = _convert_table(delimiter, path)
            raise ValueError(f"which is {kind}, neither plain text nor JSONL; {convert}")
    if header.lower() in ("prompt", "prompts"):
        quoted = any(row.startswith('"') for row in rows[1:])
        remedy = _convert_table(",", path) if quoted else "delete that line"
        raise ValueError(f"whose first line is {header!r}, the header of a table; {remedy}")


_TABLES = {
    ",": "a CSV file",
    "\t": "a table with tabs (TSV)",
    ";": "a table with semicolons",
    "|": "a table with vertical bars",
}


def _convert_table(delimiter: str, path: str) -> str:
    return _convert(_FROM_CSV.replace("DELIMITER", delimiter.replace("\t", "\\t")), path)


def _convert(program: str, path: str) -> str:
    words = shlex.join(["python", "-c", program, path])
    return f"convert it with: {words} > {shlex.quote(f'{path}.jsonl')}"
