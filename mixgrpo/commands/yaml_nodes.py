"""Strict YAML, as nodes that keep their text: the type of its knob decides what a scalar means."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mixgrpo.files.messages import shortened

MOST_LEVELS = 20  # of nesting
MOST_NODES = 20_000  # with every alias replaced by what it stands for
MOST_KEY = 100  # characters

_SPECIAL = re.compile(r"'([^'\s]{2,})'|\"[^\"]*\"")


class _Loader(yaml.BaseLoader):
    """Composes nodes; refuses tags, which would give text another type, and deep nesting."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name  # of the file, in the marks of the nodes
        self.levels = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise ValueError(
                f"{_place(event.start_mark)}: tags such as !!str are not supported; put text in "
                "quotes and leave the tag out"
            )
        self.levels += 1
        if self.levels > MOST_LEVELS:
            raise ValueError(
                f"{_place(event.start_mark)}: more than {MOST_LEVELS} levels of nesting; a recipe "
                "needs only a few"
            )
        node: Node | None = super().compose_node(parent, index)
        self.levels -= 1
        return node


def compose(text: str, name: str) -> Node | None:
    """The root node of YAML text, or None if there is nothing but comments.

    Args:
        name: the file's path, or the option whose value the text is, for ``where``.

    Raises:
        ValueError: the text is not YAML, gives a key twice or one that is not text, or is nested
            too deeply. The message names the line, but quotes nothing except keys, because the
            file may be another than intended and contain secrets.
    """
    loader = None
    try:
        loader = _Loader(text, name)
        node: Node | None = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise ValueError(_not_yaml(error)) from None
    except yaml.YAMLError:  # of the characters; it is the only one without a mark
        raise ValueError(
            f"{name} contains a control character, which YAML does not allow; write it as an "
            'escape such as "\\t" in double quotes'
        ) from None
    finally:
        if loader is not None:
            loader.dispose()
    if node is not None:
        for visited, _ in enumerate(_checked(node, 0)):
            if visited > MOST_NODES:
                raise ValueError(
                    f"it has more than {MOST_NODES} values once its aliases are replaced by what "
                    "they stand for; a recipe needs far fewer"
                )
    return node


def _not_yaml(error: yaml.MarkedYAMLError) -> str:
    if "expected a single document" in str(error.context):
        return (
            f"{_place(error.problem_mark)}: a second document begins here ('---'); write one "
            "recipe to a file, and give several files with several --recipe"
        )
    problem = str(error.problem)
    if error.context_mark and ("stream end" in problem or "end of stream" in problem):
        return f"{_place(error.context_mark)}: what begins here is never closed"
    if "\\t" in problem:
        problem = "a tab is used for indentation; use spaces"
    # Names of aliases, anchors and tags are words of the file.
    problem = _SPECIAL.sub(lambda found: found[0] if found[0].startswith("'<") else "...", problem)
    return f"{_place(error.problem_mark)}: {problem}"


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _checked(node: Node, level: int) -> Iterator[Node]:
    """All nodes, of which those of mappings have distinct keys that are text."""
    if level > MOST_LEVELS:
        raise ValueError(
            f"{_place(node.start_mark)}: an alias is part of what it stands for; write the value "
            "out"
        )
    yield node
    if isinstance(node, SequenceNode):
        for item in node.value:
            yield from _checked(item, level + 1)
    elif isinstance(node, MappingNode):
        _check_keys(node)
        for _, value in node.value:
            yield from _checked(value, level + 1)


def _check_keys(node: MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, ScalarNode):
            raise ValueError(f"{_place(key.start_mark)}: a key is {kind_of(key)}; it must be text")
        if not key.value.isprintable() or len(key.value) > MOST_KEY:
            raise ValueError(
                f"{_place(key.start_mark)}: a key has more than {MOST_KEY} characters, or one that "
                "is not printable; write a shorter one in plain characters"
            )
        if key.style is None and (key.value == "<<" or is_ambiguous(key.value)):
            raise ValueError(
                f"{_place(key.start_mark)}: the key {shown(key)} is not text, or not for every "
                "version of YAML; put it in quotes if it is meant as text"
            )
        if key.value in lines:
            raise ValueError(
                f"{_place(key.start_mark)}: {shown(key)} is given twice, first in line "
                f"{lines[key.value]}; remove one, or merge the two"
            )
        lines[key.value] = key.start_mark.line + 1


class _Dumper(yaml.SafeDumper):
    """Puts all text in quotes that could be read as something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> Node:
    style = '"' if is_ambiguous(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(values: dict[str, Any]) -> str:
    """YAML text of nested values; ``compose`` reads the same from it."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


# ---- scalars


NULL = ("", "~", "null", "Null", "NULL")
TRUE = ("true", "yes", "on")
FALSE = ("false", "no", "off")
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]{1,3})?")
# What YAML 1.1, YAML 1.2 and people read differently: 0714, 0o14, 0x1F, 1_000, 1:30, .inf, None.
_UNCLEAR = re.compile(
    r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?|0[bBoOxX][0-9a-fA-F_]+"
    r"|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?|\.?(inf|infinity|nan))",
    re.IGNORECASE,
)


def is_unclear_number(text: str) -> bool:
    """Whether versions of YAML differ in which number this is, or whether it is one."""
    return not NUMBER.fullmatch(text) and bool(_UNCLEAR.fullmatch(text))


def is_ambiguous(text: str) -> bool:
    """Whether a plain scalar without a known type is, or may be taken for, something but text."""
    word = text.lower()
    return (
        text in (*NULL, "None")
        or word in (*TRUE, *FALSE)
        or bool(NUMBER.fullmatch(text))
        or is_unclear_number(text)
    )


def is_null(node: Node) -> bool:
    """Whether a node is YAML's null, also by having no value."""
    return isinstance(node, ScalarNode) and node.style is None and node.value in NULL


def is_absent(node: Node) -> bool:
    """Whether nothing follows the key."""
    return isinstance(node, ScalarNode) and node.style is None and node.value == ""


def shown(node: Node) -> str:
    """A node for a message: the beginning of a scalar's text, a short list, or what it is."""
    if isinstance(node, ScalarNode):
        return repr(shortened(node.value))
    if isinstance(node, SequenceNode) and len(node.value) <= 6:
        return f"[{', '.join(shown(item).strip(chr(39)) for item in node.value)}]"
    return kind_of(node)


def kind_of(node: Node) -> str:
    """What a node is, without its contents."""
    if isinstance(node, MappingNode):
        return "a mapping"
    if isinstance(node, SequenceNode):
        return f"a list of {len(node.value)}"
    return "empty" if is_absent(node) else "a single value"


def where(node: Node) -> str:
    """The file and line of a node in parentheses; empty for a value of the command line."""
    mark = node.start_mark
    if mark is None or mark.name.startswith("--"):
        return ""
    return f" ({mark.name}, line {mark.line + 1})"
