"""Every README: its links, headings and paths lead somewhere, and the trees name what is there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mixgrpo"
ELSEWHERE = ("runs", "wandb", "data/models")  # what runs and downloads leave, ignored by git

FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")
PATH = re.compile(r"(?<![\w/.-])((?:[\w.-]+/)*[\w.-]+\.(?:py|sh|slurm|yaml))(?![\w/-])")


def repository_files(folder: Path = ROOT) -> Iterator[Path]:
    """Files of the repository, without hidden folders and those that are ignored."""
    for path in folder.iterdir():
        place = path.relative_to(ROOT).as_posix()
        if path.name.startswith(".") or place.startswith(ELSEWHERE):
            continue
        if path.is_dir():
            yield from repository_files(path)
        else:
            yield path


FILES = sorted(repository_files())
READMES = [path for path in FILES if path.name == "README.md"]
every_readme = pytest.mark.parametrize(
    "readme", READMES, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def prose(text: str) -> str:
    """The text without what is fenced."""
    return FENCE.sub("", text)


@cache
def anchors(path: Path) -> set[str]:
    """What a link into the file may name, as GitHub makes it of the headings."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(path.read_text()), re.MULTILINE):
        shown = LINK.sub(lambda match: match[0][1 : match[0].index("]")], heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken_links(readme: Path) -> list[str]:
    """Relative links to files that are missing, or to headings that their file lacks."""
    broken = []
    for link in LINK.findall(prose(readme.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (readme.parent / name).resolve() if name else readme
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def missing_paths(readme: Path) -> list[str]:
    """Paths in backticks or fences that no file of the repository has.

    One with a folder counts from the root, from beside the README or from the package; a bare name
    may be any file's.
    """
    text = readme.read_text()
    quoted = [*FENCE.findall(text), *re.findall(r"`([^`\n]+)`", prose(text))]
    names = {path.name for path in FILES}
    bases = (ROOT, readme.parent, PACKAGE)
    return [
        path
        for path in PATH.findall("\n".join(quoted))
        if not ("NAME" in path or any((base / path).is_file() for base in bases))
        and not ("/" not in path and path in names)
    ]


def tree(readme: Path) -> set[str]:
    """The paths of the README's trees: lines of a fence that begin with one, and its text."""
    lines = "\n".join(FENCE.findall(readme.read_text()))
    return set(re.findall(r"^((?:[\w.-]+/)+[\w.-]*|[\w.-]+\.\w+) +\S", lines, re.MULTILINE))


@every_readme
def test_links_lead_somewhere(readme: Path) -> None:
    assert broken_links(readme) == []


@every_readme
def test_paths_are_there(readme: Path) -> None:
    assert missing_paths(readme) == []


@every_readme
def test_trees_name_what_is_there(readme: Path) -> None:
    assert [path for path in tree(readme) if not (ROOT / path).exists()] == []


def test_the_first_readme_is_short() -> None:
    content = (ROOT / "README.md").read_bytes()
    assert content.count(b"\n") <= 250
    assert len(content) <= 18_000


def test_every_room_is_in_the_first_readme() -> None:
    rooms = {path.parent.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert {f"{room}/" for room in rooms} <= tree(ROOT / "README.md")


def test_every_module_is_in_the_packages_readme() -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    wanted = {path for path in modules if not path.endswith("/__init__.py")}
    assert len(wanted) > 100
    assert wanted <= tree(PACKAGE / "README.md")


def test_every_readme_is_linked() -> None:
    """From the first one, directly or through others."""
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        readme = waiting.pop()
        if readme in reached:
            continue
        reached.add(readme)
        links = (link.partition("#")[0] for link in LINK.findall(prose(readme.read_text())))
        targets = ((readme.parent / link).resolve() for link in links if link)
        waiting += [target for target in targets if target in READMES]
    assert reached == set(READMES)


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(
        "# A [title](b.md), with `code`!\n\n# Twice\n\n# Twice\n\n"
        "[here](#a-title-with-code) [again](#twice-1) [no](#twice-2) [gone](gone.md#a) "
        "[the web](https://example.org/gone.md) `trainer.py` `maths/window.py` `gone/window.py` "
        "`scripts/gone.sh --flag` `gone.yaml` `flux_NAME.yaml`\n\n"
        "```\n[code](code.md)\npython gone.py\nmixgrpo/gone/    a folder\n```\n"
    )
    assert broken_links(readme) == ["b.md", "#twice-2", "gone.md#a"]
    assert missing_paths(readme) == ["gone.py", "gone/window.py", "scripts/gone.sh", "gone.yaml"]
    assert tree(readme) == {"mixgrpo/gone/"}
