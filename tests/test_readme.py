"""Every command that a README shows is run, made short by overrides at its end, or else parsed.

All READMEs are read as one: their commands run in one folder, those of a README in their order, and
one that needs another README's run waits for it. They run in this process, or in forked ones where
a command asks for several: the scripts run as they are, and what they would give to Python, by
``hosts`` and ``launch``, is done here. Only parsed, by the program itself, are those that need
FLUX.1-dev, and the benchmarks, which other tests run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from processes import started
from torch.distributed.run import get_args_parser

from mixgrpo import checks
from mixgrpo.commands import COMMANDS, doctor, download, hosts, launch, main
from mixgrpo.commands.train import parse as parse_training
from mixgrpo.config import Config
from mixgrpo.inference.config import InferenceConfig
from mixgrpo.inference.config import check as check_sampling

ROOT = Path(__file__).resolve().parent.parent
SHORT = {
    "train": [
        *("--run.iterations", "1", "--sampling.steps", "5"),
        *("--window.size", "2", "--window.envelope", "null"),
        *("--batch.prompts", "2", "--batch.samples", "4", "--update.optimizer_steps", "2"),
        *("--validation.prompts", "2", "--validation.steps", "2", "--log.progress", "false"),
    ],
    "preprocess": ["--progress", "false"],
    "sample": ["--steps", "2", "--progress", "false"],
    "evaluate": ["--resamples", "50", "--log.progress", "false"],
}
PROMPTS, TEST_PROMPTS = 8, 3  # of the Shapes world
ELSEWHERE = ("data/models/", "/path/to/")  # not in the repository
OUTPUTS = ("--run.folder", "--folder", "--output")
REWARD = """
def my_reward(images, texts):
    return -images.std((1, 2, 3))
"""
PYTHON = """#!/bin/sh
printf '%s\\n' "$@" >"$GIVEN"
"""
SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
exec "$@"
"""


# ---- what is shown


@dataclass(frozen=True)
class Command:
    """A line of a bash block, without its comment."""

    readme: str
    words: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        """What is set in front of it: ``PROCESSES=2 bash ...``."""
        settings = self.words[: len(self.words) - len(self.program)]
        return dict(word.split("=", 1) for word in settings)

    @property
    def program(self) -> list[str]:
        words = list(self.words)
        while re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        return words

    def __str__(self) -> str:
        return f"{self.readme}: {' '.join(self.words)}"


def readmes() -> list[Path]:
    """The first one first; not those of packages and models that lie in the repository's folder."""
    rooms = set(ROOT.glob("[!.]*/README.md"))
    rooms |= {path for room in ("mixgrpo", "scripts") for path in (ROOT / room).rglob("README.md")}
    return [ROOT / "README.md", *sorted(rooms)]


