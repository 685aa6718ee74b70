"""Every command that the README shows is run as it stands, made short by overrides at its end."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixgrpo.commands.sample import parse
from mixgrpo.inference.config import check

ROOT = Path(__file__).parent.parent
SHORT = [
    "--run.iterations",
    "1",
    "--sampling.steps",
    "5",
    "--window.size",
    "2",
    "--window.envelope",
    "null",
    "--batch.prompts",
    "2",
    "--batch.samples",
    "4",
    "--update.optimizer_steps",
    "2",
    "--validation.prompts",
    "2",
    "--validation.steps",
    "2",
    "--log.progress",
    "false",
]
REWARD = """
def my_reward(images, texts):
    return -images.std((1, 2, 3))
"""


def shown_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


SAMPLING = [c for c in shown_commands() if " sample " in c]
TRAINING = [c for c in shown_commands() if " train " in c and "flux_mixgrpo" not in c]
CHAIN = [c for c in shown_commands() if "runs/all/" in c]
REPORTS = [c for c in shown_commands() if " mixgrpo report " in c]
OTHERS = {
    " mixgrpo preprocess ": "prompts in",
    " mixgrpo export ": "model of",
    " mixgrpo report ": "report:",
}
RUN = [c for c in shown_commands() if c in TRAINING or any(other in c for other in OTHERS)]


@pytest.fixture
def place(tmp_path):
    """A folder that looks like the repository, with a user's own files beside."""
    for name in ("data", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my_prompts.txt").write_text("a red circle on a gray background\n" * 3)
    (tmp_path / "my_module.py").write_text(REWARD)
    return tmp_path


def run(command: list[str], place: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{place}:{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("WANDB_API_KEY", None)
    return subprocess.run(
        command,
        check=False,
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def as_here(command: str) -> list[str]:
    """The command with this Python."""
    words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", command)]
    return [sys.executable if word == "python" else word for word in words]


def test_the_readme_shows_training_commands():
    assert len(TRAINING) >= 4


@pytest.mark.slow
def test_commands_run_in_their_order(place):
    assert len(REPORTS) >= 2
    for command in RUN:
        training = command in TRAINING
        done = run([*as_here(command), *(SHORT if training else [])], place)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        said = next(
            (words for other, words in OTHERS.items() if other in command), "trained model:"
        )
        assert said in done.stdout


@pytest.mark.slow
def test_sampling_commands_run(place):
    """In their order, on the first prompts; the tuned ones with a trained model where they want."""
    (place / "few.txt").write_text("a red circle on a gray background\n" * 3)
    tuned = place / "runs" / "quickstart" / "model"
    tuned.parent.mkdir(parents=True)
    shutil.copytree(ROOT / "data" / "shapes" / "flux", tuned)
    assert len(SAMPLING) >= 3
    for command in SAMPLING:
        done = run([*as_here(command), "--prompts_file", "few.txt", "--steps", "2"], place)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        folder = re.search(r"--folder (\S+)", command).group(1)
        assert len(list((place / folder).glob("*.png"))) == 3


@pytest.mark.slow
def test_the_scripts_run_one_after_the_other(place):
    """Preprocessing, fine-tuning, three inferences, evaluation: made short, otherwise as shown."""
    (place / "scripts").unlink()
    shutil.copytree(ROOT / "scripts", place / "scripts")
    shutil.copytree(ROOT / "hosts", place / "hosts")
    (place / "env_setup.sh").write_text("")
    python = place / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    few = "\n".join((ROOT / "data/shapes/prompts_test.txt").read_text().splitlines()[:3])
    (place / "few.txt").write_text(few)
    inference = ["--prompts_file", "few.txt", "--steps", "3"]
    short = {"finetune": SHORT, "inference": inference, "evaluate": ["--resamples", "50"]}
    assert len(CHAIN) == 6
    for command in CHAIN:
        more = next(
            (words for script, words in short.items() if f"scripts/{script}/" in command), []
        )
        done = run(["bash", "-c", f"{command} {' '.join(more)}"], place)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    table = (place / "runs/all/evaluation/table.md").read_text()
    for name in ("base", "tuned", "hybrid", "all_right"):
        assert name in table


def test_what_is_looked_at_before_a_run(place):
    """The windows are drawn, and the Shapes world is healthy."""
    commands = [c for c in shown_commands() if " schedule " in c or " doctor " in c]
    assert len(commands) == 2
    for command in commands:
        done = run(as_here(command), place)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr[-2000:]}"
    assert (place / "runs/schedule/windows.png").is_file()


def test_inference_commands_have_knobs_that_are_there():
    """Those for FLUX.1-dev need its weights, so they are read, not run."""
    commands = [c for c in shown_commands() if "inference_flux.sh" in c and c not in CHAIN]
    assert commands
    for command in commands:
        words = as_here(command)
        check(parse(["--recipe", "flux", *words[words.index("bash") + 2 :]]))


def test_scripts_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    for script in set(re.findall(r"scripts/[\w/]+\.(?:sh|py|yaml)", text)):
        assert (ROOT / script).is_file(), script


def test_file_tree_of_the_readme_names_what_is_there():
    tree = re.search(r"## The files\n+```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    paths = re.findall(r"^(\S+\.\w+|\S+/)\s", tree.group(1), re.MULTILINE)
    assert len(paths) > 30
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing
    shown = {path for path in paths if path.endswith(".py")}
    there = {str(p.relative_to(ROOT)) for p in (ROOT / "mixgrpo").rglob("*.py")}
    assert {p for p in there if not p.endswith("__init__.py")} <= shown
