"""env_setup.sh against a Python that only pretends to install, requirements.txt, and the scripts.

No network, nothing installed: a fake interpreter on a PATH of its own writes down what it is asked,
and so does the fake uv that it "installs".
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHELL_SCRIPTS = sorted(
    [ROOT / "env_setup.sh", ROOT / ".ci" / "run", *(ROOT / "scripts").rglob("*.sh")]
)
PINNED = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(\[[a-z,]+\])?==(?P<version>[0-9][^\s;*]*)")
TOOLS = (
    *("awk", "bash", "cat", "chmod", "cksum", "cp", "cut", "df", "dirname", "env", "find", "flock"),
    *("grep", "ln", "mkdir", "mv", "nproc", "readlink", "rm", "sed", "sleep", "sort", "tail", "wc"),
)

# What pip and uv do when asked to install. FAKE_BROKEN names a package that does not install,
# FAKE_KILLED one during which the whole install is killed.
FAKE_INSTALL = """#!/usr/bin/env bash
case "$*" in
    *"${FAKE_BROKEN:-nothing}"*)
        echo "ERROR: No matching distribution found for $FAKE_BROKEN" >&2
        exit 1
        ;;
    *"${FAKE_KILLED:-nothing}"*) kill -TERM $PPID ;;
esac
"""

# What env_setup.sh asks of uv.
FAKE_UV = """#!/usr/bin/env bash
case "$*" in
    --version) [ "$FAKE_UV" != does_not_run ] || exit 126 ;;
    "cache dir") echo "$FAKE_CACHE" ;;
    "pip install "*)
        echo "uv $*" >>"$FAKE_CALLS"
        env >"$FAKE_CALLS.uv"
        if [ "$FAKE_UV" = fails ]; then
            echo "error: uv's own" >&2
            exit 2
        fi
        exec fake_install "$@"
        ;;
esac
"""

# What env_setup.sh asks of a Python.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    *version_info*) echo {version} ;;
    *"import venv"*) exit {no_venv} ;;
    *_base_executable*) echo {path} ;;
    "-m venv "*) mkdir -p "$3/bin" && cp {path} "$3/bin/python" ;;
    "-m pip config list") echo "$FAKE_PIP_SETTINGS" ;;
    "-m pip install "*" uv=="*)
        echo "$*" >>"$FAKE_CALLS"
        if [ "$FAKE_UV" = missing ]; then
            echo "ERROR: No matching distribution found for uv" >&2
            exit 1
        fi
        cp "{programs}/fake_uv" "${{0%/*}}/uv"
        ;;
    "-m pip install "*)
        echo "$*" >>"$FAKE_CALLS"
        echo "WARNING: Location 'nowhere' is ignored"
        exec fake_install "$@"
        ;;
esac
"""

BASH_NOISE = "wait_for: No record of process"


