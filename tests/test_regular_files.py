"""Files that are not regular are neither read, which could wait for ever, nor replaced."""

from __future__ import annotations

import os
import socket

import pytest

from mixgrpo.files.disk import write_whole
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
