"""Which module may import which, where heavy libraries are imported, and that knobs are read."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from mixgrpo import config
from mixgrpo.config import Config, RewardConfig, WindowConfig
from mixgrpo.maths.window import WindowSchedule

PACKAGE = Path(config.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# The rooms and the modules at the package's door, from the ground up. Each may import those of the
# levels below it, never a neighbour on its own level; a new one must be given a place here.
LEVELS = (
    ("types", "config", "noise", "devices", "files"),
    ("checks", "maths", "rewards", "engines", "hosts", "downloads"),
    ("shapes", "checkpoint", "rollout", "methods"),
    ("models", "words"),
    ("text",),
    ("run",),
    ("assembly",),
    ("evaluation", "planning"),
    ("report", "inference", "doctor"),
    ("trainer",),
    ("commands",),
    ("__main__",),
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
AT_THE_DOOR = 10  # files at most: what one reads first

# Module or package -> what of ours it may import beside itself, where that is less than the levels
# below it. The first match counts.
MAY_IMPORT = {
    "mixgrpo.types": (),
    "mixgrpo.config": (),
    "mixgrpo.noise": (),
    "mixgrpo.devices": (),
    "mixgrpo.files": (),
    "mixgrpo.checks": ("mixgrpo.config",),
    "mixgrpo.maths": ("mixgrpo.types",),
    "mixgrpo.rewards": ("mixgrpo.types", "mixgrpo.devices", "mixgrpo.files"),
    "mixgrpo.engines.rendezvous": (),
    "mixgrpo.engines.distributed": ("mixgrpo.engines.rendezvous",),
    "mixgrpo.engines.ema": (),
    "mixgrpo.engines.adamw": ("mixgrpo.noise",),
    "mixgrpo.engines": ("mixgrpo.types", "mixgrpo.config"),
    "mixgrpo.hosts": ("mixgrpo.files",),
    "mixgrpo.downloads": (),
    "mixgrpo.shapes": ("mixgrpo.maths", "mixgrpo.rewards", "mixgrpo.types"),
    "mixgrpo.words": ("mixgrpo.shapes", "mixgrpo.maths", "mixgrpo.rewards"),
    "mixgrpo.checkpoint": ("mixgrpo.files", "mixgrpo.engines.distributed"),
    "mixgrpo.rollout": ("mixgrpo.maths", "mixgrpo.noise", "mixgrpo.types"),
    "mixgrpo.methods.emphasis": (
        *("mixgrpo.config", "mixgrpo.maths", "mixgrpo.noise", "mixgrpo.types"),
    ),
    "mixgrpo.methods": (*("mixgrpo.config", "mixgrpo.engines", "mixgrpo.maths", "mixgrpo.types"),),
    "mixgrpo.models.export": ("mixgrpo.models", "mixgrpo.config", "mixgrpo.checkpoint"),
    "mixgrpo.models": ("mixgrpo.maths", "mixgrpo.types", "mixgrpo.config", "mixgrpo.files"),
    "mixgrpo.text.other_formats": (),
    "mixgrpo.text.prompt_files": ("mixgrpo.text.other_formats", "mixgrpo.types"),
    "mixgrpo.text.prompts": (
        *("mixgrpo.noise", "mixgrpo.files", "mixgrpo.text.prompt_files", "mixgrpo.types"),
    ),
    "mixgrpo.text.embeddings": ("mixgrpo.files", "mixgrpo.types"),
    "mixgrpo.text.stored": ("mixgrpo.config", "mixgrpo.text.embeddings", "mixgrpo.types"),
    "mixgrpo.run.pictures": ("mixgrpo.files",),
    "mixgrpo.run.metrics": (),
    "mixgrpo.run.hacking": (),
    "mixgrpo.run.guard": ("mixgrpo.hosts.job",),
    "mixgrpo.run.stopping": ("mixgrpo.run.guard",),
    "mixgrpo.run.watchdog": (
        *("mixgrpo.engines.distributed", "mixgrpo.engines.rendezvous", "mixgrpo.run.guard"),
    ),
    "mixgrpo.run.tracking": (*("mixgrpo.config", "mixgrpo.devices", "mixgrpo.files"),),
    "mixgrpo.evaluation.manifests": ("mixgrpo.files", "mixgrpo.types"),
    "mixgrpo.evaluation.pictures": ("mixgrpo.files",),
    "mixgrpo.evaluation.comparison": (),
    "mixgrpo.evaluation.gallery_page": (),
    "mixgrpo.evaluation.score_store": ("mixgrpo.config", "mixgrpo.rewards", "mixgrpo.files"),
    "mixgrpo.planning.coverage": ("mixgrpo.maths", "mixgrpo.types"),
    "mixgrpo.planning.coverage_report": (
        *("mixgrpo.assembly", "mixgrpo.config", "mixgrpo.maths", "mixgrpo.planning.coverage"),
        *("mixgrpo.files", "mixgrpo.types"),
    ),
    "mixgrpo.planning.memory": (
        "mixgrpo.planning",
        "mixgrpo.config",
        "mixgrpo.models",
        "mixgrpo.files",
    ),
    "mixgrpo.planning": (*("mixgrpo.config", "mixgrpo.files", "mixgrpo.models", "mixgrpo.types"),),
    "mixgrpo.report.runs": ("mixgrpo.config", "mixgrpo.files", "mixgrpo.text.prompts"),
    "mixgrpo.report.charts": ("mixgrpo.run.metrics", "mixgrpo.report.runs"),
    "mixgrpo.report.pictures": ("mixgrpo.evaluation", "mixgrpo.report.runs"),
    "mixgrpo.inference.config": ("mixgrpo.checks", "mixgrpo.config", "mixgrpo.files"),
    "mixgrpo.doctor.lines": ("mixgrpo.downloads",),
    "mixgrpo.doctor.environment": ("mixgrpo.config", "mixgrpo.doctor.lines"),
    "mixgrpo.__main__": ("mixgrpo.commands", "mixgrpo.engines.distributed"),
}
BUILT_ON_NOTHING_ELSE = {
    "mixgrpo.types": {"torch"},
    "mixgrpo.maths": {"torch"},
    "mixgrpo.config": set(),
    "mixgrpo.doctor.environment": set(),
    "mixgrpo.inference.config": set(),
}
HEAVY = {"deepspeed", "wandb", "open_clip", "matplotlib"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """Full names of the modules that a file imports; ``from package import module`` resolved."""
    nodes = _top_level(ast.parse(path.read_text())) if top_level_only else _all(path)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.update(_resolved(str(node.module), alias.name) for alias in node.names)
    return names


def _resolved(module: str, name: str) -> str:
    inside = PACKAGE.parent / Path(*module.split(".")) / name
    return f"{module}.{name}" if inside.with_suffix(".py").exists() or inside.is_dir() else module


def _all(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


def _top_level(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that runs when the module is imported: all but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _top_level(child)


# --- directions -----------------------------------------------------------------------------------


def room_of(module: str) -> str:
    """The room, or the module at the door, that a module is in; "mixgrpo" for the package's own."""
    return module.removeprefix("mixgrpo").lstrip(".").partition(".")[0] or "mixgrpo"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    module = module_name(path)
    room = room_of(module)
    ours = {name for name in imported(path) if is_in(name, "mixgrpo")}
    if room == "mixgrpo":
        assert not ours
        return
    assert room in LEVEL_OF, f"{room} has no place in LEVELS"
    above = {
        name for name in ours if room_of(name) != room and LEVEL_OF[room_of(name)] >= LEVEL_OF[room]
    }
    package = next((p for p in MAY_IMPORT if is_in(module, p)), None)
    if package is not None:
        allowed = (package, *MAY_IMPORT[package])
        above |= {name for name in ours if not any(is_in(name, each) for each in allowed)}
    assert not above, f"{module} must not import {', '.join(sorted(above))}"