@dataclass
class Checkout:
    """A copy of the files env_setup.sh reads, and the only programs it can find."""

    root: Path
    programs: Path

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    def program(self, name: str, text: str) -> Path:
        path = self.programs / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def python(self, name: str, version: str, has_venv: bool = True) -> Path:
        path = self.programs / name
        fake = FAKE_PYTHON.format(
            version=version, path=path, no_venv=int(not has_venv), programs=self.programs
        )
        return self.program(name, fake)

    def setup(self, **environment: str) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            ["bash", str(self.root / "env_setup.sh")],
            cwd="/",
            env={
                "PATH": str(self.programs),
                "FAKE_CALLS": str(self.calls_file),
                "FAKE_CACHE": str(self.cache),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        # bash 5.2 itself says so, where process numbers come round again quickly; nothing is amiss.
        said = [line for line in result.stderr.splitlines(True) if BASH_NOISE not in line]
        result.stderr = "".join(said)
        return result

    @property
    def cache(self) -> Path:
        """uv's own cache."""
        return self.root.parent / "cache"

    @property
    def calls_file(self) -> Path:
        return self.root / "calls"

    def uv_environment(self) -> dict[str, str]:
        """The variables that uv had in its last call."""
        lines = self.calls_file.with_name("calls.uv").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def take_calls(self) -> list[str]:
        """pip's and uv's calls since the last time this was asked."""
        calls = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return calls


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root, programs = tmp_path / "the repository", tmp_path / "programs"
    root.mkdir()
    programs.mkdir()
    for name in ("env_setup.sh", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    for tool in TOOLS:
        found = shutil.which(tool)
        if found:
            (programs / tool).symlink_to(found)
    checkout = Checkout(root, programs)
    checkout.program("fake_install", FAKE_INSTALL)
    checkout.program("fake_uv", FAKE_UV)
    checkout.program("df", "#!/usr/bin/env bash\nprintf 'head\\ndisk 9 9 99000000 1%% /\\n'\n")
    return checkout


def fails(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 1, result.stdout + result.stderr
    for part in parts:
        assert part in result.stderr


def succeeds(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    for part in parts or ["ready"]:
        assert part in result.stdout
    assert result.stderr == ""


# --- which Python ---------------------------------------------------------------------------------


def test_no_python_at_all(checkout: Checkout) -> None:
    fails(checkout.setup(), "found no Python at all", "apt install python3.11", "set PYTHON")
    assert not checkout.venv.exists()


def test_names_the_pythons_that_do_not_do(checkout: Checkout) -> None:
    checkout.program("python3.12", "#!/usr/bin/env bash\nexit 127\n")
    checkout.python("python3", "3.10.4")
    result = checkout.setup()
    fails(
        result,
        "needs Python 3.11, 3.12 or 3.13, and",
        "python3.12 (does not run)",
        "python3 (3.10.4)",
    )


@pytest.mark.parametrize("version", ["3.11.7", "3.12.1", "3.13.0"])
def test_every_supported_python(checkout: Checkout, version: str) -> None:
    checkout.python(f"python{version.rpartition('.')[0]}", version)
    succeeds(checkout.setup(), f"making .venv with Python {version} (", "ready")
    succeeds(checkout.setup(), f"up to date (Python {version})")
    requires = re.search('requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text())
    assert requires and requires[1] == ">=3.11,<3.14"


def test_skips_a_shim_that_does_not_run(checkout: Checkout) -> None:
    checkout.program("python3.11", "#!/usr/bin/env bash\nexit 127\n")
    checkout.python("python3", "3.12.1")
    succeeds(checkout.setup())


@pytest.mark.parametrize("version", ["2.7.18", "3.10.4", "3.14.0", "3.110.0"])
def test_a_chosen_python_of_another_version(checkout: Checkout, version: str) -> None:
    checkout.python("python3.11", "3.11.7")
    chosen = checkout.python("chosen", version)
    fails(checkout.setup(PYTHON=str(chosen)), f"chosen ({version})", "set PYTHON")


def test_no_venv_module(checkout: Checkout) -> None:
    checkout.python("python3.12", "3.12.1", has_venv=False)
    fails(checkout.setup(), "no venv module", "apt install python3.12-venv", "set PYTHON")


def test_another_python_that_has_the_venv_module(checkout: Checkout) -> None:
    checkout.python("python3.11", "3.11.7", has_venv=False)
    checkout.python("python3.12", "3.12.1")
    succeeds(checkout.setup())


# --- what can go wrong while installing -----------------------------------------------------------


def test_too_little_disk(checkout: Checkout) -> None:
    checkout.python("python3.11", "3.11.7")
    checkout.program("df", "#!/usr/bin/env bash\nprintf 'head\\ndisk 9 9 3500000 9%% /\\n'\n")
    fails(checkout.setup(), "3 GB", "needs 10 GB", "free some space")
    assert checkout.take_calls() == []


def test_a_package_that_cannot_be_installed(checkout: Checkout) -> None:
    checkout.python("python3.11", "3.11.7")
    result = checkout.setup(FAKE_BROKEN="requirements.txt")
    log = checkout.venv / "install.log"
    fails(
        result,
        "ERROR: No matching distribution found for requirements.txt",
        "`pip install --no-build-isolation -r requirements.txt`",
        str(log),
        "run env_setup.sh again",
    )
    assert "WARNING" not in result.stdout + result.stderr
    assert "WARNING" in log.read_text()


@pytest.mark.parametrize("uv", ["", "missing"])
def test_a_broken_package_gives_one_error(checkout: Checkout, uv: str) -> None:
    checkout.python("python3.11", "3.11.7")
    result = checkout.setup(FAKE_BROKEN="torch==", FAKE_UV=uv)
    fails(result, "ERROR: No matching distribution found for torch==", "`pip install torch==")
    assert result.stderr.count("ERROR") == 1
    assert len(result.stderr.splitlines()) == 2


def test_a_broken_index_is_found_by_pip_before_uv(checkout: Checkout) -> None:
    checkout.python("python3.11", "3.11.7")
    result = checkout.setup(FAKE_BROKEN="setuptools")
    fails(result, "ERROR: No matching distribution found for setuptools", "`pip install setuptools")
    assert len(checkout.take_calls()) == 1
    assert "uv" not in result.stdout + result.stderr


def test_goes_on_where_pip_failed(checkout: Checkout) -> None:
    checkout.python("python3.11", "3.11.7")
    checkout.setup(FAKE_BROKEN="requirements.txt")
    kept = checkout.venv / "torch, already there"
    kept.touch()
    succeeds(checkout.setup())
    assert kept.exists()
    succeeds(checkout.setup(), "up to date")


def test_an_interrupted_install_is_made_again(checkout: Checkout) -> None:
    checkout.python("python3.11", "3.11.7")
    assert checkout.setup(FAKE_KILLED="torch==").returncode == 130
    half_written = checkout.venv / "half a package"
    half_written.touch()
    result = checkout.setup()
    succeeds(result)
    assert "incomplete" in result.stdout
    assert not half_written.exists()


@pytest.mark.parametrize("leftover", ["install.log", "lib"])
def test_a_venv_without_python_is_made_again(checkout: Checkout, leftover: str) -> None:
    checkout.python("python3.11", "3.11.7")
    checkout.venv.mkdir()
    (checkout.venv / leftover).touch()
    succeeds(checkout.setup())


def test_a_venv_of_somebody_else_is_left_alone(checkout: Checkout) -> None:
    python = checkout.python("python3.11", "3.11.7")
    theirs = checkout.venv / "bin" / "python"
    theirs.parent.mkdir(parents=True)
    shutil.copy(python, theirs)
    fails(checkout.setup(), "was not made by this script", "move it away or delete it")
    assert theirs.exists()


# --- what a run does, and a second one ------------------------------------------------------------


def test_order_and_sources(checkout: Checkout) -> None:
    checkout.python("python3.11", "3.11.7")
    succeeds(checkout.setup(TORCH_INDEX_URL="file:///cu126"))
    tools, uv, torch, others, package = checkout.take_calls()
    assert re.fullmatch(r"-m pip install .* setuptools==[0-9.]+", tools)
    assert re.fullmatch(r"-m pip install .* --only-binary :all: uv==[0-9.]+", uv)
    install = f"uv pip install --python {checkout.venv}/bin/python --color never"
    torches = r"--index-url file:///cu126 torch==[0-9.]+ torchvision==[0-9.]+"
    assert re.fullmatch(f"{re.escape(install)} {torches}", torch)
    assert others == f"{install} --no-build-isolation -r requirements.txt"
    assert package == f"{install} --no-deps --no-build-isolation -e ."
    assert not (checkout.venv / "tmp").exists()


# How often uv is asked to install, and the line that says why pip does it.
@pytest.mark.parametrize(
    ("environment", "asked_uv", "line"),
    [
        ({"FAKE_UV": "missing"}, 0, "uv cannot be installed ({log} says why): using pip instead"),
        ({"FAKE_UV": "does_not_run"}, 0, "uv cannot be installed ({log} says why)"),
        ({"FAKE_UV": "fails"}, 1, "uv failed ({log} says why): using pip instead"),
        (
            {"FAKE_PIP_SETTINGS": "global.no-index='1'"},
            0,
            "uv cannot follow pip's setting no-index",
        ),
    ],
)
def test_without_uv_pip_does_it(
    checkout: Checkout, environment: dict[str, str], asked_uv: int, line: str
) -> None:
    checkout.python("python3.11", "3.11.7")
    result = checkout.setup(TORCH_INDEX_URL="file:///cu126", **environment)
    log = checkout.venv / "install.log"
    succeeds(result, line.format(log=log), "ready")
    assert result.stdout.count("using pip instead") == 1
    calls = checkout.take_calls()
    assert sum(call.startswith("uv") for call in calls) == asked_uv
    torch, others, package = (call for call in calls[-3:])
    assert re.search(r"^-m pip .* --index-url file:///cu126 torch==\S+ torchvision==\S+$", torch)
    assert re.search(r"^-m pip .* --no-build-isolation -r requirements.txt$", others)
    assert re.search(r"^-m pip .* --no-deps --no-build-isolation -e \.$", package)
    assert "--index-url" not in others + package
    if asked_uv:
        assert "error: uv's own" in log.read_text()
    succeeds(checkout.setup(), "up to date")


def test_uv_follows_pips_settings_and_no_others(checkout: Checkout) -> None:
    checkout.python("python3.11", "3.11.7")
    settings = [
        ":env:.default-timeout='180'",
        ":env:.extra-index-url='https://a/simple?x='",
        ":env:.user='0'",
        "freeze.all='1'",
        "global.cert='/the certificates.pem'",
        "global.constraint='/constraints.txt'",
        "global.extra-index-url='https://b/simple'",
        "global.find-links='\\n/wheels\\nhttps://c'",
        "global.index-url='https://d/simple'",
        "global.proxy='http://e:8080'",
        "global.trusted-host='d c'",
        "install.index-url='https://me:secret@f/simple'",
    ]
    result = checkout.setup(
        FAKE_PIP_SETTINGS="\n".join(settings),
        UV_INDEX="https://g",
        UV_OVERRIDE="of another project",
    )
    succeeds(result)
    assert "secret" not in result.stdout + (checkout.venv / "install.log").read_text()
    given = checkout.uv_environment()
    assert {name: given[name] for name in given if name.startswith("UV_")} == {
        "UV_INDEX_URL": "https://me:secret@f/simple",
        "UV_EXTRA_INDEX_URL": "https://a/simple?x=",
        "UV_FIND_LINKS": ",/wheels,https://c",
        "UV_CONSTRAINT": "/constraints.txt",
        "UV_INSECURE_HOST": "d c",
        "UV_HTTP_TIMEOUT": "180",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_NO_CONFIG": "1",
        "UV_CACHE_DIR": str(checkout.cache),
    }
    assert given["SSL_CERT_FILE"] == "/the certificates.pem"
    assert given["HTTPS_PROXY"] == given["HTTP_PROXY"] == "http://e:8080"
    assert given["TMPDIR"] == str(checkout.venv / "tmp")
    assert (given["DS_BUILD_OPS"], given["DS_ACCELERATOR"]) == ("0", "cpu")


@pytest.mark.parametrize(
    ("environment", "cache"),
    [
        ({}, "{root.parent}/cache"),
        ({"UV_CACHE_DIR": "/elsewhere"}, "/elsewhere"),
        ({"FAKE_CACHE": "/proc/no links from here"}, "{venv}/tmp/uv"),
        ({"FAKE_PIP_SETTINGS": ":env:.no-cache-dir='off'"}, "{venv}/tmp/uv"),
    ],
)
def test_cache_of_uv(checkout: Checkout, environment: dict[str, str], cache: str) -> None:
    checkout.python("python3.11", "3.11.7")
    succeeds(checkout.setup(**environment))
    expected = cache.format(root=checkout.root, venv=checkout.venv)
    assert checkout.uv_environment()["UV_CACHE_DIR"] == expected
    assert not checkout.cache.exists() or not list(checkout.cache.iterdir())


@pytest.mark.parametrize("value", ["", "1"])
def test_uv_compiles_where_python_does_not(checkout: Checkout, value: str) -> None:
    checkout.python("python3.11", "3.11.7")
    succeeds(checkout.setup(PYTHONDONTWRITEBYTECODE=value))
    assert checkout.uv_environment().get("UV_COMPILE_BYTECODE", "") == value


def test_nothing_to_do(checkout: Checkout) -> None:
    checkout.python("python3.11", "3.11.7")
    succeeds(checkout.setup())
    checkout.take_calls()
    succeeds(checkout.setup(), "up to date")
    assert checkout.take_calls() == []


@pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml"])
def test_changed_requirements_are_installed_in_place(checkout: Checkout, name: str) -> None:
    checkout.python("python3.11", "3.11.7")
    succeeds(checkout.setup())
    kept = checkout.venv / "kept"
    kept.touch()
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    succeeds(checkout.setup())
    assert kept.exists()


def test_remembers_python_and_index(checkout: Checkout) -> None:
    checkout.python("python3.11", "3.11.7")
    other = checkout.python("python3.12", "3.12.1")
    chosen = {"PYTHON": str(other), "TORCH_INDEX_URL": "file:///cu126"}
    succeeds(checkout.setup(**chosen))
    succeeds(checkout.setup(), "up to date (Python 3.12.1)")
    succeeds(checkout.setup(**chosen), "up to date")
    succeeds(checkout.setup(PYTHON="python3.11"))
    succeeds(checkout.setup(), "up to date (Python 3.11.7)")


@pytest.mark.parametrize("index", ["file:///cu128", ""])
def test_another_torch_index_makes_the_venv_again(checkout: Checkout, index: str) -> None:
    checkout.python("python3.11", "3.11.7")
    succeeds(checkout.setup(TORCH_INDEX_URL="file:///cu126"))
    old = checkout.venv / "old"
    old.touch()
    succeeds(checkout.setup(TORCH_INDEX_URL=index))
    assert not old.exists()


def test_a_moved_repository_makes_the_venv_again(checkout: Checkout) -> None:
    checkout.python("python3.11", "3.11.7")
    succeeds(checkout.setup())
    checkout.root = checkout.root.rename(checkout.root.parent / "moved")
    succeeds(checkout.setup())
    assert "-e ." in checkout.take_calls()[-1]


# --- requirements.txt -----------------------------------------------------------------------------


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported_modules(path: Path) -> set[str]:
    """The top-level names of every absolute import in a file, wherever it stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("line", requirements())
def test_every_requirement_is_pinned(line: str) -> None:
    assert PINNED.fullmatch(line), "pin it with == and one exact version"


def test_everything_imported_is_required() -> None:
    required = {normalised(match["name"]) for match in map(PINNED.match, requirements()) if match}
    distributions = packages_distributions()
    missing = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in sorted((ROOT / "mixgrpo").rglob("*.py"))
        for module in imported_modules(path) - sys.stdlib_module_names - {"mixgrpo"}
        if not {normalised(name) for name in distributions.get(module, [module])} & required
    }
    assert not missing, "imported, and not in requirements.txt"


# --- the scripts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_scripts(script: Path) -> None:
    assert re.search(r"^set -euo pipefail$", script.read_text(), re.MULTILINE)
    subprocess.run(["bash", "-n", str(script)], check=True)
    if (ROOT / "scripts") in script.parents:
        last = script.read_text().rstrip().splitlines()[-1]
        assert last.endswith('"$@"'), (
            "a script ends in the command it wraps, and passes its words on"
        )


def wrapping(script: str, folder: Path, python: str) -> list[str]:
    """The command that runs a copy of a script in a repository whose Python is the given text."""
    copy = folder / script
    copy.parent.mkdir(parents=True)
    shutil.copy(ROOT / script, copy)
    (folder / "env_setup.sh").write_text("echo env_setup\n")
    fake = folder / ".venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text(f"#!/usr/bin/env bash\n{python}\n")
    fake.chmod(0o755)
    return ["bash", str(copy)]


def test_quickstart_takes_a_new_folder_each_time(tmp_path: Path) -> None:
    command = wrapping("scripts/quickstart.sh", tmp_path, 'echo "$@"; mkdir -p "${10}"')
    for folder in ("runs/quickstart", "runs/quickstart-2", "runs/quickstart-3"):
        output = subprocess.check_output([*command, "--run.seed", "1"], cwd="/", text=True)
        train = f"train --recipe shapes_mixgrpo --run.folder {folder} --run.seed 1"
        assert re.search(f"^-m mixgrpo launch --nproc_per_node [12] {train}$", output, re.MULTILINE)
        assert re.search(r"installing took \d+ s", output)
        assert re.search(r"training took \d+ s", output)


def test_quickstart_fails_when_training_fails(tmp_path: Path) -> None:
    assert subprocess.call(wrapping("scripts/quickstart.sh", tmp_path, "exit 3")) == 3


ON_GPUS = {
    **{
        f"scripts/finetune/finetune_flux_{name}.sh": f"train --recipe flux_{name}"
        for name in ("mixgrpo", "mixgrpo_flash", "mixgrpo_flash_star", "dancegrpo")
    },
    "scripts/finetune/finetune_qwen_image_mixgrpo_ocr.sh": "train --recipe qwen_image_mixgrpo_ocr",
    "scripts/inference/inference_flux.sh": "sample --recipe flux",
    "scripts/inference/inference_qwen_image.sh": "sample --recipe qwen_image",
    "scripts/evaluate/eval_reward.sh": "evaluate",
    "scripts/preprocess/preprocess_flux.sh": "preprocess --model.path data/models/FLUX.1-dev "
    "--prompts_files data/prompts.txt data/prompts_test.txt --output data/embeddings/flux",
    "scripts/preprocess/preprocess_qwen_image.sh": "preprocess --model.path "
    "data/models/Qwen-Image --model.text_length 256 --prompts_files data/ocr/prompts.txt "
    "data/ocr/prompts_test.txt --output data/embeddings/qwen_image",
}


@pytest.mark.parametrize("script", ON_GPUS)
def test_scripts_run_on_the_hosts_of_the_hostfile(tmp_path: Path, script: str) -> None:
    command = wrapping(script, tmp_path, 'echo "$@"; exit 3')
    shutil.copy(ROOT / "scripts" / "launch.sh", tmp_path / "scripts")
    for chosen, file in (("", "hosts/hostfile"), ("my hosts", "my hosts")):
        done = subprocess.run(
            [*command, "--output", "a b"], cwd="/", env={**os.environ, "HOSTFILE": chosen},
            stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        started = f"-m mixgrpo hosts --hostfile {file} {ON_GPUS[script]} --output a b"
        assert done.stdout.splitlines() == ["env_setup", started]
        assert done.returncode == 3


@pytest.mark.parametrize("given", [["--recipe", "mine"], ["--recipe=mine"]])
@pytest.mark.parametrize("script", [s for s, words in ON_GPUS.items() if "--recipe" in words])
def test_a_recipe_of_the_users_counts_alone(tmp_path: Path, script: str, given: list[str]) -> None:
    command = wrapping(script, tmp_path, '[ "$1" = -c ] && echo 0 || echo "$@"')
    shutil.copy(ROOT / "scripts" / "launch.sh", tmp_path / "scripts")
    done = subprocess.check_output([*command, "--x", "y", *given], cwd="/", text=True)
    name = ON_GPUS[script].split()[0]
    assert done.splitlines()[1].endswith(f"{name} --x y {' '.join(given)}")


def test_check_script_compares_the_hosts_for_a_recipe(tmp_path: Path) -> None:
    command = wrapping("scripts/hosts/check.sh", tmp_path, 'echo "$@"')
    for given, recipe in (
        ([], "--recipe flux_mixgrpo"),
        (["--recipe=mine", "a b"], "--recipe=mine a b"),
    ):
        done = subprocess.check_output([*command, *given], cwd="/", text=True)
        assert done.splitlines()[1] == f"-m mixgrpo hosts check {recipe}"


def test_test_script_passes_its_words_on(tmp_path: Path) -> None:
    command = wrapping("scripts/test.sh", tmp_path, 'echo "$OMP_NUM_THREADS $@"; pwd; exit 5')
    environment = {**os.environ, "OMP_NUM_THREADS": "7"}
    result = subprocess.run(
        [*command, "-k", "a b"],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 5
    setup, ran, where = result.stdout.splitlines()
    assert (setup, where) == ("env_setup", str(tmp_path))
    assert re.fullmatch(r"7 -m pytest --numprocesses [1-4] --dist worksteal -k a b", ran)


FOR_HOSTS = ("pdsh", "sshd", "ip", "ps")


def with_all_programs(folder: Path) -> Path:
    """A folder of the programs that tests need, so that none is installed; nor could it be."""
    programs = folder / "programs"
    programs.mkdir()
    texts = {"apt-get": f"touch {folder}/installed", **dict.fromkeys(("chromium", *FOR_HOSTS), "")}
    for name, text in texts.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    return programs


@pytest.mark.parametrize(
    ("user", "apt", "said", "required"),
    [
        (0, "cp {bin}/true {bin}/chromium", "== installing chromium", "required"),
        (0, "exit 100", "== chromium could not be installed", "required"),
        (1000, "exit 100", "== chromium: missing, and only root can install by apt-get", ""),
    ],
)
def test_ci_installs_a_browser_or_says_why_not(
    tmp_path: Path, user: int, apt: str, said: str, required: str
) -> None:
    command = wrapping(".ci/run", tmp_path, "true")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "test.sh").write_text('echo "browser: $MIXGRPO_BROWSER."\n')
    programs = tmp_path / "programs"
    programs.mkdir()
    for tool in ("bash", "env", "dirname", "readlink", "true", "cp"):
        (programs / tool).symlink_to(str(shutil.which(tool)))
    for tool in FOR_HOSTS:
        (programs / tool).symlink_to(str(shutil.which("true")))
    for name, text in (("id", f"echo {user}"), ("apt-get", apt.format(bin=programs))):
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    environment = {"PATH": str(programs)}
    done = subprocess.run(
        command, cwd="/", env=environment, capture_output=True, text=True, check=False
    )
    assert said in done.stdout
    assert f"browser: {required}." in done.stdout.splitlines(), done.stderr
    assert (programs / "chromium").exists() == (said == "== installing chromium")


@pytest.mark.parametrize("failing", ["pytest", "ruff check", "ruff format", "mypy"])
def test_ci_runs_every_check_and_fails_with_any(tmp_path: Path, failing: str) -> None:
    command = wrapping(".ci/run", tmp_path, f'echo "ran $*"; [[ $* != *"{failing}"* ]]')
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "test.sh").write_text(".venv/bin/python -m pytest\n")
    environment = {"PATH": f"{with_all_programs(tmp_path)}:{os.environ['PATH']}"}
    result = subprocess.run(
        command, cwd="/", env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    for check in ("-m pytest", "-m ruff check .", "-m ruff format --check .", "-m mypy"):
        assert f"ran {check}" in result.stdout.splitlines()
    assert not (tmp_path / "installed").exists(), "nothing was missing"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_license() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "The mixgrpo authors" in text
