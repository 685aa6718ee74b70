"""Stored embeddings: the run with the encoders, by any number of processes, or one error."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_world import (
    CPU,
    PROMPTS,
    QUICK,
    ROOT,
    VALIDATION_PROMPTS,
    World,
    checkpoint_folder,
    environment,
    files_of,
    python,
    records,
    same,
    saved_tensors,
    train_here,
    without_times,
)

from mixgrpo.assembly import make_stored_text
from mixgrpo.checks import check_resumable
from mixgrpo.commands import launch, main
from mixgrpo.config import EncoderConfig, ModelConfig, PreprocessConfig, flatten
from mixgrpo.files import disk
from mixgrpo.files.fingerprint import digest_contents, fingerprint
from mixgrpo.models.flux import FLUX
from mixgrpo.models.folder import require_parts
from mixgrpo.models.text import TextEncoders
from mixgrpo.text import embeddings
from mixgrpo.text.embeddings import Shard, read_index, shard_path, write_index
from mixgrpo.text.preprocess import preprocess
from mixgrpo.text.stored import StoredText

ALL = [*PROMPTS, *VALIDATION_PROMPTS]
LONG = "red " * 30 + "circle"  # more than the 16 tokens of the tiny T5


def config_for(world: World, output: Path, **knobs: Any) -> PreprocessConfig:
    given = {
        "prompts_files": [str(world.prompts), str(world.validation_prompts)],
        "model": EncoderConfig(path=str(world.model), text_length=16),
        "dtype": "float32",
        "shard_size": 3,
        "progress": False,
    }
    return PreprocessConfig(output=str(output), **{**given, **knobs})


def preprocess_here(world: World, output: Path, **knobs: Any) -> Path:
    """The embeddings of the world's 8 prompts in 3 shards."""
    with mock.patch("torch.cuda.is_available", return_value=False):
        preprocess(config_for(world, output, **knobs))
    return output


def opened(world: World, folder: Path, prompts: list[str] | None = None, **knobs: Any) -> Any:
    """As a run opens them, with the run's own checks."""
    given = {"text__mode": "embeddings", "text__embeddings": str(folder), **knobs}
    return make_stored_text(world.config(folder / "run", **given), prompts or ALL, CPU)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def stored(world, tmp_path_factory) -> Path:
    """Not to be changed."""
    return preprocess_here(world, tmp_path_factory.mktemp("embeddings") / "stored")


@pytest.fixture
def mine(stored, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(stored, tmp_path / "mine"))


@pytest.fixture
def encoded() -> Iterator[list[str]]:
    """The prompts that encoders were asked for."""
    prompts: list[str] = []
    encode = TextEncoders._encode_one

    def noted(self: TextEncoders, prompt: str) -> Any:
        prompts.append(prompt)
        return encode(self, prompt)

    with mock.patch.object(TextEncoders, "_encode_one", noted):
        yield prompts


# ---- what is stored is what the encoders say


def test_stored_embeddings_are_the_encoders_own(world, stored):
    order = [ALL[6], ALL[0], ALL[6], ALL[3]]  # of all three shards, one twice
    found, expected = opened(world, stored).encode(order), world.policy().encode(order)
    assert found.tokens.dtype == expected.tokens.dtype == torch.float32
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.pooled, expected.pooled)
    assert found.tokens.shape == (4, 16, 128)
    assert not torch.equal(found.tokens[0], found.tokens[1])


def test_an_embedding_does_not_depend_on_the_prompts_beside_it(world):
    policy = world.policy()
    together = policy.encode(ALL)
    for place in (0, 5):
        alone = policy.encode([ALL[place]])
        assert torch.equal(together.tokens[place], alone.tokens[0])
        assert torch.equal(together.pooled[place], alone.pooled[0])


def test_each_prompt_is_the_pipelines_own_embedding(world):
    """All of it: FLUX attends to the padding's embeddings too."""
    policy = world.policy()
    tokens, pooled, _ = policy.pipeline.encode_prompt([ALL[1]], device=CPU, max_sequence_length=16)
    text = policy.encode([ALL[1]])
    assert torch.equal(text.tokens, tokens)
    assert torch.equal(text.pooled, pooled)


