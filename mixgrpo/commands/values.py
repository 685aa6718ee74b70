"""Turns YAML nodes into values of a knob's type. Text in quotes is text, and nothing else."""

from __future__ import annotations

import types
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mixgrpo.commands.yaml_nodes import (
    FALSE,
    INTEGER,
    NUMBER,
    TRUE,
    is_absent,
    is_ambiguous,
    is_null,
    is_unclear_number,
    kind_of,
    shown,
    where,
)
from mixgrpo.files.home import expand_home

MOST_DIGITS = 40  # of a number; far more than any knob can use


def convert(kind: Any, node: Node, knob: str) -> Any:
    """The value of a node for a knob of the type ``kind``.

    Raises:
        ValueError: it is none of that type; the message names knob, value, type, file and line.
    """
    if kind is Any:
        return free(node, knob)
    return _BY_ORIGIN.get(get_origin(kind), _single)(kind, node, knob)


def _single(kind: Any, node: Node, knob: str) -> Any:
    if not isinstance(node, ScalarNode):
        raise _wrong(kind, node, knob)
    return _SIMPLE[kind](node, knob)


def is_text(kind: Any) -> bool:
    """Whether a knob takes nothing but text (or null), so that a word is its value as it stands."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return all(isinstance(choice, str) for choice in inside)
    if origin in (Union, types.UnionType):
        return all(each is type(None) or is_text(each) for each in inside)
    return kind is str or (origin is Annotated and is_text(inside[0]))


def described(kind: Any) -> str:
    """A type in words."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return "a path"
    if origin is Literal:
        return _alternatives([str(choice) for choice in inside])
    if origin in (Union, types.UnionType):
        return _alternatives([described(each) for each in inside])
    if origin is list:
        return f"a list such as [{_EXAMPLES[inside[0]]}]"
    if origin is tuple:
        return f"a list of {len(inside)}, such as [{', '.join(_EXAMPLES[i] for i in inside)}]"
    return _WORDS.get(kind, "text")


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
_EXAMPLES = {int: "1", float: "0.5", str: "a", Annotated[str, "path"]: "a.txt"}


