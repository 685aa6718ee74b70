"""Sets the knobs of a configuration from recipes and from the words of a command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mixgrpo.commands.command_line import no_such_knob
from mixgrpo.commands.recipes import read_recipe
from mixgrpo.commands.values import convert, free, is_text
from mixgrpo.commands.yaml_nodes import (
    MOST_KEY,
    MOST_LEVELS,
    compose,
    dump,
    is_absent,
    kind_of,
    where,
)
from mixgrpo.files.messages import shortened

REWARD_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
PRINT = "--print_config"
_MAY_BE_BLANK = ("negative_prompt",)  # " " is that of Qwen-Image, and "" that of others
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"


def set_knobs(config: Any, words: Sequence[str], recipes: Path | None = None) -> None:
    """Sets the knobs of a dataclass: first those of every recipe, then those of the other words.

    Args:
        words: ``--recipe NAME`` and ``--section.knob VALUE``, or either with ``=``, in any order.
        recipes: folder of the recipes that have a name; None if the command takes no recipe.

    Raises:
        OSError: a recipe does not exist or cannot be read.
        ValueError: a knob is unknown or has a wrong value, or a recipe is not valid.
        SystemExit: the words ask for the knobs only, which have been printed as a recipe.
    """
    is_shown = recipes is not None and PRINT in words
    words = [word for word in words if not (is_shown and word == PRINT)]
    options = list(read_options(words, _several(config)))
    of_recipe = [option for option in options if option.name == "recipe" and recipes]
    for option in of_recipe:
        assert recipes is not None
        _Source(config).fill(config, "", read_recipe(option.value(), recipes))
    for option in options:
        if option not in of_recipe:
            _set(config, option)
    _check_required(config)
    if is_shown:
        print(dump(asdict(config)), end="")
        raise SystemExit(0)


# ---- the words of a command line


@dataclass(frozen=True)
class Option:
    """An option of a command line with its values; it has none if another option follows."""

    name: str
    values: list[str]

    def value(self) -> str:
        """Its value; raises ValueError if it has none."""
        if self.values:
            return self.values[0]
        raise ValueError(
            f"--{self.name} needs a value; one that begins with -- is written --{self.name}=VALUE"
        )


def read_options(words: Sequence[str], several: Iterable[str] = ()) -> Iterator[Option]:
    """The options of a command line.

    Args:
        several: names of the options that take all words up to the next option.

    Raises:
        ValueError: a word is neither an option nor the value of one.
    """
    place = 0
    while place < len(words):
        name, equals, value = _option_name(words[place]).partition("=")
        place += 1
        end = place + (len(words) if name in several else 1)
        values = [value] if equals else []
        while not equals and place < min(end, len(words)) and not words[place].startswith("--"):
            values.append(words[place])
            place += 1
        yield Option(name, values)


def _option_name(word: str) -> str:
    if re.match(r"--[^-=]", word):
        return word[2:]
    short = shortened(word)
    if word and word[0] in _DASHES:
        raise ValueError(
            f"{short!r} begins with a dash that is not '-'; write --{short.lstrip(_DASHES + '-')}"
        )
    raise ValueError(
        f"{short!r} is neither an option nor the value of one; options are written --NAME VALUE, "
        "and --help lists them"
    )


def _several(config: Any) -> list[str]:
    hints = get_type_hints(type(config))
    return [name for name, kind in hints.items() if get_origin(kind) is list]


def _set(config: Any, option: Option) -> None:
    source = _Source(config)
    parts = option.name.split(".")
    kind = source.kind_at(type(config), "", parts, _word(""))  # first of all, whether it exists
    source.put(config, "", parts, _node(kind, option), _word(""))


def _word(text: str, is_quoted: bool = False) -> ScalarNode:
    return ScalarNode(None, text, style='"' if is_quoted else None)


def _node(kind: Any, option: Option) -> Node:
    """The value of an option as a node; text that is not in quotes or brackets is not YAML."""
    text = option.value()
    if get_origin(kind) is list:
        return SequenceNode(None, [_word(each, is_quoted=True) for each in option.values])
    if is_text(kind):
        return _word(text, is_quoted=not (text == "null" and NoneType in get_args(kind)))
    if not text or not (text[0] in "[{\"'" or is_dataclass(kind) or get_origin(kind) is dict):
        return _word(text, is_quoted=not text)
    try:
        node = compose(text, f"--{option.name}")
    except ValueError as error:
        raise ValueError(
            f"--{option.name} is not valid YAML: {error}; a value that begins with a bracket or a "
            "quote is read as YAML, so put it in quotes if it is text"
        ) from None
    return node or _word("", is_quoted=True)


# ---- configurations


@dataclass
class _Source:
    """One recipe, or one option, of which each knob may be set only once.

    Attributes:
        config: the whole configuration, for the names of its knobs.
        lines: line in which each knob has been set.
    """

    config: Any
    lines: dict[str, int] = field(default_factory=dict)

    def fill(self, section: Any, name: str, node: Node) -> None:
        """Sets the knobs of a section; one without any, as if they were commented out, is kept."""
        if is_absent(node):
            return
        if not isinstance(node, MappingNode):
            first = next(iter(get_type_hints(type(section))))
            raise ValueError(
                f"{name} is {kind_of(node)}, but it is a section of knobs; write them below it, "
                f"such as {name}: {{{first}: ...}}{where(node)}"
            )
        prefix = f"{name}." if name else ""
        for key, value in node.value:
            self.put(section, prefix, key.value.split("."), value, key)

    def put(self, section: Any, prefix: str, parts: list[str], node: Node, at: Node) -> None:
        """Sets the knob, or the section, that ``parts`` lead to from ``section``."""
        self.kind_at(type(section), prefix, parts, at)
        kind = _hints(type(section))[parts[0]]
        name, rest = f"{prefix}{parts[0]}", parts[1:]
        if is_dataclass(kind):
            self._descend(getattr(section, parts[0]), name, rest, node, at)
        elif get_origin(kind) is dict and is_dataclass(get_args(kind)[1]):
            make = get_args(kind)[1]
            entries = getattr(section, parts[0])
            if rest:
                entry = entries.setdefault(rest[0], make(""))
                self._descend(entry, f"{name}.{rest[0]}", rest[1:], node, at)
            else:
                setattr(section, parts[0], self._entries(make, entries, name, node))
        elif rest:
            self._note(".".join([name, *rest]), at)
            _put_inside(getattr(section, parts[0]), name, rest, node)
        else:
            self._note(name, at)
            value = convert(kind, node, name)
            _check_not_empty(section, parts[0], name, value, node)
            setattr(section, parts[0], value)

    def _descend(self, section: Any, name: str, rest: list[str], node: Node, at: Node) -> None:
        if rest:
            self.put(section, f"{name}.", rest, node, at)
        else:
            self.fill(section, name, node)

    def _entries(self, make: Any, before: dict[str, Any], name: str, node: Node) -> dict[str, Any]:
        """The named sections of a mapping. Those of a former recipe are dropped if they are not
        named again, and otherwise keep the knobs that are not set again."""
        if is_absent(node):
            return before
        if not isinstance(node, MappingNode):
            raise ValueError(
                f"{name} is {kind_of(node)}; it must be a mapping of names to their knobs, such as "
                f"{name}: {{mine: {{kind: jpeg_size}}}}{where(node)}"
            )
        self._check_once(name, node)  # what is set by a dotted key would be dropped
        entries = {}
        for key, value in node.value:
            _check_name(name, key.value, key)
            entries[key.value] = before.get(key.value, make(""))
            self.fill(entries[key.value], f"{name}.{key.value}", value)
        return entries

    def kind_at(self, section: Any, prefix: str, parts: list[str], at: Node) -> Any:
        """The type that the names ``parts`` lead to from a class; ValueError if there is none."""
        kind = section
        for place, part in enumerate(parts):
            if is_dataclass(kind):
                before = prefix + "".join(f"{each}." for each in parts[:place])
                known = [*_names(type(self.config)), *(before + each for each in _hints(kind))]
                kind = _hints(kind).get(part)
            elif get_origin(kind) is dict:
                kind = get_args(kind)[1]
                if is_dataclass(kind):
                    _check_name(prefix + ".".join(parts[:place]), part, at)
            elif kind is not Any:
                kind = None
            if kind is None or not part:
                raise ValueError(no_such_knob(prefix + ".".join(parts), known) + where(at))
        return kind

    def _note(self, name: str, at: Node) -> None:
        self._check_once(name, at)
        self.lines[name] = at.start_mark.line + 1 if at.start_mark else 0

    def _check_once(self, name: str, at: Node) -> None:
        """Neither the knob, nor a part of it, nor what it is a part of, is set elsewhere."""
        for known, line in self.lines.items():
            if f"{known}.".startswith(f"{name}.") or f"{name}.".startswith(f"{known}."):
                raise ValueError(
                    f"{name} is given twice, also in line {line}; remove one, or merge the "
                    f"two{where(at)}"
                )


def _hints(section: Any) -> dict[str, Any]:
    return get_type_hints(section, include_extras=True)


def _names(section: Any) -> Iterator[str]:
    """Dotted names of all sections and knobs of a class."""
    for name, kind in _hints(section).items():
        yield name
        if is_dataclass(kind):
            yield from (f"{name}.{each}" for each in _names(kind))


def _check_name(section: str, name: str, at: Node) -> None:
    if not REWARD_NAME.fullmatch(name):
        raise ValueError(
            f"{shortened(name)!r} in {section} names metrics and files; use 1 to 64 of the "
            f"characters A-Z, a-z, 0-9, _ and -{where(at)}"
        )


def _put_inside(values: dict[str, Any], name: str, keys: list[str], node: Node) -> None:
    """Sets a value in nested dicts, which are made if needed."""
    if len(keys) > MOST_LEVELS:
        raise ValueError(
            f"{shortened(name)} has a key of more than {MOST_LEVELS} levels; a reward needs few"
        )
    for key in keys:
        if not key.isprintable() or len(key) > MOST_KEY:
            raise ValueError(
                f"a key in {name} has more than {MOST_KEY} characters, or one that is not "
                "printable; write a shorter one in plain characters"
            )
    for place, key in enumerate(keys[:-1]):
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ValueError(
                f"{name}.{'.'.join(keys[: place + 1])} is no mapping, so {keys[place + 1]} cannot "
                "be set in it; set the whole of it"
            )
    values[keys[-1]] = free(node, f"{name}.{'.'.join(keys)}")


def _check_not_empty(section: Any, key: str, name: str, value: Any, node: Node) -> None:
    (default,) = (each.default for each in fields(section) if each.name == key)
    if key in _MAY_BE_BLANK:
        return
    if isinstance(value, str) and not value.strip() and default != "":
        raise ValueError(f"{name} is empty; give a value, or leave it out{where(node)}")


def _check_required(config: Any) -> None:
    for each in fields(config):
        is_required = each.default is MISSING and each.default_factory is MISSING
        if is_required and not getattr(config, each.name):
            raise ValueError(f"--{each.name} is missing; --help describes it")
    without = [name for name, reward in getattr(config, "rewards", {}).items() if not reward.kind]
    if without:
        raise ValueError(
            f"a reward has no kind (rewards {', '.join(without)}): if it should be one of the "
            "recipe's, correct its name; if it is new, also set --rewards.NAME.kind"
        )