def test_truncated_prompts_are_counted_without_a_tokenizer(world, tmp_path):
    (tmp_path / "long.txt").write_text(f"{LONG}\n{ALL[0]}\n")
    folder = preprocess_here(world, tmp_path / "a", prompts_files=[str(tmp_path / "long.txt")])
    prompts = [LONG, ALL[0], LONG]
    assert opened(world, folder, prompts).count_truncated(prompts) == 2
    assert world.policy().count_truncated(prompts) == 2


# ---- the same run


def test_a_run_on_stored_embeddings_is_the_run_with_encoders(world, stored, straight, folder):
    with mock.patch.object(TextEncoders, "encode", side_effect=AssertionError("encoded online")):
        train_here(
            world.config(
                folder,
                text__mode="embeddings",
                text__embeddings=str(stored),
                checkpoint__every=1,
                checkpoint__keep=0,
            )
        )
    assert without_times(records(folder)) == without_times(records(straight))
    ours, theirs = (saved_tensors(checkpoint_folder(f, 4)) for f in (folder, straight))
    assert ours
    assert same(ours, theirs)
    exported, expected = (f / "model" for f in (folder, straight))
    files = {p.relative_to(expected) for p in expected.rglob("*")}
    assert files == {p.relative_to(exported) for p in exported.rglob("*")}
    assert (exported / "text_encoder_2" / "model.safetensors").read_bytes() == (
        world.model / "text_encoder_2" / "model.safetensors"
    ).read_bytes()


def test_in_bfloat16_too(world, folder, tmp_path):
    knobs = {**QUICK, "run__iterations": 2, "model__compute_dtype": "bfloat16"}
    half = preprocess_here(world, tmp_path / "half", dtype="bfloat16")
    text = opened(world, half, model__compute_dtype="bfloat16").encode(ALL[:2])
    online = world.policy(model__compute_dtype="bfloat16").encode(ALL[:2])
    assert text.tokens.dtype == text.pooled.dtype == online.tokens.dtype == torch.bfloat16
    assert torch.equal(text.tokens, online.tokens)
    train_here(world.config(folder / "online", **knobs))
    stored = {"text__mode": "embeddings", "text__embeddings": str(half)}
    train_here(world.config(folder / "stored", **knobs, **stored))
    found = without_times(records(folder / "stored"))
    assert [r["iteration"] for r in found if "update/loss" in r] == [1, 2]
    assert found == without_times(records(folder / "online"))


def test_a_run_may_go_on_with_stored_embeddings(world, tmp_path):
    knobs = {"text__mode": "embeddings", "text__embeddings": "somewhere"}
    online, stored = world.config(tmp_path), world.config(tmp_path, **knobs)
    check_resumable(flatten(online), stored)
    check_resumable(flatten(online), world.config(tmp_path, text__placement="offload"))
    with pytest.raises(ValueError, match=r"model\.text_length was \d+, is 7"):
        check_resumable(flatten(online), world.config(tmp_path, model__text_length=7))


def test_the_encoders_are_not_loaded(world, stored):
    from mixgrpo.models.policy import DiffusersPolicy

    text = opened(world, stored)
    policy = DiffusersPolicy.load(world.config(stored).model, CPU, 7, stored=text)
    assert all(getattr(policy.pipeline, part) is None for part in FLUX.text_parts)
    assert torch.equal(policy.encode(ALL[:1]).tokens, world.policy().encode(ALL[:1]).tokens)


# ---- where the encoders live


META = torch.device("meta")


def text_at(world: World, placement: str, device: torch.device) -> TextEncoders:
    text = TextEncoders.load(ModelConfig(path=str(world.model), compute_dtype="float32"), CPU)
    return TextEncoders(FLUX, text.pipeline, 16, device, placement)


def devices_of(text: TextEncoders) -> set[str]:
    encoders = text.pipeline.text_encoder, text.pipeline.text_encoder_2
    return {t.device.type for e in encoders for t in [*e.parameters(), *e.buffers()]}


@pytest.mark.parametrize(
    ("placement", "before", "during"),
    [("device", "meta", "meta"), ("cpu", "cpu", "cpu"), ("offload", "cpu", "meta")],
)
def test_placement(world, placement, before, during):
    """The meta device stands for a GPU: it computes shapes and devices, no values."""
    text, seen = text_at(world, placement, META), []
    for encoder in (text.pipeline.text_encoder, text.pipeline.text_encoder_2):
        encoder.register_forward_hook(lambda *_: seen.append(devices_of(text)))
    assert devices_of(text) == {before}
    embedding = text.encode(ALL[:2])
    assert seen == [{during}] * 4
    assert devices_of(text) == {before}
    assert embedding.tokens.device == embedding.pooled.device == META


