"""Fetching models and prompts, with an ``hf`` that only pretends; the real one checks the words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from huggingface_hub.cli._errors import format_known_exception
from huggingface_hub.errors import GatedRepoError

from mixgrpo.commands import main
from mixgrpo.config import RECIPES
from mixgrpo.downloads import items as downloads
from mixgrpo.downloads.hpdv2 import EXPECTED, read_records, write_prompts
from mixgrpo.downloads.items import ITEMS, Item
from mixgrpo.text.prompts import read_prompts

ROOT = Path(__file__).resolve().parent.parent

# Writes its calls down; makes a file of what is included, as if the repository held just that.
# HF_DRY: what it says when asked for a list, failing. HF_FAILS: a repository it breaks off in.
FAKE_HF = """#!/usr/bin/env bash
echo "$*" >>"$HF_CALLS"
case "$*" in *--dry-run*)
    if [ -n "${HF_DRY:-}" ]; then printf '%s\\n' "$HF_DRY" >&2; exit 1; fi
    exit 0 ;;
esac
repository=$2 patterns=() folder=
while [ $# -gt 0 ]; do
    case "$1" in
        --include) patterns+=("$2"); shift ;;
        --local-dir) folder=$2; shift ;;
    esac
    shift
done
if [ "$repository" = "${HF_KILLED:-}" ]; then kill -INT $PPID; exec sleep 5; fi
if [ "$repository" = "${HF_FAILS:-}" ]; then echo "hf: no route" >&2; exit 1; fi
for pattern in "${patterns[@]}"; do
    file=$folder/${pattern/\\*/txt}
    mkdir -p "$(dirname "$file")"
    [ -e "$file" ] || echo '[{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}]' >"$file"
done
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Puts the fake first on PATH, goes to an empty folder; returns hf's calls since last asked."""
    programs, log, place = tmp_path / "programs", tmp_path / "calls", tmp_path / "repository"
    programs.mkdir()
    place.mkdir()
    (programs / "hf").write_text(FAKE_HF)
    (programs / "hf").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("HF_CALLS", str(log))
    monkeypatch.chdir(place)
    disk(monkeypatch, 1000)

    def take() -> list[str]:
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    return take


def execute(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, **options)