def test_what_loads_no_model_does_not_wait_for_diffusers() -> None:
    look = (
        "import mixgrpo.planning.coverage_report, mixgrpo.commands.plan, mixgrpo.planning.memory, "
        "sys; print('diffusers' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", look], cwd=PACKAGE.parent, check=True, capture_output=True, text=True
    )
    assert found.stdout == "False\n"


def test_the_rules_name_what_is_there() -> None:
    modules = {module_name(path) for path in FILES}
    assert {f"mixgrpo.{room}" for room in LEVEL_OF} <= modules
    assert set(MAY_IMPORT) <= modules
    assert len(list(PACKAGE.glob("*.py"))) <= AT_THE_DOOR


def _is_shapes(module: str) -> bool:
    return is_in(module, "mixgrpo.shapes")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_the_foundations_need_torch_alone(path: Path) -> None:
    module = module_name(path)
    for package, allowed in BUILT_ON_NOTHING_ELSE.items():
        if is_in(module, package):
            theirs = {name.split(".")[0] for name in imported(path)} - sys.stdlib_module_names
            assert theirs <= allowed | {"mixgrpo"}


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {
        module_name(path): {
            name
            for name in imported(path, top_level_only=True)
            if is_in(name, "mixgrpo") and name != module_name(path)
        }
        for path in FILES
    }
    assert sum(map(len, graph.values())) > 20
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    if not _is_shapes(module_name(path)):
        loaded = {name.split(".")[0] for name in imported(path, top_level_only=True)}
        assert not loaded & HEAVY