@pytest.mark.parametrize("placement", ["cpu", "offload"])
def test_placement_changes_no_value(world, placement):
    expected = world.policy().encode(ALL[:2])
    policy = world.policy()
    for _ in range(2):  # what was brought away must be as before
        text = TextEncoders(FLUX, policy.pipeline, 16, CPU, placement).encode(ALL[:2])
        assert torch.equal(text.tokens, expected.tokens)
        assert torch.equal(text.pooled, expected.pooled)


def test_offloaded_encoders_come_back_after_an_error(world):
    text = text_at(world, "offload", META)
    with (
        mock.patch.object(text, "_encode_one", side_effect=RuntimeError("out of memory")),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        text.encode(ALL[:1])
    assert devices_of(text) == {"cpu"}


def test_the_knob_reaches_the_encoders(world):
    from mixgrpo.assembly import make_policy

    policy = make_policy(world.config(world.root, text__placement="offload"), CPU)
    assert policy.text.placement == "offload"
    assert torch.equal(policy.encode(ALL[:1]).tokens, world.policy().encode(ALL[:1]).tokens)


# ---- the folder


def test_shards_and_index(world, stored):
    names = [f"shard_0000{n}.safetensors" for n in range(3)]
    assert sorted(contents(stored)) == ["index.json", *names]
    index = read_index(stored)
    assert [shard.prompts for shard in index.shards] == [ALL[:3], ALL[3:6], ALL[6:]]
    assert index.encoder["text_length"] == 16
    assert index.encoder["dtype"] == "float32"
    for number, shard in enumerate(index.shards):
        assert shard.record.size == shard_path(stored, number).stat().st_size
        assert shard.record.checksum == embeddings._checksum(shard_path(stored, number))
        assert len(set(shard.record.digests)) == len(shard.prompts)


def test_each_distinct_prompt_is_encoded_once(world, tmp_path, encoded):
    (tmp_path / "a.txt").write_text(f"{ALL[0]}\n{ALL[1]}\n{ALL[0]}\n")
    (tmp_path / "b.txt").write_text(f"{ALL[1]}\n{ALL[2]}\n")
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    folder = preprocess_here(world, tmp_path / "out", prompts_files=files)
    assert encoded == ALL[:3]
    assert read_index(folder).shards[0].prompts == ALL[:3]


def test_two_processes_write_what_one_writes(world, stored, tmp_path):
    words = ["--model.path", str(world.model), "--model.text_length", "16", "--dtype", "float32"]
    words += ["--prompts_files", str(world.prompts), str(world.validation_prompts)]
    words += ["--output", str(tmp_path / "two"), "--shard_size", "3", "--progress", "false"]
    done = subprocess.run(
        python("-m", "mixgrpo", "launch", "--nproc_per_node", "2", "preprocess", *words),
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(stored)
    assert done.stdout.count("8 prompts in 3 shards") == 1


def test_the_progress_counts_prompts(world, tmp_path, capfd):
    preprocess_here(world, tmp_path / "a", progress=True)
    assert "8/8" in capfd.readouterr().err


# ---- killed, and run again


class Killed(BaseException):
    pass


@pytest.mark.parametrize("rename", range(9))
def test_killed_at_any_moment_and_run_again(world, stored, tmp_path, monkeypatch, rename):
    """The plan, three shards and their records, the index: each is renamed once to be there."""
    names: list[str] = []
    replace = os.replace

    def dying(source: Path, target: Path) -> None:
        if len(names) == rename:
            shutil.copy2(source, f"{source}.left")  # a killed process cleans nothing up
            raise Killed
        names.append(target.name)
        replace(source, target)

    folder = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(disk.os, "replace", dying)
        if rename == 8:
            preprocess_here(world, folder)
        else:
            with pytest.raises(Killed):
                preprocess_here(world, folder)
            assert list(folder.glob("partial_*"))
    assert len(names) == rename
    shards = [name for name in names if name.endswith(".safetensors")]
    whole = {name: files_of(folder)[name] for name in shards}
    assert {name: data[2] for name, data in whole.items()} == {
        name: contents(stored)[name] for name in shards
    }
    recorded = [name for name in shards if Path(name).with_suffix(".json").name in names]

    preprocess_here(world, folder)
    assert contents(folder) == contents(stored)
    for name in recorded:
        assert files_of(folder)[name] == whole[name], "a finished shard was made again"


@pytest.mark.parametrize("content", [b"\0" * 40, b"{}", b"[]", b"", b'{"size": 1', None])
def test_a_damaged_record_is_made_again(content, world, stored, tmp_path):
    """It lies beside its shard, as if the process had been killed before it updated the index."""
    folder = tmp_path / "out"
    shutil.copytree(stored, folder)
    index = read_index(folder)
    record = dataclasses.asdict(index.shards[1].record)
    index.shards[1] = Shard(index.shards[1].prompts)
    write_index(folder, index)
    text = json.dumps({**record, "digests": None}).encode() if content is None else content
    (folder / "shard_00001.json").write_bytes(text)
    preprocess_here(world, folder)
    assert contents(folder) == contents(stored)


def test_killed_in_the_middle_of_a_shard(world, stored, tmp_path, encoded):
    folder = tmp_path / "out"
    with (
        mock.patch("tqdm.tqdm.update", side_effect=[None] * 4 + [Killed]),
        pytest.raises(Killed),
    ):
        preprocess_here(world, folder)
    assert encoded == ALL[:5]
    assert len(list(folder.glob("*.safetensors"))) == 1
    with pytest.raises(ValueError, match=r"where 3 of 3 shards are not finished; finish them with"):
        opened(world, folder)
    encoded.clear()
    preprocess_here(world, folder)
    assert encoded == ALL[3:]
    assert contents(folder) == contents(stored)


def test_what_is_whole_is_not_made_again(world, mine):
    before = files_of(mine)
    with mock.patch.object(TextEncoders, "load", side_effect=AssertionError("encoders loaded")):
        preprocess_here(world, mine)
    assert files_of(mine) == before


def test_new_prompts_get_new_shards(world, mine, tmp_path, encoded):
    before = contents(mine)
    (tmp_path / "more.txt").write_text(f"{ALL[0]}\n{LONG}\n")
    preprocess_here(world, mine, prompts_files=[str(tmp_path / "more.txt")])
    assert encoded == [LONG]
    after = contents(mine)
    assert set(after) - set(before) == {"shard_00003.safetensors"}
    assert all(after[name] == before[name] for name in before if name != "index.json")
    text = opened(world, mine, [*ALL, LONG])
    assert torch.equal(text.encode([LONG]).tokens, world.policy().encode([LONG]).tokens)


def test_jsonl_gives_the_same_embeddings_as_text(world, stored, tmp_path):
    """They belong to a prompt's text; one that is there twice is encoded once."""
    files = []
    for file in (world.prompts, world.validation_prompts):
        prompts = file.read_text().splitlines()
        lines = [json.dumps({"n": n, "prompt": p}) for n, p in enumerate([*prompts, prompts[0]])]
        files.append(tmp_path / f"{file.stem}.jsonl")
        files[-1].write_text("\n".join(lines))
    own = preprocess_here(world, tmp_path / "own", prompts_files=list(map(str, files)))
    assert contents(own) == contents(stored)


def test_a_full_disk_names_the_shard_and_keeps_the_others(world, stored, tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if "00001" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match=r"shard_00001.safetensors could not be .*No space left"):
            preprocess_here(world, tmp_path / "out")
    kept = files_of(tmp_path / "out")["shard_00000.safetensors"]
    preprocess_here(world, tmp_path / "out")
    assert files_of(tmp_path / "out")["shard_00000.safetensors"] == kept
    assert contents(tmp_path / "out") == contents(stored)


# ---- damaged


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def made_again(said: str, folder: Path) -> None:
    """Runs the command that the message names."""
    command = shlex.split(said.split("with: ")[1])
    assert command[:3] == ["python", "-m", "mixgrpo"]
    with mock.patch("torch.cuda.is_available", return_value=False):
        assert main([*command[3:], "--progress", "false"]) == 0


def test_a_damaged_shard_is_named_and_its_command_mends_it(world, stored, mine):
    text, shard = opened(world, mine), shard_path(mine, 1)
    flip(shard, -5)  # in the last row of the tokens, which come last
    assert torch.equal(text.encode(ALL[3:5]).tokens, opened(world, stored).encode(ALL[3:5]).tokens)
    with pytest.raises(ValueError, match="create it again with: ") as raised:
        text.encode([ALL[0], ALL[5]])
    assert str(shard) in str(raised.value)
    assert repr(ALL[5]) in str(raised.value)
    made_again(str(raised.value), mine)
    assert contents(mine) == contents(stored)
    assert torch.equal(text.encode(ALL).tokens, opened(world, stored).encode(ALL).tokens)


def test_a_shard_with_a_damaged_head(world, mine):
    text = opened(world, mine)
    flip(shard_path(mine, 0), 8)
    with pytest.raises(ValueError, match=r"shard_00000.safetensors is damaged .*preprocess"):
        text.encode([ALL[0]])


@pytest.mark.parametrize("size", [None, 1000])
def test_a_shard_that_is_missing_or_cut_short(world, stored, mine, size):
    shard = shard_path(mine, 2)
    if size is None:
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:size])
    assert opened(world, mine, ALL[:6]) is not None, "shards that nobody needs may be missing"
    with pytest.raises(ValueError, match=rf"{shard.name} has {size or 0} bytes instead") as raised:
        opened(world, mine)
    made_again(str(raised.value), mine)
    assert contents(mine) == contents(stored)