def disk(monkeypatch: pytest.MonkeyPatch, gigabytes: float) -> None:
    usage = shutil._ntuple_diskusage(0, 0, int(gigabytes * 1e9))  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def fails(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """One line of error, with these parts."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    for part in parts:
        assert part in error


# --- what is fetched, and where to ----------------------------------------------------------------


def test_flux_is_fetched_without_its_single_file_twins(calls: Callable[[], list[str]]) -> None:
    assert main(["download", "flux"]) == 0
    asked, fetched = calls()
    assert asked == f"{fetched} --dry-run"
    assert fetched.startswith("download black-forest-labs/FLUX.1-dev --include model_index.json ")
    assert "--include transformer/* --include vae/*" in fetched
    assert fetched.endswith("--local-dir data/models/FLUX.1-dev")
    included = fetched.split(" --include ")[1:]
    assert not any(word.startswith(("*", "flux1", "ae")) for word in included)


def test_qwen_image_is_fetched_part_by_part(calls: Callable[[], list[str]]) -> None:
    assert main(["download", "qwen_image"]) == 0
    _, fetched = calls()
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    included = ["model_index.json", "LICENSE", *(f"{part}/*" for part in parts)]
    assert fetched.split(" --include ") == [
        "download Qwen/Qwen-Image",
        *included[:-1],
        "scheduler/* --local-dir data/models/Qwen-Image",
    ]


def test_a_processor_and_a_tokenizer_come_along(calls: Callable[[], list[str]]) -> None:
    assert main(["download", "pickscore", "imagereward"]) == 0
    fetched = [line.split()[1] for line in calls() if "--dry-run" not in line]
    assert fetched == [
        "yuvalkirstain/PickScore_v1",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "THUDM/ImageReward",
        "google-bert/bert-base-uncased",
    ]
    assert Path("data/models/imagereward/vocab.txt").is_file()
    assert Path("data/models/pickscore_processor/tokenizer.json").is_file()


@pytest.mark.parametrize("name", ITEMS)
def test_every_name_brings_what_it_promises(calls: Callable[[], list[str]], name: str) -> None:
    assert main(["download", name, name]) == 0
    assert len(calls()) == 2 * len(ITEMS[name].sources), "a name twice is fetched once"
    for path in ITEMS[name].brings:
        assert Path(path).exists()
    unwanted = set(ITEMS) - {name}
    there = {str(path) for path in Path("data").rglob("*")}
    for other in unwanted:
        assert not there & set(ITEMS[other].brings)


@pytest.mark.parametrize(
    ("name", "count"),
    [("flux_mixgrpo", 7), ("qwen_image_mixgrpo", 7), ("qwen_image_mixgrpo_ocr", 1)],
)
def test_the_recipe_expects_what_is_fetched(name: str, count: int) -> None:
    """Each path of the recipe under data/models is brought, or holds what is brought."""
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    paths = [recipe["model"]["path"]]
    for reward in recipe["rewards"].values():
        values = [
            reward.get("model"),
            reward.get("checkpoint"),
            *reward.get("options", {}).values(),
        ]
        paths += [value for value in values if str(value).startswith("data/")]
    assert len(paths) == count
    brought = {path for item in ITEMS.values() for path in item.brings}
    folders = {str(Path(path).parent) for path in brought}
    assert set(paths) <= brought | folders


def test_git_ignores_what_is_fetched() -> None:
    paths = [path for item in ITEMS.values() for path in item.brings]
    paths += [source.folder for item in ITEMS.values() for source in item.sources]
    ignored = execute(["git", "check-ignore", "--no-index", *paths], cwd=ROOT)
    if "not a git repository" in ignored.stderr:
        pytest.skip("not a git checkout")
    assert ignored.stdout.splitlines() == paths


def test_the_readmes_table_says_what_there_is() -> None:
    readme = (ROOT / "data" / "README.md").read_text()
    for name, item in ITEMS.items():
        (row,) = [line for line in readme.splitlines() if line.startswith(f"| `{name}` |")]
        assert f" {item.gigabytes:g} " in row
        for source in item.sources:
            assert source.repository in row
            assert item.finish or f"`{source.folder}`" in row
        for path in item.brings if item.finish else ():
            assert f"`{path}`" in row


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["flux", "-h"], 0)])
def test_usage_lists_names_sizes_and_places(
    calls: Callable[[], list[str]],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
) -> None:
    assert main(["download", *arguments]) == code
    shown = capsys.readouterr().out
    for name, item in ITEMS.items():
        assert f"  {name} " in shown
        assert f"{item.gigabytes:.1f} GB  {item.what}" in shown
        assert (item.brings[0] if item.finish else item.sources[0].folder) in shown
    assert calls() == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [("fluks", "you mean 'flux'?"), ("pick", "'pickscore'?"), ("zz", "'zz'. ")],
)
def test_an_unknown_name(
    calls: Callable[[], list[str]], capsys: pytest.CaptureFixture[str], name: str, hint: str
) -> None:
    assert main(["download", "hpsv2", name]) == 2
    fails(capsys, repr(name), hint, "Known: flux, qwen_image, hpsv2, pickscore, imagereward")
    assert calls() == [], "nothing is fetched before all names are known"


def test_the_script_runs_the_command_in_the_repository(tmp_path: Path) -> None:
    """From elsewhere, with the .venv's own python and hf, words passed on."""
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "download_models.sh"
    shutil.copy(ROOT / "scripts" / "download_models.sh", script)
    (binaries / "hf").write_text(FAKE_HF)
    (binaries / "python").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
    for program in binaries.iterdir():
        program.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_CALLS": str(tmp_path / "calls")}
    done = execute(["bash", str(script), "hpsv2"], cwd="/", env=environment)
    assert done.returncode == 0, done.stderr
    assert "hpsv2: complete, in data/models/hpsv2" in done.stdout
    assert (tmp_path / "data/models/hpsv2/HPS_v2.1_compressed.pt").is_file()

    shutil.rmtree(tmp_path / ".venv")
    done = execute(["bash", str(script), "hpsv2"])
    assert done.returncode == 1
    assert ".venv, which provides `hf`, does not exist yet" in done.stderr
    assert "run `bash env_setup.sh`" in done.stderr


# --- what can go wrong ----------------------------------------------------------------------------


def test_no_hf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["download", "hpsv2"]) == 1
    fails(capsys, "no program `hf`", "run `bash env_setup.sh`")


