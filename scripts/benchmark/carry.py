"""Wheels for a GPU machine without network that has torch, transformers and little else.

    python scripts/benchmark/carry.py FOLDER

Downloads what training, the rewards and the tests need beyond what such a machine has, for Linux on
x86_64 and the Python given, at the versions of requirements.txt; packages that it does not list get
the versions installed here. The command for the GPU machine is printed at the end. Copy FOLDER to
that machine together with the repository.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements.txt"

# What the GPU machine has, with all that these packages require.
PRESENT = ("torch", "torchvision", "transformers", "accelerate", "safetensors", "scipy", "pytest")
# What it lacks, or has in another version; matplotlib draws a training's curves at its end.
NEEDED = ("diffusers", "peft", "open_clip_torch", "ftfy", "jsonargparse", "timm", "matplotlib")

# pip takes these tags literally. torch's own wheels require glibc 2.28, so the machine has that.
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in range(28, 16, -1)),
    *("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"),
)
MEGABYTE = 1e6
UNREACHABLE = re.compile(
    r"connection broken|ConnectionError|Could not fetch URL|Failed to fetch|error sending request"
)


class CarryError(Exception):
    """Why nothing can be carried, in one sentence."""


# --- which packages -------------------------------------------------------------------------------


def pins() -> dict[str, Requirement]:
    """The requirements of requirements.txt, by normalised name."""
    lines = (line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def marker_environment(python: str) -> dict[str, str]:
    """The environment markers' values on the GPU machine."""
    return {
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }


def installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def required_by(requirement: Requirement, target: dict[str, str]) -> Iterator[Requirement]:
    """What a package with the requirement's extras requires there, by its metadata here."""
    package = installed(requirement.name)
    for text in (package and package.requires) or ():
        found = Requirement(text)
        extras = ("", *requirement.extras)
        if not found.marker or any(found.marker.evaluate({**target, "extra": e}) for e in extras):
            yield found


def closure(roots: Iterable[Requirement], target: dict[str, str]) -> set[str]:
    """The normalised names of the roots and of all that they require, directly or not."""
    waiting = list(roots)
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key not in seen:
            seen.add(key)
            waiting += required_by(requirement, target)
    return {name for name, _ in seen}


def carried(python: str, also_present: Sequence[str] = ()) -> dict[str, str]:
    """Normalised name -> version of the packages to carry for that Python.

    Args:
        also_present: further packages that the GPU machine has, in a version that will do. What is
            needed and not named here is carried even if a package of the machine requires it.
    """
    pinned, target = pins(), marker_environment(python)
    there = {canonicalize_name(name) for name in also_present}
    needed = {canonicalize_name(name) for name in NEEDED} - there
    present = closure([Requirement(name) for name in (*PRESENT, *there)], target)
    names = closure([pinned[name] for name in needed], target) - present | needed
    return {name: version_of(name, pinned) for name in sorted(names)}


def version_of(name: str, pinned: dict[str, Requirement]) -> str:
    if name in pinned:
        (pin,) = pinned[name].specifier
        return pin.version
    package = installed(name)
    if package is None:
        raise CarryError(
            f"{name} is not installed here, so its version is not known: "
            "run this with the Python of `bash env_setup.sh`, .venv/bin/python."
        )
    return package.version


# --- downloading ----------------------------------------------------------------------------------


def pip_command() -> list[str]:
    """This environment's pip, or one that uv fetches."""
    if find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.is_file() else shutil.which("uv")
    if uv:
        return [uv, "tool", "run", "pip"]
    raise CarryError(
        "This environment has neither pip nor uv: "
        f"run `{shlex.quote(sys.executable)} -m ensurepip`, or use that of `bash env_setup.sh`."
    )