def test_an_index_that_is_none(world, mine):
    (mine / "index.json").write_text('{"encoder": {}, "shards": [{}]}')
    with pytest.raises(ValueError, match=r"index\.json cannot be read as an index of embeddings"):
        opened(world, mine)


# ---- another encoder, missing prompts, before anything is loaded


@pytest.fixture
def altered(world, tmp_path) -> Path:
    """A copy of the model folder, to alter."""
    return Path(shutil.copytree(world.model, tmp_path / "altered"))


@pytest.mark.parametrize("part", FLUX.text_parts)
def test_another_encoder_is_named(world, stored, altered, part):
    largest = max((altered / part).iterdir(), key=lambda path: path.stat().st_size)
    flip(largest, -2)
    with pytest.raises(ValueError, match=rf"made with another {part} \(\w+ there, \w+ here\);"):
        opened(world, stored, model__path=str(altered))


def test_another_transformer_does_not_matter(world, stored, altered):
    (weights,) = (altered / "transformer").glob("*.safetensors")
    flip(weights, -2)
    assert opened(world, stored, model__path=str(altered)) is not None


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"model__text_length": 8}, r"another text_length \(16 there, 8 here\)"),
        (
            {"model__compute_dtype": "bfloat16"},
            r"another dtype \(float32 there, bfloat16 here\).*--model.compute_dtype",
        ),
    ],
)
def test_another_length_or_dtype_is_named(world, stored, knobs, words):
    with pytest.raises(ValueError, match=words):
        opened(world, stored, **knobs)