def test_access_refused(
    calls: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the words of the library itself."""
    url = "https://huggingface.co/api/models/black-forest-labs/FLUX.1-dev"
    response = httpx.Response(403, request=httpx.Request("GET", url))
    error = GatedRepoError("gated", response=response)
    monkeypatch.setenv("HF_DRY", f"Error: {format_known_exception(error)}\nHint: set HF_DEBUG=1")
    assert main(["download", "flux"]) == 1
    fails(
        capsys,
        "access to black-forest-labs/FLUX.1-dev is refused",
        "accept its licence at https://huggingface.co/black-forest-labs/FLUX.1-dev",
        "`hf auth login` or set HF_TOKEN",
    )
    assert len(calls()) == 1, "nothing is fetched"


def test_a_wrong_token_is_an_access_refused(
    calls: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_DRY", "Error: Invalid user token.")
    assert main(["download", "clip"]) == 1
    fails(capsys, "is refused", "set HF_TOKEN to a valid token")


def test_no_network(
    calls: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_DRY", "Traceback\nConnectError: name not known\nHint: newer hf")
    assert main(["download", "clip"]) == 1
    fails(
        capsys,
        "(ConnectError: name not known)",
        "check the network",
        "keeps what has been downloaded",
    )


def test_a_fetch_that_fails_keeps_what_came_before_and_goes_on(
    calls: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_FAILS", "xswu/HPSv2")
    assert main(["download", "clip", "hpsv2"]) == 1
    error = capfd.readouterr().err
    assert error.startswith("hf: no route\nerror: downloading xswu/HPSv2 failed")
    assert "run the same command again" in error
    assert Path(ITEMS["clip"].brings[0]).exists()
    monkeypatch.delenv("HF_FAILS")
    assert main(["download", "clip", "hpsv2"]) == 0
    assert Path(ITEMS["hpsv2"].brings[0]).exists()


def test_an_interrupted_fetch_goes_on_with_the_same_command(
    calls: Callable[[], list[str]], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "mixgrpo", "download", "clip", "hpsv2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_KILLED": "xswu/HPSv2"}
    done = execute(command, env=environment)
    assert done.returncode == 130
    assert done.stderr == "error: interrupted; run the same command again to continue\n"
    assert "clip: complete" in done.stdout
    del environment["HF_KILLED"]
    done = execute(command, env=environment)
    assert done.returncode == 0
    assert "hpsv2: complete" in done.stdout


def test_a_disk_that_is_too_small(
    calls: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk(monkeypatch, 35.7)
    assert main(["download", "flux", "hpsv2"]) == 1
    fails(capsys, "35.8 GB are still to be downloaded", "has only 35.7 GB free", "free some space")
    assert calls() == []
    disk(monkeypatch, 35.9)
    assert main(["download", "flux", "hpsv2"]) == 0


def test_what_is_there_already_needs_no_disk(
    calls: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path("data/models/hpsv2/.cache")
    folder.mkdir(parents=True)
    with (folder / "half.incomplete").open("wb") as file:
        file.truncate(1_200_000_000)  # sparse
    disk(monkeypatch, 0.7)
    assert main(["download", "hpsv2"]) == 1
    fails(capsys, "0.8 GB are still to be downloaded", "has only 0.7 GB free")
    disk(monkeypatch, 0.9)
    assert main(["download", "hpsv2"]) == 0


def test_a_repository_whose_files_have_other_names_now(
    calls: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    moved: Item = replace(ITEMS["clip"], brings=("data/models/clip/other.bin",))
    monkeypatch.setitem(downloads.ITEMS, "clip", moved)
    assert main(["download", "clip"]) == 1
    fails(
        capsys,
        "'data/models/clip/other.bin' is not among the files of apple/DFN5B-CLIP-ViT-H-14-378",
    )


@pytest.mark.parametrize("name", ["flux", "prompts"])
def test_the_real_hf_understands_the_command(name: str, tmp_path: Path) -> None:
    """Offline, it gets as far as the network."""
    hf = Path(sys.executable).with_name("hf")
    words = ITEMS[name].sources[0].command("--dry-run")[1:]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = execute([str(hf), *words], cwd=tmp_path, env=environment)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said  # 2 is what it returns for words it does not know
    assert "offline" in said.lower() or "locate" in said.lower(), said


# --- prompts --------------------------------------------------------------------------------------


def records(path: Path, prompts: list[object]) -> None:
    path.write_text(json.dumps([{"prompt": prompt, "rank": [1]} for prompt in prompts]))


def test_prompts_are_distinct_in_order_and_one_a_line(tmp_path: Path) -> None:
    prompts = ["b", "a  zebra ", "b", "", " ", "two\nlines", "日本", "a"]
    records(tmp_path / "train.json", [*prompts, *(f"p{i}" for i in range(103_695))])
    records(tmp_path / "test.json", [f"t{i}" for i in range(400)] * 2)
    assert write_prompts(tmp_path, tmp_path) == []
    training = read_prompts(str(tmp_path / "prompts_hpdv2.txt"), "batch.prompts_file").texts
    assert training[:6] == ["b", "a  zebra", "two lines", "日本", "a", "p0"]
    assert len(training) == EXPECTED["train"] == 103_700
    testing = read_prompts(
        str(tmp_path / "prompts_hpdv2_test.txt"), "validation.prompts_file"
    ).texts
    assert testing == [f"t{i}" for i in range(400)]


def test_another_number_of_prompts_is_told(
    calls: Callable[[], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", "prompts"]) == 0
    assert Path("data/prompts_hpdv2.txt").read_text() == "a\nb\n"
    error = capsys.readouterr().err
    assert "warning: data/prompts_hpdv2.txt has 2 prompts, but 103,700 were published" in error
    assert "warning: data/prompts_hpdv2_test.txt has 2 prompts, but 400 were published" in error


@pytest.mark.parametrize("text", ["{", "{}x", '{"prompt": "a"}', '[{"text": "a"}]', "[3]", "3"])
def test_files_that_are_no_records(tmp_path: Path, text: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a list of records with a prompt"):
        read_records(path)
    with pytest.raises(FileNotFoundError, match=r"there is no .*absent.json"):
        read_records(tmp_path / "absent.json")