def test_the_rules_see_what_they_forbid(tmp_path: Path) -> None:
    """Also in a class, under a condition, or as `from package import module`."""
    path = tmp_path / "module.py"
    path.write_text(
        "from mixgrpo import rollout\n"
        "try:\n    import wandb.sdk\nexcept ImportError:\n    pass\n"
        "class A:\n    import matplotlib\n"
        "def f():\n    import deepspeed\n"
    )
    assert imported(path, top_level_only=True) == {"mixgrpo.rollout", "wandb.sdk", "matplotlib"}
    assert "deepspeed" in imported(path)


# --- knobs ----------------------------------------------------------------------------------------

SECTIONS = {name: kind for name, kind in get_type_hints(Config).items() if is_dataclass(kind)}
CLASSES = {kind.__name__: section for section, kind in SECTIONS.items()}


def knobs_read(path: Path) -> set[tuple[str, str]]:
    """(section, field) of every ``....section.field`` in a file, also through a name for a section.

    Such a name is a parameter annotated with the section's class, or was assigned a section, in
    the same function; an attribute of self in any function.
    """
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    scopes = [(function, _names_of_sections(function)) for function in functions]
    of_self = {k: v for _, names in scopes for k, v in names.items() if k.startswith("self.")}
    return {knob for function, names in scopes for knob in _read_in(function, {**of_self, **names})}


def _read_in(function: ast.FunctionDef, names: dict[str, str]) -> Iterator[tuple[str, str]]:
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield _section(node.value, names), node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "asdict":
            section = _section(node.args[0], names)
            yield from ((section, field.name) for field in _fields_of(section))


def _fields_of(section: str) -> tuple[Field[Any], ...]:
    return fields(SECTIONS[section]) if section in SECTIONS else ()


def _names_of_sections(function: ast.FunctionDef) -> dict[str, str]:
    names: dict[str, str] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.arg) and node.annotation is not None:
            section = CLASSES.get(ast.unparse(node.annotation))
            if section:
                names[node.arg] = section
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            names.update(_assigned(node, names))
    return names


def _assigned(node: ast.Assign, names: dict[str, str]) -> Iterator[tuple[str, str]]:
    target, value = node.targets[0], node.value
    pairs = (
        zip(target.elts, value.elts, strict=True)
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        else [(target, value)]
    )
    for left, right in pairs:
        section = _section(right, names)
        if section in SECTIONS:
            yield ast.unparse(left), section


def _section(node: ast.AST, names: dict[str, str]) -> str:
    text = ast.unparse(node)
    is_attribute = isinstance(node, ast.Attribute) and node.attr in SECTIONS
    return names.get(text, text.rpartition(".")[2] if is_attribute else "")


KNOBS = [
    (section, field.name)
    for section, kind in SECTIONS.items()
    if kind is not WindowConfig
    for field in fields(kind)
]


@pytest.fixture(scope="module")
def read() -> set[tuple[str, str]]:
    files = [path for path in FILES if path.name not in ("config.py", "checks.py")]
    return {knob for path in files for knob in knobs_read(path)}


@pytest.mark.parametrize(("section", "knob"), KNOBS, ids=map(".".join, KNOBS))
def test_every_knob_is_read(section: str, knob: str, read: set[tuple[str, str]]) -> None:
    assert (section, knob) in read, f"nothing reads {section}.{knob}"


def test_window_knobs_are_the_schedules_fields(read: set[tuple[str, str]]) -> None:
    """They are handed over all together."""
    assert ("window", "size") in read
    of_schedule = {field.name for field in fields(WindowSchedule)}
    assert {field.name for field in fields(WindowConfig)} == of_schedule - {"steps"}


@pytest.mark.parametrize("knob", [field.name for field in fields(RewardConfig)])
def test_every_knob_of_a_reward_is_read(knob: str) -> None:
    """Also by its name as a string, for getattr."""
    readers = ("assembly.py", "trainer.py", "run/scorable.py")
    trees = [ast.parse((PACKAGE / reader).read_text()) for reader in readers]
    tree = ast.Module([node for each in trees for node in each.body], type_ignores=[])
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert knob in attributes | strings


def test_a_knob_that_nothing_reads_is_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "def f(config, knobs: UpdateConfig):\n"
        "    sampling, tail = config.sampling, config.tail\n"
        "    config.log.wandb = 1\n"
        "    return sampling.eta + tail.order + knobs.clip + config.run.seed + other.kl\n"
        "def g(config):\n    knobs = config.advantage\n    return knobs.kind\n"
    )
    found = knobs_read(path)
    expected = {("sampling", "eta"), ("tail", "order"), ("update", "clip"), ("run", "seed")}
    assert expected | {("advantage", "kind")} <= found
    assert not {("log", "wandb"), ("update", "kl"), ("update", "kind")} & found