def test_missing_prompts_are_counted_and_the_first_is_shown(world, folder, mine, tmp_path, capfd):
    (tmp_path / "more.txt").write_text(f"{ALL[0]}\nsix red cubes\na lamp\nsix red cubes\n")
    knobs = {"text__mode": "embeddings", "text__embeddings": str(mine)}
    words = world.arguments(folder, **knobs, batch__prompts_file=str(tmp_path / "more.txt"))
    with (
        mock.patch("torch.cuda.is_available", return_value=False),
        mock.patch("mixgrpo.assembly.make_policy", side_effect=AssertionError("model loaded")),
        mock.patch("mixgrpo.assembly.make_rewards", side_effect=AssertionError("rewards loaded")),
    ):
        assert main(words) == 1
    said = capfd.readouterr().err.strip()
    assert "lacks 2 of 6 training and validation prompts" in said
    assert "the first of them 'six red cubes'" in said
    assert not folder.exists()
    made_again(said, mine)
    assert opened(world, mine, ["six red cubes", "a lamp", *ALL]) is not None


def test_a_folder_without_embeddings(world, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"contains no index.json; create it with: python -m"
    ):
        opened(world, tmp_path)


# ---- preprocess's own complaints


def refused(world: World, output: Path, words: str, **knobs: Any) -> None:
    before = contents(output) if output.exists() else None
    with (
        mock.patch.object(TextEncoders, "load", side_effect=AssertionError("encoders loaded")),
        pytest.raises((ValueError, FileNotFoundError), match=words),
    ):
        preprocess_here(world, output, **knobs)
    assert (contents(output) if output.exists() else None) == before


