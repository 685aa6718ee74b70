"""A resumed run needs the same contents of its files, wherever they are."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import ALONE
from tiny_world import QUICK, REWARDS, World, checkpoint_folder, saved_tensors, train_here

from mixgrpo.checkpoint import Position
from mixgrpo.config import Config, RewardConfig, flatten
from mixgrpo.run.contents import changes, contents_of, read_contents
from mixgrpo.run.saving import check_same_run

OWN = """
class Score:
    def __init__(self, checkpoint=None, model=None, table=None, parts=(), cache=None):
        pass
    def __call__(self, images, texts):
        return images.mean((1, 2, 3))
"""


@pytest.fixture
def place(world, tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder of one's own with the files of a run, each of which may be changed."""
    place = tmp_path / "place"
    shutil.copytree(world.model, place / "flux")
    shutil.copy2(world.prompts, place / "prompts.txt")
    shutil.copy2(world.validation_prompts, place / "prompts_test.txt")
    for name in (
        "clip/model.safetensors",
        "clip/config.json",
        "head.pt",
        "table.txt",
        "one",
        "two",
    ):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(f"contents of {name}")
    (place / "own_score.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(place))
    yield place
    sys.modules.pop("own_score", None)


def config(place: Path, **knobs: Any) -> Config:
    def path(name: str) -> str:
        return str(place / name)

    rewards = {
        **REWARDS,
        "known": RewardConfig(
            "hpsv2", model=path("clip"), checkpoint=path("head.pt"), options={"dtype": "float32"}
        ),
        "own": RewardConfig(
            "own_score:Score",
            model=path("clip"),
            checkpoint=path("table.txt"),
            options={"table": path("table.txt"), "parts": [path("one"), path("two")]},
        ),
        "dotted.name": RewardConfig("jpeg_size"),
        "judge": RewardConfig("vlm", model="UnifiedReward", options={"urls": "http://host:8000"}),
    }
    given = {
        "model__path": path("flux"),
        "batch__prompts_file": path("prompts.txt"),
        "validation__prompts_file": path("prompts_test.txt"),
        "rewards": rewards,
    }
    return World(place).config(place / "run", **{**QUICK, **given, **knobs})


def saved(config: Config, without: str = "nothing") -> Position:
    """What a checkpoint of the run holds; older revisions stored no digests but the prompts'."""
    contents = {k: v for k, v in contents_of(config).items() if not k.startswith(without)}
    return Position(1, 0, json.loads(json.dumps({**flatten(config), **contents})))


def resume(position: Position, config: Config) -> list[str]:
    """Warnings; raises as a resumed run does."""
    contents = read_contents(config, ALONE)
    check_same_run(position, config, contents)
    return list(changes(position.config, config, contents))


def test_the_same_files_at_the_same_paths(place):
    assert resume(saved(config(place)), config(place)) == []


def test_the_same_files_at_other_paths(place, tmp_path):
    position = saved(config(place))
    shutil.copytree(place, tmp_path / "moved")
    shutil.rmtree(place)
    found = config(tmp_path / "moved", run__folder=str(place / "run"))
    assert resume(position, found) == []


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
OTHERS = {
    f"flux/{WEIGHTS}": "model.path",
    "flux/transformer/config.json": "model.path",
    "flux/vae/diffusion_pytorch_model.safetensors": "model.path",
    "flux/text_encoder/model.safetensors": "model.path",
    "flux/text_encoder_2/model.safetensors": "model.path",
    "flux/tokenizer_2/tokenizer.json": "model.path",
    "clip/model.safetensors": "rewards.known.model",
    "clip/config.json": "rewards.own.model",
    "head.pt": "rewards.known.checkpoint",
    "table.txt": "rewards.own.checkpoint",
    "prompts.txt": "batch.prompts_file",
    "prompts_test.txt": "validation.prompts_file",
}


def alter(path: Path) -> None:
    """As other weights of the same shape: of large files, not every byte is compared."""
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + bytes(255 - byte for byte in content[half:]))


@pytest.mark.parametrize("name", OTHERS)
def test_other_contents_at_the_same_path_are_refused(place, name):
    position = saved(config(place))
    alter(place / name)
    with pytest.raises(ValueError, match="whose contents are not those of the saved run") as caught:
        resume(position, config(place))
    assert f"{OTHERS[name]} is {str(place)!r}"[:-1] in str(caught.value)
    assert "train in another --run.folder" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a_new_file.json", "deeper/one.json"])
def test_a_file_more_or_less_in_a_model_is_another_model(place, name):
    position = saved(config(place))
    added = place / "flux" / "vae" / name
    added.parent.mkdir(exist_ok=True)
    added.write_text("{}")
    with pytest.raises(ValueError, match=r"model\.path is"):
        resume(position, config(place))


