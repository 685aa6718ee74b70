"""The command line: one module per command, imported when the command is called."""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "fine-tune a model with a recipe",
    "sample": "generate images for test prompts",
    "evaluate": "score the images of several models and compare them",
    "report": "write curves, images and knobs of runs to one HTML file",
    "preprocess": "encode prompts in advance, so that training needs no text encoder",
    "export": "write a checkpoint's weights or their EMA as a diffusers folder or LoRA file",
    "doctor": "look for problems that would stop a run, before it starts",
    "schedule": "show which steps a recipe trains, and how often",
    "plan": "estimate memory and time on any number of GPUs",
    "launch": "run a command in several processes, like torchrun but with shorter errors",
    "hosts": "run a command on all hosts of a hostfile; `hosts check` compares the hosts",
    "download": "fetch models and prompts from Hugging Face",
    "shapes": "rebuild the checkpoints and captions of the Shapes world",
    "words": "build, draw and measure the world of words",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. Errors that a user can fix take one line."""
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
    except KeyboardInterrupt as stopped:  # during imports; later, the command says what is left
        print("error: interrupted before the command started", file=sys.stderr)
        return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "mixgrpo":
            raise
        print(
            f"error: the package {error.name} is not installed for {sys.executable}; run "
            "`bash env_setup.sh`, which installs it, and use .venv/bin/python",
            file=sys.stderr,
        )
        return 1


def _usage() -> str:
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m mixgrpo COMMAND [options]; COMMAND --help lists its options", *lines]
    )