def test_prompt_files_that_are_none(world, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    refused(world, tmp_path / "o", "not a file; set --prompts_files", prompts_files=["no/such"])
    empty = [str(world.prompts), str(tmp_path / "empty.txt")]
    refused(world, tmp_path / "o", "empty.txt.*contains no prompt", prompts_files=empty)


def test_a_folder_of_another_encoder_is_left_alone(world, mine):
    refused(world, mine, "another dtype; delete it, or choose another --output", dtype="bfloat16")


def test_shards_without_an_index_are_left_alone(world, mine):
    (mine / "index.json").unlink()
    refused(world, mine, "shards but no index.json")


def test_a_missing_encoder(world, tmp_path):
    refused(world, tmp_path / "o", "model.path is 'no/such'", model=EncoderConfig(path="no/such"))


def test_a_damaged_encoder_is_one_error_and_may_be_mended(world, altered, tmp_path, stored):
    weights = altered / "text_encoder_2" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:1000])
    model = EncoderConfig(path=str(altered), text_length=16)
    with pytest.raises(
        ValueError, match=rf"the model in '{altered}' \(model\.path\) cannot be used: .* truncated"
    ):
        preprocess_here(world, tmp_path / "o", model=model)
    weights.write_bytes(data)
    preprocess_here(world, tmp_path / "o", model=model)
    assert contents(tmp_path / "o") == contents(stored)


def test_a_damaged_configuration_of_an_encoder(world, altered, tmp_path):
    path = altered / "text_encoder_2" / "config.json"
    path.write_text("{")
    model = EncoderConfig(path=str(altered), text_length=16)
    refused(world, tmp_path / "o", f"{path} is not valid JSON", model=model)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"shard_size": 0}, "shard_size is 0; it must be at least 1"),
        ({"model": EncoderConfig(path="unused", text_length=0)}, "model.text_length is 0; it must"),
    ],
)
def test_numbers_that_cannot_be(world, tmp_path, knobs, words):
    refused(world, tmp_path / "o", words, **knobs)


def test_too_little_disk_is_told_of_first(world, stored, mine, tmp_path, monkeypatch):
    per_prompt = TextEncoders.bytes_per_prompt(
        ModelConfig(path=str(world.model), text_length=16, compute_dtype="float32")
    )
    assert per_prompt == (16 * 128 + 64) * 4
    whole = shard_path(stored, 0).stat().st_size
    assert 3 * per_prompt < whole < 3 * per_prompt + 500  # a header beside the values
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: SimpleNamespace(free=8 * per_prompt - 1, path=path)
    )
    refused(world, tmp_path / "o", "the embeddings of 8 prompts take .* GiB are free there")
    preprocess_here(world, mine)  # nothing to store


# ---- fingerprints


def test_a_fingerprint_sees_names_sizes_and_contents(tmp_path):
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "a").write_bytes(b"one")
    seen = [fingerprint(folder)]
    (folder / ".hidden").write_bytes(b"of somebody else")
    assert fingerprint(folder) == seen[0]
    for name, data in (("a", b"two"), ("a", b"twoo"), ("b", b"")):
        (folder / name).write_bytes(data)
        seen.append(fingerprint(folder))
    assert len(set(seen)) == 4
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == seen[-1]


def test_a_fingerprint_reads_what_the_digest_of_all_contents_does(tmp_path):
    """Also behind links to folders, and where a name is not UTF-8."""
    (tmp_path / "part").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "part" / "link").symlink_to(tmp_path / "elsewhere")
    seen = []
    for name, data in ((b"a", b"one"), (b"a", b"two"), (b"caf\xe9", b"")):
        Path(tmp_path, "elsewhere", os.fsdecode(name)).write_bytes(data)
        seen.append((fingerprint(tmp_path / "part"), digest_contents(tmp_path / "part")))
    assert [len(set(each)) for each in zip(*seen, strict=True)] == [3, 3]