def fenced(language: str, readme: Path) -> str:
    """The lines of all blocks of a language, or of none."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", readme.read_text(), re.DOTALL | re.MULTILINE)
    return "".join(text for name, text in blocks if name == language)


def shown_commands() -> list[Command]:
    """Each once, in the order of the READMEs."""
    found: dict[tuple[str, ...], Command] = {}
    for path in readmes():
        for line in fenced("bash", path).replace("\\\n", " ").splitlines():
            if words := tuple(shlex.split(line, comments=True)):
                found.setdefault(words, Command(str(path.relative_to(ROOT)), words))
    return list(found.values())


SHOWN = shown_commands()


# ---- from a command to what Python is given


def make_place(folder: Path) -> Path:
    """The repository with few prompts and a Python that only writes down what it is given, and a
    user's own files beside."""
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    shutil.copytree(ROOT / "hosts", folder / "hosts")
    (folder / "hosts" / "hostfile").write_text("localhost\n")
    (folder / "data" / "shapes").mkdir(parents=True)
    for path in (ROOT / "data").glob("*.txt"):
        shutil.copy(path, folder / "data")
    for path in (ROOT / "data" / "shapes").iterdir():
        (folder / "data" / "shapes" / path.name).symlink_to(path)
    (folder / "data" / "words").symlink_to(ROOT / "data" / "words")
    for name, count in (("prompts.txt", PROMPTS), ("prompts_test.txt", TEST_PROMPTS)):
        lines = (ROOT / "data" / "shapes" / name).read_text().splitlines()[:count]
        (folder / "data" / "shapes" / name).unlink()
        (folder / "data" / "shapes" / name).write_text("\n".join(lines) + "\n")
    (folder / "my_prompts.txt").write_text("a red circle on a gray background\n" * 3)
    (folder / "my_module.py").write_text(REWARD)
    (folder / "env_setup.sh").touch()
    programs = {".venv/bin/python": PYTHON, "programs/srun": SRUN, "programs/scontrol": "#!/bin/sh"}
    for name, text in programs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One in which nothing is ever done."""
    return make_place(tmp_path_factory.mktemp("place"))


def given_to_python(command: Command, place: Path) -> list[str]:
    """The words behind ``python`` that a command comes to; scripts say themselves."""
    program, *words = command.program
    if program == "python":
        return words
    if program == "torchrun":
        return ["-m", "torch.distributed.run", *words]
    if program == "bash" and words[0].startswith("scripts/"):
        return _given_by(words[0], words[1:], command.environment, place)
    if program == "sbatch":
        script = next(word for word in words if word.endswith(".slurm"))
        asked = words[: words.index(script)]
        known = re.findall(r"^#SBATCH (--[\w-]+)=", (ROOT / script).read_text(), re.MULTILINE)
        assert asked[::2] == [option for option in asked[::2] if option in known], command
        job = {
            **{"SLURM_SUBMIT_DIR": str(place), "SLURM_JOB_NODELIST": "n1"},
            **{"SLURM_JOB_NAME": "mixgrpo", "SLURM_JOB_ID": "1"},
        }
        words = words[len(asked) + 1 :]
        return _given_by(script, words, {**command.environment, **job}, place)
    pytest.fail(f"no test runs or parses what this begins with: {command}")


def _given_by(script: str, words: list[str], more: dict[str, str], place: Path) -> list[str]:
    given, path = place / "given", f"{place / 'programs'}:{os.environ['PATH']}"
    given.unlink(missing_ok=True)
    environment = {**os.environ, **more, "GIVEN": str(given), "PATH": path}
    done = subprocess.run(
        ["bash", script, *words], cwd=place, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return given.read_text().splitlines()


# ---- parsing: everything up to where the work begins


class Parsed(Exception):
    """A benchmark's words were understood; of some, the rest are a training's knobs."""

    def __init__(self, rest: list[str]) -> None:
        super().__init__()
        self.rest = rest


@contextmanager
def nothing_done(place: Path) -> Iterator[list[tuple[str, Any]]]:
    """Inside, nothing is done; the list is of what would have been: commands, with what they read
    from their words."""
    found: list[tuple[str, Any]] = []

    def begin(command: str, action: Any = None, *others: object) -> int:
        found.append((command, action.args[0] if isinstance(action, partial) else None))
        return 0

    def examine(config: Config, processes: int, what: object) -> list[object]:
        found[:] = [("doctor", config)]
        return []

    def compare(named: object, given: object, words: list[str]) -> int:
        found.append(("hosts check", launch.parse_command(["train", *words])))
        return 0

    def fetch(item: object) -> list[str]:
        found.append(("download", item))
        return []

    with pytest.MonkeyPatch.context() as patch:
        for name in COMMANDS:
            module = importlib.import_module(f"mixgrpo.commands.{name}")
            if hasattr(module, "carry_out"):
                patch.setattr(module, "carry_out", partial(begin, name))
        patch.setattr(launch, "_start", lambda given, grace, left: main(given.training_script_args))
        patch.setattr(hosts, "_check", compare)
        patch.setattr(doctor, "examine", examine)
        patch.setattr(download, "check_program", lambda: None)
        patch.setattr(download, "check_disk", lambda items: None)
        patch.setattr(download, "fetch", fetch)
        patch.setattr("mixgrpo.shapes.build.PARTS", {"prompts": partial(begin, "shapes")})
        patch.setattr("mixgrpo.evaluation.manifests.read_manifests", _unread)
        patch.chdir(place)
        yield found


def _unread(manifests: list[str]) -> list[SimpleNamespace]:
    named = [manifest.rpartition("=") for manifest in manifests]
    return [SimpleNamespace(name=name or Path(path).name) for name, _, path in named]


def parse(words: list[str], place: Path) -> tuple[str, Any]:
    """Which command Python's words come to, and what it reads from them if it is one of mixgrpo's;
    it fails where the program does not know a word."""
    if words[:1] == ["-m"] and words[1] in ("mixgrpo", "mixgrpo.hosts.slurm"):
        with nothing_done(place) as done:
            assert main(words[2:]) == 0, words
        name, config = done[0]
        if isinstance(config, Config):
            checks.check(config, None)
        if isinstance(config, InferenceConfig):
            check_sampling(config)
        return name, config
    if words[:2] == ["-m", "torch.distributed.run"]:
        given = get_args_parser().parse_args(words[2:])
        program = ["-m"] if given.module else []
        return parse([*program, given.training_script, *given.training_script_args], place)
    if words[0].startswith("scripts/benchmark/"):
        parse_benchmark(words)
        return "benchmark", None
    if words[:2] == ["-m", "gpu"]:
        importlib.import_module("gpu.__main__").parse(words[2:])
        return "benchmark", None
    if words[:2] == ["-m", "pytest"]:  # what test.sh gives it is in test_packaging
        return "tests", None
    pytest.fail(f"no test runs or parses: python {' '.join(words)}")


def parse_benchmark(words: list[str]) -> None:
    """By its own parser, up to there."""
    script = ROOT / words[0]
    assert script.is_file(), script
    module = importlib.import_module(script.stem)
    understand = argparse.ArgumentParser.parse_known_args

    def only_known(self: argparse.ArgumentParser, *given: Any) -> NoReturn:
        raise Parsed(understand(self, *given)[1])

    def all_known(self: argparse.ArgumentParser, *given: Any) -> NoReturn:
        _, unknown = understand(self, *given)
        if unknown:
            self.error(f"{script.name} does not know {unknown}")
        raise Parsed([])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", only_known)
        patch.setattr(argparse.ArgumentParser, "parse_args", all_known)
        patch.setattr(sys, "argv", words)
        with pytest.raises(Parsed) as parsed:
            module.main()
    parse_training(parsed.value.rest)


def runs_here(name: str, config: Any) -> bool:
    """Whether a command is run: all that it reads is in the repository, or made by others."""
    if name in ("benchmark", "tests", "download", "shapes", "words"):
        return False
    if name in ("schedule", "plan", "report", "export", "hosts check"):
        return True
    rewards = getattr(getattr(config, "config", config), "rewards", {}).values()
    paths = [path for reward in rewards for path in (reward.model, reward.checkpoint)]
    if name != "evaluate":
        paths.append(config.model.path)
    return not any(path.startswith(ELSEWHERE) for path in paths if path)


def understood(command: Command, place: Path) -> tuple[list[str], str, Any]:
    """Python's words, which command they come to, and what it reads from them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in command.environment.items():
            patch.setenv(name, value)
        words = given_to_python(command, place)
        return words, *parse(words, place)


