"""Every command that the README shows is run as it stands, made short by overrides at its end."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


TRAINING = [c for c in shown_commands() if " train " in c and "flux_mixgrpo" not in c]
RUN = [c for c in shown_commands() if c in TRAINING or " mixgrpo preprocess " in c]


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


def test_commands_run_in_their_order(place):
    assert len(RUN) > len(TRAINING)
    for command in RUN:
        training = command in TRAINING
        done = run([*as_here(command), *(SHORT if training else [])], place)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        assert ("trained model:" if training else "prompts in") in done.stdout


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