def test_a_fingerprint_does_not_change_between_versions(tmp_path):
    """Stored embeddings and checkpoints hold it."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    for number, name in enumerate(("a/b/c", "a/b.d", "a-b", "B", "a/é")):
        (tmp_path / name).write_bytes(bytes([number]) * (number + 1))
    assert fingerprint(tmp_path) == "522dac27e56fb52b"


def test_of_a_large_file_only_stretches_are_read(tmp_path):
    """A sparse file of 10 GB: the first and last bytes, and one in every stretch of 20 MB."""
    file = tmp_path / "large"
    with file.open("wb") as opened_file:
        opened_file.truncate(10_000_000_000)
    before = fingerprint(tmp_path)
    for start in (0, 5_000_000_000, 10_000_000_000 - 20_000_000):
        with file.open("r+b") as opened_file:
            opened_file.seek(start)
            opened_file.write(b"x" * 20_000_000)
        after = fingerprint(tmp_path)
        assert after != before
        before = after


# ---- the command line


def test_a_mistyped_knob(capfd):
    assert main(["preprocess", "--prompts_files", "a", "--output", "b", "--model.pth", "c"]) == 1
    said = capfd.readouterr().err.strip()
    assert said == "error: there is no knob model.pth; did you mean model.path?"


def test_launch_tells_of_a_mistyped_knob_of_any_command_before_it_starts(capfd):
    with mock.patch.object(launch, "_start", side_effect=AssertionError("started")):
        words = ["--nproc_per_node", "2", "preprocess", "--prompts_files", "a", "--outptu", "b"]
        assert main(["launch", *words]) == 1
        said = capfd.readouterr().err.splitlines()
        assert said == ["error: there is no knob outptu; did you mean output?"]
        assert main(["launch", "--nproc_per_node", "2", "shapes"]) == 2
        assert "'shapes' does not run in several processes" in capfd.readouterr().err


def test_launch_hands_the_words_on_as_they_are():
    words = ["preprocess", "--prompts_files", "train", "b", "--output", "c"]
    with mock.patch.object(launch, "_start", return_value=0) as start:
        assert launch.run(["--nproc_per_node", "2", *words]) == 0
    given = start.call_args.args[0]
    assert (given.training_script, given.training_script_args) == ("mixgrpo", words)
    assert given.nproc_per_node == "2"


def test_prompts_files_takes_several():
    from mixgrpo.commands.preprocess import parse

    config = parse(["--prompts_files", "a", "b", "--output", "c", "--model.text_length", "9"])
    expected = PreprocessConfig(["a", "b"], "c", model=EncoderConfig(text_length=9))
    assert dataclasses.asdict(config) == dataclasses.asdict(expected)


def test_ctrl_c_says_how_to_go_on(world, tmp_path, capfd):
    words = ["preprocess", "--prompts_files", str(world.prompts), "--output", str(tmp_path / "o")]
    with mock.patch("mixgrpo.text.preprocess.preprocess", side_effect=KeyboardInterrupt):
        assert main(words) == 130
    assert "run the same command to continue" in capfd.readouterr().err


def test_the_threads_reach_the_process_group(world, tmp_path):
    with (
        mock.patch("mixgrpo.text.preprocess.process_group", side_effect=Killed) as group,
        pytest.raises(Killed),
    ):
        preprocess(config_for(world, tmp_path, threads=3))
    group.assert_called_once_with(3)


def test_a_warning_counts_truncated_prompts(world, tmp_path, capfd):
    (tmp_path / "long.txt").write_text(f"{LONG}\n{ALL[0]}\n")
    preprocess_here(world, tmp_path / "a", prompts_files=[str(tmp_path / "long.txt")])
    assert "warning: 1 of 2 prompts exceed" in capfd.readouterr().out


def test_parts_are_required(world):
    found = require_parts(str(world.model), FLUX.text_parts)
    assert [path.name for path in found] == list(FLUX.text_parts)


def test_the_index_is_json_that_people_can_read(stored):
    found = json.loads((stored / "index.json").read_text(encoding="utf-8"))
    assert found["shards"][0]["prompts"][0] == ALL[0]
    assert set(found["encoder"]) == {*FLUX.text_parts, "text_length", "dtype"}


def test_stored_text_on_a_gpu_is_pinned_first(world, stored):
    text = opened(world, stored)
    on_gpu = StoredText(text.folder, text.index, torch.device("cuda"), "")
    values = mock.MagicMock(spec=torch.Tensor)
    on_gpu._to_device(values)
    values.pin_memory.return_value.to.assert_called_once_with(on_gpu.device, non_blocking=True)
