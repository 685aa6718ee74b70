"""Functions shared by the commands: parsing knobs, and reporting errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jsonargparse

from mixgrpo.config import Config
from mixgrpo.files.home import expand_home
from mixgrpo.files.messages import in_one_line, shortened
from mixgrpo.run.guard import Guard, stops

GRACE = 900  # seconds for saving and exiting, for commands without run.grace


class OptionParser(argparse.ArgumentParser):
    """A parser of a command's options, for commands without knobs.

    It accepts no abbreviations, and raises ValueError, in place of exiting, for an option that is
    unknown or has a wrong value.
    """

    def __init__(self, command: str, description: str, **more: Any) -> None:
        super().__init__(
            prog=f"python -m mixgrpo {command}",
            allow_abbrev=False,  # an abbreviated name is treated as a typo
            description=description,
            **more,
        )

    def parse_args(self, words: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """The options; a mistyped one is reported before any that is missing."""
        known = [name for action in self._actions for name in action.option_strings]
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in known:
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else "--help lists all options"
                raise ValueError(f"there is no option {shortened(name)}; {hint}")
        given, unknown = self.parse_known_args(list(words))
        if unknown:
            raise ValueError(
                f"{shortened(unknown[0])!r} is not expected here; --help shows the usage"
            )
        return given

    def error(self, message: str) -> NoReturn:
        named = re.fullmatch(r"argument (\S+): (is .*)", message, re.DOTALL)
        if named is not None:
            raise ValueError(f"{named[1]} {named[2]}")
        message = message.replace("expected one argument", "it needs a value")
        message = message.replace("ignored explicit argument", "it takes no value, but was given")
        raise ValueError(f"{message.removeprefix('argument ')}; --help shows the usage")


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """A type of options: whole numbers in [least, most]."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[-+]?[0-9]{1,4000}", text):
            raise argparse.ArgumentTypeError(f"is {shortened(text)!r}; it must be a whole number")
        for is_wrong, limit in (
            (int(text) < least, f"least {least}"),
            (int(text) > most, f"most {most}"),
        ):
            if is_wrong:
                raise argparse.ArgumentTypeError(f"is {shortened(text)}; it must be at {limit}")
        return int(text)

    return parse


def home_path(text: str) -> Path:
    """A type of options: a path, in which ``~`` is the home folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    try:
        return Path(expand_home(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is not usable: {error}") from error


def show_help(
    command: str, description: str, knobs: type, words: Sequence[str], recipes: str = ""
) -> None:
    """Prints the help of a command with knobs, and exits, if the words ask for it.

    Args:
        knobs: the dataclass of the knobs; the strings below its fields are their help.
        words: ``--help``, or ``--rewards.help`` for the knobs of a reward.
        recipes: the folder of the recipes; empty if the command takes none.
    """
    wanted = [word for word in words if re.fullmatch(r"-h|--help|--[\w.]+\.help", word)]
    if not wanted:
        return
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m mixgrpo {command}", description=description, exit_on_error=False
    )
    if recipes:
        parser.add_argument(
            "--recipe", help=f"name of a recipe in {recipes}, or path of a YAML file"
        )
        parser.add_argument(
            "--print_config",
            action="store_true",
            help="print the resolved knobs as a recipe, and exit",
        )
    parser.add_class_arguments(knobs)
    with contextlib.suppress(argparse.ArgumentError):  # a knob without help of its own
        parser.parse_args(wanted[:1])


def take_option(arguments: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """The value of an option that is not a knob, and the other words.

    The last occurrence of the option counts; its value is None if the option is not given.

    Raises:
        ValueError: the option has no value.
    """
    value, others = None, []
    words = iter(arguments)
    for word in words:
        if word == option:
            value = next(words, "")
        elif word.startswith(f"{option}="):
            value = word.removeprefix(f"{option}=")
        else:
            others.append(word)
            continue
        if not value:
            raise ValueError(f"{option} needs a value")
    return value, others


def no_such_knob(knob: str, known: Iterable[str]) -> str:
    """The message for a mistyped or misplaced knob, with the closest known name."""
    names = {name.lower(): name for name in known}
    last = knob.lower().rpartition(".")[2]
    of_that_name = [name for name in names if name.rpartition(".")[2] == last]
    nearest = difflib.get_close_matches(knob.lower(), of_that_name, n=1, cutoff=0)
    nearest += difflib.get_close_matches(knob.lower(), names, n=1)
    hint = f"did you mean {names[nearest[0]]}?" if nearest else "--help lists all knobs"
    shown = shortened(knob)
    return f"there is no knob {shown if shown and shown.isprintable() else repr(shown)}; {hint}"


def carry_out(
    action: Callable[[], object],
    expected: tuple[type[Exception], ...],
    how_to_continue: str | Callable[[], str],
    grace: float = GRACE,
) -> int:
    """Runs a command's action; returns the exit code. Expected errors are printed in one line.

    Args:
        expected: errors whose message suffices; their ``exit_code``, if they have one, is the
            command's.
        how_to_continue: printed after Ctrl-C or SIGTERM.
        grace: seconds after a signal, after which the process is ended if it still runs.
    """
    left = (lambda: how_to_continue) if isinstance(how_to_continue, str) else how_to_continue
    try:
        with Guard(grace, left), _interruptible():
            action()
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        name = signal.Signals(number).name
        return complain(KeyboardInterrupt(f"stopped by {name}; {left()}"), 128 + number)
    except expected as error:
        if os.environ.get("MIXGRPO_TRACEBACK"):
            traceback.print_exc()
        return complain(error, getattr(error, "exit_code", 1))
    except RuntimeError as error:
        # Communication fails when another process has exited, which has reported the reason.
        if not re.search(r"gloo|NCCL", str(error)):
            raise
        lost = f"lost another process of this run: {in_one_line(error)}"
        return complain(ConnectionError(lost))
    return 0


def grace_of(config: object) -> int:
    """Seconds that a command has for saving and exiting when it is stopped."""
    return config.run.grace if isinstance(config, Config) else GRACE


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Within the context, SIGTERM and SIGHUP act like Ctrl-C, so that files and processes are
    closed. Only the first signal takes effect, because another would interrupt the closing."""
    is_heeded = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal is_heeded
        if not is_heeded:
            is_heeded = True
            raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, interrupt) for number in stops()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def complain(error: BaseException, exit_code: int = 1) -> int:
    """Prints an error in one line; returns ``exit_code``."""
    rank = os.environ.get("RANK", "0")
    prefix = f"error (rank {rank})" if rank not in ("", "0") else "error"
    print(f"{prefix}: {error}", file=sys.stderr)
    return exit_code