def _alternatives(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _wrong(kind: Any, node: Node, knob: str, remedy: str = "") -> ValueError:
    value = "null" if is_null(node) else shown(node)
    if is_absent(node):
        return ValueError(
            f"{knob} has no value; write {described(kind)}, or remove the line{where(node)}"
        )
    return ValueError(f"{knob} is {value}; it must be {described(kind)}{remedy}{where(node)}")


def _path(kind: Any, node: Node, knob: str) -> str:
    path: str = convert(get_args(kind)[0], node, knob)
    try:
        return expand_home(path)
    except ValueError as error:
        raise ValueError(f"{knob}: {error}{where(node)}") from None


def _one_of(kind: Any, node: Node, knob: str) -> Any:
    inside = get_args(kind)
    if type(None) in inside and is_null(node):
        return None
    if type(None) in inside and isinstance(node, ScalarNode) and node.value == "None":
        raise _wrong(kind, node, knob)
    is_list = isinstance(node, SequenceNode)
    fitting = [
        each
        for each in inside
        if each is not type(None) and (get_origin(each) in (list, tuple)) == is_list
    ]
    if not fitting:
        raise _wrong(kind, node, knob)
    (each,) = fitting  # no knob has two types for a list, or for a single value
    if is_list or get_origin(each) is Annotated or (each is str and isinstance(node, ScalarNode)):
        return convert(each, node, knob)  # its message says more
    try:
        return convert(each, node, knob)
    except ValueError:
        raise _wrong(kind, node, knob, _too_long(node) or _remedy(each, node)) from None


def _several(kind: Any, node: Node, knob: str) -> Any:
    origin, inside = get_origin(kind), get_args(kind)
    if not isinstance(node, SequenceNode):
        raise _wrong(kind, node, knob)
    kinds = inside * len(node.value) if origin is list else inside
    if len(kinds) != len(node.value) or not kinds:
        raise _wrong(kind, node, knob)
    pairs = zip(kinds, node.value, strict=True)
    return origin(convert(each, item, f"{knob}[{i}]") for i, (each, item) in enumerate(pairs))


def _text(node: ScalarNode, knob: str) -> str:
    if is_null(node):
        raise _wrong(str, node, knob, ', in quotes if the text is "null" or "~"')
    return _clean(node, knob, newlines=False)


def _clean(node: ScalarNode, knob: str, newlines: bool) -> str:
    """The text of a node, without characters that no file, log or terminal can hold."""
    text: str = node.value
    unfit = [c for c in text if ("\ud800" <= c <= "\udfff") or c == "\0"]
    if not newlines:
        unfit += [c for c in text if c < " " or c == "\x7f"]
    if unfit:
        raise ValueError(
            f"{knob} contains the character {unfit[0]!r}, which cannot be part of it; remove "
            f"it{where(node)}"
        )
    return text


def _choice(kind: Any, node: Node, knob: str) -> Any:
    for choice in get_args(kind):
        is_quoted_number = isinstance(choice, int) and getattr(node, "style", None) is not None
        if node.value == str(choice) and not is_quoted_number:
            return choice
    raise _wrong(kind, node, knob, _remedy(kind, node))


def _remedy(kind: Any, node: Node) -> str:
    """What helps in frequent cases."""
    if not isinstance(node, ScalarNode):
        return ""
    choices = [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
    is_quoted = node.style is not None and node.value
    if is_quoted and (kind in (int, float, bool) or node.value in choices):
        return ", without quotes"
    if node.value.lower() in choices:
        return ", in lower case"
    if kind in (int, float) and is_unclear_number(node.value):
        is_digits = any(c.isdecimal() for c in node.value)
        return (
            " in plain decimal digits, without leading zeros, prefixes, underscores and colons"
            if is_digits
            else " that is finite"
        )
    return ""


def _whole(node: ScalarNode, knob: str) -> int:
    text = node.value
    if node.style is None and len(text) <= MOST_DIGITS and NUMBER.fullmatch(text):
        value = Decimal(text)  # 1e3 and 5.0 are whole numbers too
        if value.adjusted() < MOST_DIGITS and value == int(value):
            return int(value)
    raise _wrong(int, node, knob, _too_long(node) or _remedy(int, node))


def _number(node: ScalarNode, knob: str) -> float:
    text = node.value
    if node.style is None and len(text) <= MOST_DIGITS and NUMBER.fullmatch(text):
        value = float(text)
        lost = value == 0 and any(digit in "123456789" for digit in text.lower().split("e")[0])
        if abs(value) != float("inf") and not lost:
            return value
        raise _wrong(float, node, knob, f" that is not too {'small' if lost else 'large'}")
    raise _wrong(float, node, knob, _too_long(node) or _remedy(float, node))


def _too_long(node: Node) -> str:
    is_long = (
        isinstance(node, ScalarNode)
        and NUMBER.fullmatch(node.value)
        and (len(node.value) > MOST_DIGITS)
    )
    return f" of at most {MOST_DIGITS} digits" if is_long else ""


def _flag(node: ScalarNode, knob: str) -> bool:
    word = node.value.lower()
    if node.style is not None or word not in (*TRUE, *FALSE):
        raise _wrong(bool, node, knob, _remedy(bool, node))
    return word in TRUE


_SIMPLE: dict[Any, Callable[[ScalarNode, str], Any]] = {
    str: _text,
    int: _whole,
    float: _number,
    bool: _flag,
}


# ---- values without a type: the options of a reward


def _options(kind: Any, node: Node, knob: str) -> dict[str, Any]:
    if is_absent(node):
        return {}
    if not isinstance(node, MappingNode):
        raise ValueError(
            f"{knob} is {kind_of(node)}; it must be a mapping of names to values, such as "
            f"{{name: value}}{where(node)}"
        )
    return {key.value: free(value, f"{knob}.{key.value}") for key, value in node.value}


def free(node: Node, knob: str) -> Any:
    """The value of a node that may have any type.

    Raises:
        ValueError: it is a plain scalar that not everyone would take for the same value.
    """
    if isinstance(node, SequenceNode):
        return [free(item, f"{knob}[{i}]") for i, item in enumerate(node.value)]
    if isinstance(node, MappingNode):
        return _options(dict, node, knob)
    assert isinstance(node, ScalarNode)
    text = node.value
    if is_absent(node):
        raise ValueError(f"{knob} has no value; give one, or write null or ''{where(node)}")
    if node.style is not None or not is_ambiguous(text):
        return _clean(node, knob, newlines=True)
    if is_null(node) or text.lower() in ("true", "false"):
        return None if is_null(node) else text.lower() == "true"
    if NUMBER.fullmatch(text):
        return (_whole if INTEGER.fullmatch(text) else _number)(node, knob)
    raise ValueError(
        f"{knob} is {shown(node)}, which can be read as text or as another value; put it in quotes "
        "if it is text; otherwise write true or false, or a finite number in plain decimal "
        f"digits{where(node)}"
    )


_BY_ORIGIN: dict[Any, Callable[[Any, Node, str], Any]] = {
    Annotated: _path,
    Union: _one_of,
    types.UnionType: _one_of,
    Literal: _choice,
    list: _several,
    tuple: _several,
    dict: _options,
}
