"""ImageReward by the package image-reward 1.5, installed separately and run in its own process.

It cannot be installed together with this repository's packages: it needs timm 0.6 and transformers
before version 5. ``install`` installs it and its requirements, except torch, into ``.oracle/``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "imagereward_requirements.txt"
FOLDER = HERE.parents[2] / ".oracle"


class OracleUnavailable(RuntimeError):
    """The package is not installed and cannot be installed."""


def install(root: Path = FOLDER) -> Path:
    """The folder that holds the package, made if it is not there.

    Its name has the checksum of the list of requirements: another list is another folder, and the
    old one is removed. Installing takes seconds, 15 MB of downloads and 70 MB of disk.

    Raises:
        OracleUnavailable: another Python than 3.11, or pip failed.
    """
    if sys.version_info[:2] != (3, 11):
        raise OracleUnavailable(
            f"image-reward 1.5 is pinned here for Python 3.11 alone, and this is "
            f"{sys.version_info[0]}.{sys.version_info[1]}"
        )
    checksum = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    folder = root / f"imagereward-{checksum}"
    if not folder.is_dir():
        root.mkdir(exist_ok=True)
        with _locked(root):
            if not folder.is_dir():
                _install_whole(folder)
    return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A lock, because concurrent installations would interfere with each other."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # unlocks


def _install_whole(folder: Path) -> None:
    """Installs atomically: into a temporary folder, which is then renamed."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        new = Path(beside) / "packages"
        _pip(new)
        for old in folder.parent.glob("imagereward-*"):
            shutil.rmtree(old)
        new.rename(folder)


def _pip(target: Path) -> None:
    command = [
        *(sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"),
        *("--retries", "1", "--no-deps", "--no-build-isolation", "--no-compile"),
        *("--target", str(target), "-r", str(REQUIREMENTS)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[0] if errors else done.stderr.strip()[-500:]
        raise OracleUnavailable(f"image-reward 1.5 could not be installed by pip: {reason}")


def run(jobs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The result of each of the jobs, see ``imagereward_package``.

    Raises:
        OracleUnavailable: see ``install``.
        RuntimeError: the package failed; with the end of what it said.
    """
    packages = install()
    environment = {**os.environ, "PYTHONPATH": str(packages), "TRANSFORMERS_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        questions, answers = Path(folder, "jobs.json"), Path(folder, "results.json")
        questions.write_text(json.dumps(jobs, default=str))
        command = [sys.executable, HERE / "imagereward_package.py", questions, answers]
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"image-reward failed:\n{done.stderr[-2000:]}")
        return json.loads(answers.read_text())


def imagereward(
    images: Sequence[Image.Image],
    texts: Sequence[str],
    *,
    model: str | Path,
    checkpoint: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> Tensor:
    """The package's scores; the options are those of the reward ``imagereward``."""
    with tempfile.TemporaryDirectory() as folder:
        (scores,) = run([score_job(images, texts, Path(folder), model, checkpoint, tokenizer)])
    return torch.tensor(scores)


def score_job(
    images: Sequence[Image.Image],
    texts: Sequence[str],
    folder: Path,
    model: str | Path,
    checkpoint: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> dict[str, Any]:
    """A job for ``run``; writes the images to ``folder``, which must be there until it is run."""
    files = [folder / f"{index}.png" for index in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    return {
        "do": "score",
        "model": model,
        "checkpoint": _as_pt(Path(checkpoint or _weights_in(Path(model))), folder),
        "tokenizer": tokenizer or model,
        "images": files,
        "texts": list(texts),
    }


def _weights_in(model: Path) -> Path:
    inside = (model / "ImageReward.safetensors", model / "ImageReward.pt")
    return next(path for path in inside if path.is_file())


def _as_pt(checkpoint: Path, folder: Path) -> Path:
    """Converts the weights to a PyTorch file, because the package reads no other format."""
    if checkpoint.suffix != ".safetensors":
        return checkpoint
    from safetensors.torch import load_file

    torch.save(load_file(checkpoint), folder / "ImageReward.pt")
    return folder / "ImageReward.pt"
