"""What a result of Python code depends on: the sources of a module and of all that it imports.

Sources are those of the module's own package and of everything else that is not installed, such as
modules in the current folder. Installed packages count by their versions. Imports are read from the
text, also those inside functions; what a module imports under a computed name is not found.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

_INSTALLED = ("site-packages", "dist-packages")


def identify(modules: Iterable[str]) -> dict[str, str]:
    """Names of modules -> digests of their sources; names of installed packages -> versions.

    Modules that cannot be found are left out: importing them will raise the proper error.

    Args:
        modules: full names of modules, with which the search for imports begins.
    """
    waiting = list(modules)
    own = {_top(name) for name in waiting}
    is_source = functools.cache(lambda top: _is_source(top, own))
    found: dict[str, str] = {}
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen or _top(name) in sys.stdlib_module_names:
            continue
        seen.add(name)
        if not is_source(_top(name)):
            found |= _versions(_top(name))
            continue
        path = _file(name)
        if path is None:
            continue
        source = path.read_bytes()
        found[name] = hashlib.sha256(source).hexdigest()
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        waiting += [*_parents(name), *_imported(source, package)]
    return dict(sorted(found.items()))


def _top(name: str) -> str:
    return name.partition(".")[0]


def _parents(name: str) -> Iterator[str]:
    """The packages around a module, whose own code is run when it is imported."""
    while name := name.rpartition(".")[0]:
        yield name


def _is_source(top: str, own: set[str]) -> bool:
    if top in own:
        return True
    places = [root.resolve().parts for root in _roots(top)]
    return bool(places) and not any(part in _INSTALLED for parts in places for part in parts)


def _roots(top: str) -> list[Path]:
    """The file of a top-level module, or the folders of a package; nothing is imported."""
    try:
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return []
    if found is None:
        return []
    if found.submodule_search_locations is not None:
        return [Path(place) for place in found.submodule_search_locations]
    return [Path(found.origin)] if found.origin else []


def _file(name: str) -> Path | None:
    top, *inside = name.split(".")
    for root in _roots(top):
        if root.is_file():
            return root if not inside else None
        place = root.joinpath(*inside)
        for path in (place / "__init__.py", place.with_suffix(".py") if inside else place):
            if path.is_file():
                return path
    return None


@functools.lru_cache(maxsize=1024)
def _imported(source: bytes, package: str) -> tuple[str, ...]:
    """Full names of what a source imports; a name imported from a package may be a module of it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ()
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
            start = ".".join(part for part in (base if node.level else "", node.module) if part)
            names += [start, *(f"{start}.{alias.name}" for alias in node.names)]
    return tuple(dict.fromkeys(name for name in names if name))


@functools.lru_cache(maxsize=1024)  # each is read from a file of its own
def _versions(top: str) -> dict[str, str]:
    """Names of the distributions that hold a package -> versions."""
    return {name: importlib.metadata.version(name) for name in _distributions().get(top, ())}


@functools.lru_cache(maxsize=1)
def _distributions() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())
