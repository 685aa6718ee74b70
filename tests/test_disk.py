"""Folders that one command at a time writes into."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny_world import environment

from mixgrpo.files.disk import own_folder

HOLD = """
import sys, time
from mixgrpo.files.disk import own_folder
with own_folder(sys.argv[1], "output"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_made_and_given_back(tmp_path):
    name = str(tmp_path / "a" / "b")
    for _ in range(2):
        with own_folder(name, "run.folder"):
            assert (tmp_path / "a" / "b").is_dir()


def test_a_folder_that_another_process_holds_is_refused_until_it_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        refused = r"output is .*to which another command is writing; wait"
        with pytest.raises(ValueError, match=refused), own_folder(str(tmp_path), "output"):
            pass
        other.kill()
    with own_folder(str(tmp_path), "output"):
        pass


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_no_folder(name):
    complaint = r"run\.folder is empty; name a folder"
    with pytest.raises(ValueError, match=complaint), own_folder(name, "run.folder"):
        pass


@pytest.mark.parametrize("below", ["", "/below"])
def test_a_file_is_no_folder(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("")
    name = f"{file}{below}"
    with (
        pytest.raises(ValueError, match="is a file or lies below one"),
        own_folder(name, "run.folder"),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    name = str(tmp_path / ("x" * 300))
    complaint = r"^run\.folder is '.*x', which cannot be made \(File name too long\); name a folder"
    with pytest.raises(OSError, match=complaint), own_folder(name, "run.folder"):
        pass


@pytest.mark.parametrize("written", [True, False])
def test_an_error_leaves_no_empty_folder_behind(tmp_path, written):
    folder = tmp_path / "run"
    with pytest.raises(KeyError), own_folder(str(folder), "run.folder"):
        if written:
            (folder / "file").write_text("")
        raise KeyError
    assert folder.exists() == written
