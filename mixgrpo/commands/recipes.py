"""Finds and reads recipes."""

from __future__ import annotations

import codecs
import difflib
import os
from pathlib import Path

from yaml.nodes import MappingNode

from mixgrpo.commands.yaml_nodes import compose, kind_of
from mixgrpo.files.home import expand_home
from mixgrpo.files.messages import shortened
from mixgrpo.files.regular import read_regular

MOST_BYTES = 2**18  # of a recipe; those in scripts/recipes have 3 KB


def read_recipe(name: str, folder: Path) -> MappingNode:
    """The sections of a recipe, given its path or its name in ``folder``.

    Raises:
        OSError: it is neither, or cannot be read; the message lists the known names.
        ValueError: the file is not a recipe. The message quotes nothing of its text but keys.
    """
    path = recipe_path(name, folder)
    try:
        content = read_regular(path, MOST_BYTES)
    except ValueError as error:
        raise ValueError(f"{error}; give the name of a recipe or the path of a YAML file") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is not UTF-8 text but UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; a recipe is a YAML file") from None
    try:
        node = compose(text, str(path))
    except ValueError as error:
        raise ValueError(f"{path} is not a valid recipe: {error}") from None
    if node is None:
        raise ValueError(f"{path} is empty; a recipe sets knobs, as those in scripts/recipes do")
    if not isinstance(node, MappingNode):
        raise ValueError(
            f"{path} is not a valid recipe: it is {kind_of(node)}, not a mapping of sections such "
            "as `run: {iterations: 300}`"
        )
    return node


def recipe_path(name: str, folder: Path) -> Path:
    """The file of a recipe, given its path or its name in ``folder``.

    Raises:
        FileNotFoundError: it is neither; the message lists the known names and the closest one.
    """
    if not name:
        raise ValueError("--recipe needs a value, the name of a recipe or the path of a YAML file")
    path = Path(expand_home(name))
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if name in known and not path.is_file():
        return folder / f"{name}.yaml"
    if os.path.exists(path):
        return path
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    raise FileNotFoundError(
        f"there is no recipe {shortened(name)!r}{hint} Known: {', '.join(known)}; or give the path "
        "of a YAML file"
    )
