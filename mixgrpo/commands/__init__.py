"""The command line: one file per command, imported when it is called."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "fine-tune a model by a recipe",
    "sample": "draw pictures of test prompts",
    "evaluate": "score pictures of several models and compare them",
    "report": "curves, pictures and knobs of runs, as one HTML file",
    "preprocess": "encode prompts in advance, so that training needs no text encoder",
    "export": "a checkpoint's weights, or their average, as a diffusers folder or LoRA file",
    "doctor": "look for what would stop a run, before it starts",
    "schedule": "show which steps a recipe trains, and how often",
    "plan": "estimate memory and time on any number of GPUs",
    "launch": "a command in several processes: torchrun, with shorter errors",
    "hosts": "a command on all hosts of a hostfile, looked after; hosts check compares them",
    "download": "fetch models and prompts from Hugging Face",
    "shapes": "rebuild the checkpoints and captions of the Shapes world",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. An error that a user can mend is one line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return 0 if given else 2
    if given[0] not in COMMANDS:
        nearest = difflib.get_close_matches(given[0], COMMANDS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        print(f"error: unknown command {given[0]!r}{hint}\n{_usage()}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"mixgrpo.commands.{given[0]}").run(given[1:])
    except KeyboardInterrupt:  # while modules are imported; later, commands say how to go on
        print("error: interrupted before it began", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "mixgrpo":
            raise
        print(
            f"error: {sys.executable} has no package {error.name}; bash env_setup.sh installs what "
            "is missing, and .venv/bin/python runs with it",
            file=sys.stderr,
        )
        return 1


def _usage() -> str:
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m mixgrpo COMMAND [options]; COMMAND --help for its options", *lines]
    )
