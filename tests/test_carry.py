"""Wheels for a GPU machine without network: which, by what command of pip, and the errors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import carry
import pytest
from carry import CarryError, carried, closure, main, marker_environment, required_by
from packaging.requirements import Requirement

NEEDED = {
    *("diffusers", "peft", "open-clip-torch", "ftfy", "jsonargparse", "timm", "matplotlib"),
    "typeshed-client",  # of jsonargparse's extra
}
PRESENT = {"torch", "torchvision", "transformers", "numpy", "tokenizers", "pillow", "pyyaml"}
UNUSED = {"deepspeed", "wandb", "rapidocr", "onnxruntime", "tensorboard", "ruff", "mixgrpo"}
INSTALLED = "mine==1.0; extra == 'a'", "old==1.0; python_version < '3.12'", "win; os_name == 'nt'"

Pip = Callable[[str, int, bool], list[list[str]]]


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    """Puts a fake in pip's place; returns the list of commands that it will be given."""

    def fake(stderr: str = "", code: int = 0, works: bool = True) -> list[list[str]]:
        commands: list[list[str]] = []

        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            folder = Path(command[command.index("-d") + 1])
            for package in (word for word in command if "==" in word and works):
                name, version = package.split("==")
                wheel = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
                (folder / wheel).write_bytes(bytes(500_000))
            return subprocess.CompletedProcess(command, code, "", stderr)

        monkeypatch.setattr(subprocess, "run", run)
        return commands

    return fake


def refusal(*words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    said = str(stopped.value.code)  # printed by Python, which then exits with 1
    assert said.startswith("error: ")
    assert "\n" not in said
    return said


# ---- which packages


def test_what_the_machine_lacks_is_carried() -> None:
    names = set(carried("3.12"))
    assert names >= NEEDED
    assert not names & (PRESENT | UNUSED)
    assert not {name for name in names if name.startswith(("nvidia-", "cuda-"))}


def test_versions_are_those_of_the_requirements() -> None:
    pinned = {
        line.split("==")[0].split("[")[0].replace("_", "-").lower(): line.split("==")[1]
        for line in carry.REQUIREMENTS.read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    packages = carried("3.12")
    assert {name: pinned[name] for name in packages if name in pinned}.items() <= packages.items()
    assert packages["peft"] == pinned["peft"]


def test_what_is_present_is_left_out_with_what_only_it_requires() -> None:
    everything, fewer = carried("3.12"), carried("3.12", ["matplotlib"])
    assert {"matplotlib", "fonttools", "kiwisolver"} <= everything.keys() - fewer.keys()
    assert fewer.items() <= everything.items()


def test_needed_is_carried_even_if_a_present_package_requires_it() -> None:
    """open_clip_torch requires timm."""
    fewer = carried("3.12", ["open_clip_torch"])
    assert "open-clip-torch" not in fewer
    assert "timm" in fewer


def test_markers_and_extras_are_those_of_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed:
        requires = INSTALLED

    def installed(name: str) -> Installed | None:
        return Installed() if name == "one" else None

    monkeypatch.setattr(carry, "installed", installed)
    new, old = marker_environment("3.12"), marker_environment("3.11")
    assert not list(required_by(Requirement("one"), new))
    assert [str(r.name) for r in required_by(Requirement("one"), old)] == ["old"]
    assert closure([Requirement("one"), Requirement("one[a]")], new) == {"one", "mine"}


def test_a_package_without_a_known_version_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "installed", lambda name: None)
    with pytest.raises(CarryError, match=r"zipp is not installed here.*env_setup\.sh"):
        carry.version_of("zipp", carry.pins())
    assert carry.version_of("peft", carry.pins()) == str(carry.pins()["peft"].specifier)[2:]


# ---- pip


def test_the_command_of_pip(pip: Pip, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a folder"
    commands = pip()
    assert main([str(folder), "--python", "3.13"]) == 0
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    packages = carried("3.13")
    assert command[-len(packages) :] == [f"{name}=={v}" for name, v in packages.items()]
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    options = dict(pairwise(command))
    assert options["--python-version"] == "3.13"
    assert options["--implementation"] == "cp"
    assert options["-d"] == str(folder)
    platforms = {after for word, after in pairwise(command) if word == "--platform"}
    assert {"manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64"} <= platforms
    said = capsys.readouterr().out
    assert f"{len(packages) / 2:.2f} MB  in all" in said
    assert f"pip install --no-index --no-deps --target site '{folder}'/*.whl\n" in said
    assert 'PYTHONPATH="$PWD/site" bash scripts/benchmark/gpu.sh' in said


def test_without_pip_uv_fetches_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(carry, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "-m ensurepip`" in refusal(str(tmp_path / "wheels"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/{name}")
    assert carry.pip_command() == ["/opt/uv", "tool", "run", "pip"]
    (tmp_path / "uv").touch()
    assert carry.pip_command()[0] == str(tmp_path / "uv"), "the environment's own"


# ---- errors

RETRYING = (
    "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)'\n"
)
NO_VERSION = (
    "ERROR: Could not find a version that satisfies timm==1.0 (from versions: 0.1)\n"
    "ERROR: No matching distribution found for timm==1.0\n"
)


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        (RETRYING + NO_VERSION, "cannot be reached: run this on a machine with network"),
        (NO_VERSION, "no wheel of timm==1.0 for Python 3.12 on Linux x86_64: give --python"),
        ("WARNING: a\nERROR: disk full\n\nhint: b\n", "pip failed: ERROR: disk full"),
        ("killed\n", "pip failed: killed"),
        ("", "pip failed: it printed nothing"),
    ],
)
def test_failures_of_pip(pip: Pip, tmp_path: Path, stderr: str, expected: str) -> None:
    pip(stderr, 1, False)
    assert expected in refusal(str(tmp_path))


@pytest.mark.parametrize(
    "other",
    [
        "timm-0.6.13-py3-none-any.whl",
        "torch-2.11.0-py3-none-any.whl",
        "wcwidth.whl",
        "peft-{peft}-cp311-cp311-manylinux2014_x86_64.whl",
        "peft-{peft}-py3-none-macosx_11_0_arm64.whl",
        "peft-{peft}-py2.py3-none-any.whl",  # beside the same for py3
    ],
)
def test_other_wheels_in_the_folder_are_an_error(pip: Pip, tmp_path: Path, other: str) -> None:
    pip()
    path = tmp_path / other.format(**carried("3.12"))
    path.touch()
    assert "has other wheels too: delete" in refusal(str(tmp_path))
    for wheel in tmp_path.glob("peft-*-py3-none-any.whl"):
        wheel.unlink()
    path.unlink()
    assert main([str(tmp_path)]) == 0


def test_a_missing_wheel_and_too_many_megabytes_are_errors(pip: Pip, tmp_path: Path) -> None:
    pip("", 0, False)
    assert "pip left no wheel of " in refusal(str(tmp_path))
    pip()
    total = len(carried("3.12")) / 2
    words = str(tmp_path), "--limit", "1.5"
    assert f"take {total:.1f} MB, and --limit allows 1.5 MB" in refusal(*words)


def test_the_folder_is_checked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "file" in refusal(str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--python", "cp312", "cp312 is not a version like 3.12"),
        ("--present", "timm==1.0", "invalid package_name value: 'timm==1.0'"),
    ],
)
def test_the_options_are_checked(
    capsys: pytest.CaptureFixture[str], option: str, value: str, expected: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["folder", option, value])
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err
