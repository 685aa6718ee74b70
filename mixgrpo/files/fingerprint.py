"""Fingerprints of files: fast ones that sample large files, and digests of all their contents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mixgrpo.files.regular import open_regular

_STRETCH, _STRETCHES = 4096, 512


def fingerprint(folder: Path) -> str:
    """A digest of the names, sizes and contents of the files in ``files_in(folder)``.

    Files up to 2 MiB are read completely. Of larger files, 512 pieces of 4 KiB are read: one every
    20 MB in a file of 10 GB, so that each matrix of T5-XXL is sampled more than once. Different
    weights differ everywhere, but a few altered bytes may go undetected.
    """
    digest = hashlib.blake2b(digest_size=8)
    for file in files_in(folder):
        digest.update(_as_bytes(f"{file.relative_to(folder)}\0{file.stat().st_size}\0"))
        _add(digest, file)
    return digest.hexdigest()


def fingerprint_files(files: Iterable[Path]) -> str:
    """The same for single files, regardless of their names."""
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(f"{file.stat().st_size}\0".encode())
        _add(digest, file)
    return digest.hexdigest()


def digest_contents(path: Path) -> str:
    """A SHA-256 of the whole contents of a file, or of a folder's files and their names.

    Hidden files of a folder are left out. It takes about a second for each 1 to 2 GB.
    """
    if path.is_file():
        return _whole(path)
    files = files_in(path)
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        digests = list(pool.map(_whole, files))
    whole = hashlib.sha256()
    for file, digest in zip(files, digests, strict=True):
        whole.update(_as_bytes(f"{file.relative_to(path)}\0{digest}\0"))
    return whole.hexdigest()


def files_in(folder: Path) -> list[Path]:
    """The regular files below a folder, without hidden ones, also behind links to other folders."""
    found: list[Path] = []
    entered: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(place)
        # A link may lead to a folder around it.
        folders[:] = [name for name in folders if not name.startswith(".") and here not in entered]
        if here not in entered:
            found += [Path(place, name) for name in names if not name.startswith(".")]
        entered.add(here)
    return sorted(file for file in found if file.is_file())


def _as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # names of files need not be UTF-8


def _whole(file: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(file) as opened:
        while piece := opened.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= _STRETCH * _STRETCHES:
            digest.update(opened.read())
            return
        for place in range(_STRETCHES):
            opened.seek((size - _STRETCH) * place // (_STRETCHES - 1))  # the first to the last
            digest.update(opened.read(_STRETCH))