def download(packages: dict[str, str], folder: Path, python: str) -> None:
    """Their wheels into the folder; those that are there already are kept."""
    target = ["--python-version", python, "--implementation", "cp"]
    for platform in PLATFORMS:
        target += ["--platform", platform]
    options = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    options += ["--no-deps", "--only-binary=:all:", *target, "-d", str(folder)]
    wanted = [f"{name}=={version}" for name, version in packages.items()]
    command = [*pip_command(), "download", *options, *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CarryError(reason(done.stderr, python))


def reason(output: str, python: str) -> str:
    """What pip's error output means."""
    if UNREACHABLE.search(output):
        return "The package index cannot be reached: run this on a machine with network."
    missing = re.search(r"No matching distribution found for (\S+)", output)
    if missing:
        return (
            f"There is no wheel of {missing[1]} for Python {python} on Linux x86_64: "
            "give --python the GPU machine's version, one that mixgrpo supports."
        )
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")] or lines
    return f"pip failed: {errors[-1] if errors else 'it printed nothing'}"


def tags_of(python: str) -> set[Tag]:
    """What a wheel's file name may say, to be installed there."""
    version = tuple(int(part) for part in python.split("."))
    interpreter = "cp" + python.replace(".", "")
    return {
        *cpython_tags(version, [interpreter], PLATFORMS),
        *compatible_tags(version, interpreter, PLATFORMS),
    }


def wheels_of(packages: dict[str, str], folder: Path, python: str) -> list[Path]:
    """One wheel of each package; others would be installed with them, or stop the installation."""
    fitting = tags_of(python)
    found: dict[str, Path] = {}
    others = []
    for path in sorted(folder.glob("*.whl")):
        try:
            name, version, _, tags = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            others.append(path.name)
            continue
        wanted = name in packages and Version(packages[name]) == version and tags & fitting
        if wanted and name not in found:
            found[name] = path
        else:
            others.append(path.name)
    if others:
        raise CarryError(f"{folder} has other wheels too: delete {', '.join(others)}.")
    missing = sorted(packages.keys() - found.keys())
    if missing:
        raise CarryError(f"pip left no wheel of {', '.join(missing)} in {folder}.")
    return list(found.values())


# --- what is printed ------------------------------------------------------------------------------


def print_sizes(wheels: Sequence[Path], limit: float) -> None:
    """Each wheel's size and the total, in megabytes."""
    sizes = {path.name: path.stat().st_size / MEGABYTE for path in wheels}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size:8.2f} MB  {name}")
    total = sum(sizes.values())
    print(f"{total:8.2f} MB  in all")
    if total > limit:
        raise CarryError(f"The wheels take {total:.1f} MB, and --limit allows {limit:g} MB.")


def installation(folder: Path) -> str:
    """The commands for the GPU machine, in the repository there.

    The folder's path is absolute there, for tests that start processes in other folders.
    """
    wheels = f"{shlex.quote(str(folder))}/*.whl"
    return (
        f"python3 -m pip install --no-index --no-deps --target site {wheels}\n"
        'PYTHONPATH="$PWD/site" bash scripts/benchmark/gpu.sh'
    )


def python_version(text: str) -> str:
    if not re.fullmatch(r"3\.\d+", text):
        raise argparse.ArgumentTypeError(f"{text} is not a version like 3.12")
    return text


def package_name(text: str) -> str:
    return canonicalize_name(text, validate=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the wheels go")
    parser.add_argument(
        "--python", type=python_version, default="3.12", help="the GPU machine's (default 3.12)"
    )
    parser.add_argument(
        "--present",
        type=package_name,
        action="append",
        metavar="PACKAGE",
        default=[],
        help="a package that is there in a version that will do, as matplotlib may be; repeatable",
    )
    parser.add_argument(
        "--limit", type=float, default=38, help="megabytes that the wheels may take (default 38)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    try:
        packages = carried(chosen.python, chosen.present)
        chosen.folder.mkdir(parents=True, exist_ok=True)
        print(f"{len(packages)} wheels for Python {chosen.python} into {chosen.folder}", flush=True)
        download(packages, chosen.folder, chosen.python)
        print_sizes(wheels_of(packages, chosen.folder, chosen.python), chosen.limit)
    except (CarryError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"\nOn the GPU machine, in the repository:\n\n{installation(chosen.folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