def test_what_a_run_does_not_read_may_change(place):
    position = saved(config(place))
    (place / "flux" / "README.md").write_text("notes")
    (place / "flux" / "vae" / ".cache").write_text("hidden")
    os.utime(place / "flux" / WEIGHTS)
    assert resume(position, config(place)) == []


@pytest.mark.parametrize(
    ("name", "knob"),
    [
        *(("own_score.py", "code"), ("table.txt", "options.table"), ("one", "options.parts")),
    ],
)
def test_what_belongs_to_a_users_own_reward_may_be_mended_with_a_warning(place, name, knob):
    """A reward that failed is mended before the run goes on; an option may name a cache."""
    given = config(place)
    given.rewards["own"].checkpoint = None
    position = saved(given)
    alter(place / name)
    (warning,) = resume(position, given)
    assert warning.startswith(f"the contents of rewards.own.{knob} have changed")


def test_other_files_at_other_paths_are_refused_also_of_a_users_own_reward(place):
    position = saved(config(place))
    given = config(place)
    given.rewards["own"].options = {"table": str(place / "one"), "parts": [str(place / "two")]}
    with pytest.raises(ValueError, match=r"rewards\.own\.options\.parts is .*own\.options\.table"):
        resume(position, given)


@pytest.mark.parametrize("without", ["contents.model", "contents.rewards", "contents."])
def test_checkpoints_without_digests_compare_paths(place, tmp_path, without):
    position = saved(config(place), without)
    assert resume(position, config(place)) == []
    shutil.copytree(place, tmp_path / "moved")
    with pytest.raises(ValueError, match="this run cannot be resumed with different settings"):
        resume(position, config(tmp_path / "moved", run__folder=str(place / "run")))


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A folder with more files than a model has: reading them would take long."""
    full = tmp_path_factory.mktemp("full")
    for number in range(1001):
        (full / f"{number}.png").touch()
    return full


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", ".", "/", "~", "\0", "a\nb", "x" * 5000, "no/such/file", "ViT-H-14", "float32"),
        *(True, 3, 0.5, None, [], [""], [3], ["no/such"], {"a": "/"}, {"a": {"b": [1]}}),
    ],
)
def test_options_that_are_no_files_have_no_digest(full, monkeypatch, value):
    monkeypatch.chdir(full)
    monkeypatch.setenv("HOME", str(full))
    given = Config(rewards={"own": RewardConfig("own:score", options={"a": value})})
    assert not any(key.startswith("contents.rewards") for key in contents_of(given))


def test_what_is_not_a_file_has_no_digest_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    pipe = str(tmp_path / "fifo")
    given = Config(rewards={"own": RewardConfig("own:score", checkpoint=pipe)})
    given.batch.prompts_file = given.validation.prompts_file = given.model.path = pipe
    assert contents_of(given) == {}


def test_a_reward_whose_package_cannot_be_imported_has_no_digest(tmp_path, monkeypatch):
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    for kind in ("broken_package.score:Score", ":", "a:", ":b", "no.such:thing", "..x:y", "\0:a"):
        assert contents_of(Config(rewards={"own": RewardConfig(kind)})).keys() <= {
            "contents.batch.prompts_file",
            "contents.validation.prompts_file",
        }


def test_a_file_that_cannot_be_read_is_named(place, monkeypatch):
    def denied(config: Config) -> None:
        raise PermissionError(13, "Permission denied", "secret.pt")

    monkeypatch.setattr("mixgrpo.run.contents.contents_of", denied)
    with pytest.raises(OSError, match=r"secret\.pt cannot be read \(Permission denied\)"):
        read_contents(config(place), ALONE)


def test_a_run_whose_files_were_moved_goes_on_and_one_with_another_model_does_not(
    world, place, tmp_path, capsys
):
    """Adapters of one model on another would be neither's."""
    rewards = {"own": RewardConfig("own_score:Score", checkpoint=str(place / "table.txt"))}
    train_here(config(place, rewards=rewards))
    alter(place / "flux" / WEIGHTS)
    again = {"run__resume": True, "run__iterations": 2}
    with pytest.raises(ValueError, match=r"model\.path is .*whose contents"):
        train_here(config(place, rewards=rewards, **again))

    moved = tmp_path / "moved"
    shutil.copytree(place, moved, ignore=shutil.ignore_patterns("run"))
    shutil.copytree(world.model, moved / "flux", dirs_exist_ok=True)
    rewards["own"].checkpoint = str(moved / "table.txt")
    (place / "own_score.py").write_text(f"{OWN}# mended\n")
    folder = place / "run"
    train_here(config(moved, rewards=rewards, run__folder=str(folder), **again))
    assert "warning: the contents of rewards.own.code" in capsys.readouterr().err
    straight = config(moved, rewards=rewards, run__folder=str(tmp_path / "straight"))
    straight.run.iterations = 2
    train_here(straight)
    ours, theirs = (
        saved_tensors(checkpoint_folder(run, 2)) for run in (folder, tmp_path / "straight")
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs)