@pytest.mark.parametrize("command", SHOWN, ids=str)
def test_a_shown_command_is_known_to_its_program(command: Command, place: Path) -> None:
    """None is left out, of whatever kind; scripts, recipes, options and knobs exist."""
    _, name, _ = understood(command, place)
    assert name in {*COMMANDS, "hosts check", "benchmark", "tests"}


@pytest.mark.parametrize(
    "text",
    [
        "curl https://example.org",
        "python -m json.tool a",
        "python scripts/other.py",
        "python -m mixgrpo trains",
        "python -m mixgrpo train --recipe shapes_mixgrpo --run.foldr runs/a",
        "python -m mixgrpo train --recipe shapes_mixgrp",
        "python -m mixgrpo train --recipe flux_mixgrpo --batch.samples 13",
        "python -m mixgrpo launch --nproc 2 train --recipe shapes_mixgrpo",
        "python -m mixgrpo sample --recipe flux --hybrid 1.5",
        "python -m mixgrpo doctor --recipe flux_mixgrpo --process 8",
        "python -m mixgrpo shapes --only flx",
        "bash scripts/other.sh",
        "bash scripts/launch.sh trains",
        "bash scripts/download_models.sh fluks",
        "bash scripts/hosts/check.sh --run.foldr a",
        "PROCESSES=two bash scripts/inference/inference_flux.sh",
        "sbatch --node 4 scripts/finetune/finetune_flux_mixgrpo.slurm",
        "sbatch --nodes 4 scripts/finetune/finetune_flux_mixgrpo.slurm --run.foldr a",
        "python scripts/benchmark/other.py",
        "python scripts/benchmark/speed.py --models a",
        "python scripts/benchmark/engines.py --update.kll 0.04",
        "torchrun --nproc_per_node 2 scripts/benchmark/gathering.py --engines dpp",
        "bash scripts/benchmark/gpu.sh --parts loar",
    ],
)
def test_what_no_program_knows_is_found(text: str, place: Path) -> None:
    with pytest.raises((AssertionError, ValueError, SystemExit, OSError, pytest.fail.Exception)):
        understood(Command("README.md", tuple(shlex.split(text))), place)


