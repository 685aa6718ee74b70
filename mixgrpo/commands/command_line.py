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
from types import FrameType

import jsonargparse


def new_parser(command: str, description: str) -> jsonargparse.ArgumentParser:
    """A parser that reads knobs and their help from dataclasses and accepts no abbreviations."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return jsonargparse.ArgumentParser(
        prog=f"python -m mixgrpo {command}",
        allow_abbrev=False,  # an abbreviated name is treated as a typo
        description=description,
        exit_on_error=False,
    )


def read_words(
    parser: jsonargparse.ArgumentParser,
    words: Sequence[str],
    one_line: Callable[[str], str],
) -> jsonargparse.Namespace:
    """Parses and instantiates the words of a command line.

    Args:
        one_line: turns the parser's message into one helpful line.

    Raises:
        ValueError: a knob is unknown or has a wrong value.
    """
    try:
        return parser.instantiate(parser.parse_args(list(words)))
    except argparse.ArgumentError as error:
        raise ValueError(_without_jargon(one_line(" ".join(str(error).split())))) from error


_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def _without_jargon(text: str) -> str:
    """The message about a wrong value, without the parser's internal names."""
    wrong = re.search(
        r"""Parser key "([\w.]+)": Expected an? <class '(\w+)'>. Got value: (.*)""", text
    )
    if wrong is None or wrong[2] not in _KINDS:
        return text
    inside = re.search(r'Parser key "([\w.]+)": Problem with', text[: wrong.start()])
    knob = f"{inside[1]}.NAME.{wrong[1]}" if inside else wrong[1]
    return f"{knob} is {wrong[3]!r}; it must be {_KINDS[wrong[2]]}"


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


def unknown_knob(message: str) -> str | None:
    """The dotted path of the knob that a parser's message reports as unknown."""
    unknown = re.search(r"unrecognized arguments: --([\w.]+)", message) or re.search(
        r"'([\w.]+)' does not accept option '([\w.]+)'", message
    )
    return ".".join(unknown.groups()) if unknown else None


def no_such_knob(knob: str, known: Iterable[str]) -> str:
    """The message for a mistyped knob, with the closest known name."""
    nearest = difflib.get_close_matches(knob, list(known), n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else "--help lists all knobs"
    return f"there is no knob {knob}; {hint}"


def carry_out(
    action: Callable[[], object], expected: tuple[type[Exception], ...], how_to_continue: str
) -> int:
    """Runs a command's action; returns the exit code. Expected errors are printed in one line.

    Args:
        expected: errors whose message suffices; their ``exit_code``, if they have one, is the
            command's.
        how_to_continue: printed after Ctrl-C or SIGTERM.
    """
    try:
        with _interruptible():
            action()
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        name = signal.Signals(number).name
        return complain(KeyboardInterrupt(f"stopped by {name}; {how_to_continue}"), 128 + number)
    except expected as error:
        if os.environ.get("MIXGRPO_TRACEBACK"):
            traceback.print_exc()
        return complain(error, getattr(error, "exit_code", 1))
    except RuntimeError as error:
        # Communication fails when another process has exited, which has reported the reason.
        if not re.search(r"gloo|NCCL", str(error)):
            raise
        first_line = str(error).splitlines()[0]
        return complain(ConnectionError(f"lost another process of this run: {first_line}"))
    return 0


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Within the context, SIGTERM acts like Ctrl-C, so that files and processes are closed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def complain(error: BaseException, exit_code: int = 1) -> int:
    """Prints an error in one line; returns ``exit_code``."""
    rank = os.environ.get("RANK", "0")
    prefix = f"error (rank {rank})" if rank != "0" else "error"
    print(f"{prefix}: {error}", file=sys.stderr)
    return exit_code