# ---- running


def inputs(words: list[str]) -> list[Path]:
    """What a command reads of what other commands made."""
    found = []
    for option, word in pairwise(["", *words]):
        path = Path(re.sub(r"^\w+=", "", word))
        is_made = option in OUTPUTS and not (option == "--run.folder" and "--run.resume" in words)
        if path.parts[:1] == ("runs",) and not is_made:
            found.append(path)
    return found


def outputs(words: list[str]) -> list[Path]:
    """What a command makes; of an option given twice, the last counts."""
    named = {option: word for option, word in pairwise(words) if option in OUTPUTS}
    return [Path(word) for word in named.values()]


def _as_a_rank(words: list[str], place: Path) -> None:
    os.chdir(place)
    sys.path.insert(0, str(place))
    raise SystemExit(main(words))


def _launched(place: Path, given: argparse.Namespace, grace: int, left: Callable[[], str]) -> int:
    """In torchrun's place, which would import everything anew in each process."""
    count, words = int(given.nproc_per_node), given.training_script_args
    if count == 1:
        return main(words)
    processes = started(count, _as_a_rank, words, place)
    for process in processes:
        process.join(300)
        process.kill()
    return next((process.exitcode for process in processes if process.exitcode), 0)


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place in which commands are carried out, on the CPU, without a wandb account."""
    place = make_place(tmp_path)
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(launch, "_start", partial(_launched, place))
    return place


def in_order(words: dict[Command, list[str]], place: Path) -> Iterator[Command]:
    """Each README's in their order; one that lacks another's run lets the other READMEs go on."""
    waiting = list(words)
    while waiting:
        firsts = {command.readme: command for command in reversed(waiting)}.values()
        for command in firsts:
            if all((place / path).exists() for path in inputs(words[command])):
                break
        else:
            lacking = {str(command): inputs(words[command]) for command in firsts}
            pytest.fail(f"no README shows first what makes one of these: {lacking}")
        waiting.remove(command)
        yield command


@pytest.mark.slow
def test_shown_commands_run_in_their_order(busy: Path) -> None:
    """All that need nothing from elsewhere."""
    known = {command: understood(command, busy) for command in SHOWN}
    kinds = {
        command: name for command, (_, name, config) in known.items() if runs_here(name, config)
    }
    assert {"train", "sample", "evaluate", "schedule", "doctor"} <= set(kinds.values())
    words = {c: [*known[c][0], *SHORT.get(name, [])] for c, name in kinds.items()}
    for command in in_order(words, busy):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in command.environment.items():
                patch.setenv(name, value)
            assert words[command][:2] == ["-m", "mixgrpo"], command
            assert main(words[command][2:]) == 0, command
        for path in outputs(words[command]):
            assert (busy / path).exists(), f"{path} of {command}"
            left = sorted(file.name for file in (busy / path).glob("*"))
            if kinds[command] == "train":
                assert {"metrics.jsonl", "model", "report.html"} <= set(left), command
            if kinds[command] == "sample":
                assert len([name for name in left if name.endswith(".png")]) == TEST_PROMPTS
            if kinds[command] == "evaluate":
                table = (busy / path / "table.md").read_text()
                for name in (*(p.name for p in inputs(words[command])), "all_right"):
                    assert name in table


# ---- the files of scripts/


def shown_files(*shown_in: str) -> set[str]:
    """The paths of file trees: lines of a fence that begin with one, and its text."""
    text = "".join(fenced("", ROOT / readme) for readme in shown_in)
    return set(re.findall(r"^(\S+\.\w+|\S+/) +\S", text, re.MULTILINE))


def test_file_trees_name_what_is_there() -> None:
    shown = shown_files("scripts/README.md", "scripts/benchmark/README.md")
    assert [path for path in shown if not (ROOT / path).exists()] == []
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "scripts" / "benchmark").glob("*.py")}
    assert len(there) > 15
    assert there <= shown
    folders = tuple(path for path in shown if path.endswith("/"))
    for path in (ROOT / "scripts").rglob("*.sh"):
        name = str(path.relative_to(ROOT))
        assert name in shown or name.startswith(folders), f"{name} is in no file tree"
