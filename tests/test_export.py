"""``export``: what other programs load, made from any checkpoint by one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from lora_world import small_flux
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny_world import (
    QUICK,
    checkpoint_folder,
    copy_run,
    files_of,
    same,
    saved_tensors,
    train_here,
)

from mixgrpo.checkpoint import Shards
from mixgrpo.commands import main
from mixgrpo.files.weight_files import write_streamed
from mixgrpo.files.weight_sets import NAME
from mixgrpo.models.adapters import attach_lora, lora_of_run
from mixgrpo.models.export_files import export_weights
from mixgrpo.models.flux import FLUX
from mixgrpo.models.lora_files import read_lora


def contents(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (_, _, content) in files_of(folder).items()}


def notes(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.fixture
def refused(capsys, tmp_path):
    """The one line of an export that must fail, and leave nothing."""

    def run(*arguments: str) -> str:
        assert main(["export", *arguments, "--output", str(tmp_path / "refused")]) == 1
        assert not (tmp_path / "refused").exists()
        said = capsys.readouterr().err.splitlines()
        (line,) = [line for line in said if line.startswith("error: ")]
        return line

    return run


@pytest.fixture(scope="module")
def lora_run(world, tmp_path_factory) -> Path:
    return train_here(world.config(tmp_path_factory.mktemp("lora") / "run", **QUICK))


def test_the_last_checkpoint_is_what_the_run_leaves(straight, tmp_path):
    output = tmp_path / "model"
    assert main(["export", str(straight), "--output", str(output)]) == 0
    assert contents(output) == contents(straight / "model")


def test_any_checkpoint_and_the_average_load_in_diffusers(straight, world, tmp_path):
    source = checkpoint_folder(straight, 2)
    for part, words in (("model", []), ("ema", ["--ema"])):
        output = tmp_path / part
        assert main(["export", str(source), "--output", str(output), *words]) == 0
        module = FluxTransformer2DModel.from_pretrained(output / "transformer")
        assert same(dict(module.state_dict()), saved_tensors(source, part))
        for other in FLUX.parts:
            if other != "transformer":
                assert contents(output / other) == contents(world.model / other)
    assert not same(saved_tensors(source, "model"), saved_tensors(source, "ema"))


def test_an_exported_model_shares_no_file_with_its_source(straight, world, tmp_path):
    """What befalls the one must not befall the other."""
    before = files_of(world.model)
    assert main(["export", str(straight), "--output", str(tmp_path / "model")]) == 0
    files = [file for file in (tmp_path / "model").rglob("*") if file.is_file()]
    assert len(files) > 10
    assert all(file.stat().st_nlink == 1 and not file.is_symlink() for file in files)
    assert files_of(world.model) == before


def test_a_lora_run_gives_its_adapters(lora_run, tmp_path):
    assert main(["export", str(lora_run / "checkpoints"), "--output", str(tmp_path / "lora")]) == 0
    (file,), (trained,) = (tmp_path / "lora").iterdir(), (lora_run / "model").iterdir()
    # The bytes may differ: safetensors writes its notes in no certain order.
    assert (file.name, notes(file)) == (trained.name, notes(trained))
    assert same(load_file(file), load_file(trained))
    adapters = saved_tensors(checkpoint_folder(lora_run, 1))
    # The scale 4 / 2 is in lora_B, exactly.
    expected = {
        f"transformer.{name.replace('.default.weight', '.weight')}": weight * (1 + ("_B." in name))
        for name, weight in adapters.items()
    }
    assert same(load_file(file), expected)
    settings = json.loads(notes(file)["lora_adapter_metadata"])
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (2, 2)


# ---- the strength of an exported LoRA, by readers that know nothing of each other


def by_kohya(file: Path) -> dict[str, torch.Tensor]:
    """The change of each layer as ComfyUI and kohya's scripts compute it: alphas are tensors."""
    state, changes = load_file(file), {}
    for key, up in state.items():
        layer, end, _ = key.partition(".lora_B.weight")
        if end:
            down = state[f"{layer}.lora_A.weight"]
            scale = state[f"{layer}.alpha"] / len(down) if f"{layer}.alpha" in state else 1
            changes[layer.removeprefix("transformer.")] = scale * (up.double() @ down.double())
    return changes


def by_diffusers(file: Path, world) -> dict[str, torch.Tensor]:
    pipeline = FluxPipeline.from_pretrained(world.model)
    pipeline.load_lora_weights(file.parent, adapter_name="tuned")
    return deltas(pipeline.transformer)


def by_peft(file: Path, rank: int) -> dict[str, torch.Tensor]:
    """By PEFT alone, which is told the rank and, as it then assumes, the same alpha."""
    state = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    module = small_flux()
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=FLUX.lora_targets["all"])
    inject_adapter_in_model(config, module, "tuned")
    assert not set_peft_model_state_dict(module, state, "tuned").unexpected_keys
    return deltas(module)


def by_us(file: Path) -> dict[str, torch.Tensor]:
    module = small_flux()
    attach_lora(FLUX, module, read_lora(file), 1.0)
    return deltas(module)


def deltas(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: layer.get_delta_weight("tuned").detach().double()
        for name, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "alpha"), [(2, 4), (2, 2), (4, 1), (3, 5), (2, 7)])
def test_every_reader_applies_an_exported_lora_in_the_strength_of_its_training(
    world, tmp_path, rank, alpha, dtype
):
    knobs = {"model__train": "lora", "model__lora_rank": rank, "model__lora_alpha": alpha}
    config = world.config(tmp_path, **knobs).model
    policy = world.policy(**knobs)
    generator = torch.Generator().manual_seed(rank)
    trained = {
        name: torch.randn(parameter.shape, generator=generator).to(dtype)
        for name, parameter in policy.module.named_parameters()
        if parameter.requires_grad
    }
    export_weights(tmp_path, config, trained, lambda names: [trained[name] for name in names])
    (file,) = tmp_path.iterdir()
    expected = {
        name.removesuffix(".lora_A.default.weight"): alpha
        / rank
        * (trained[name.replace("_A.", "_B.")].double() @ down.double())
        for name, down in trained.items()
        if ".lora_A." in name
    }
    flat = {"model.lora_rank": rank, "model.lora_alpha": alpha}
    module = small_flux()
    attach_lora(FLUX, module, lora_of_run(trained, flat, tmp_path), 1.0)
    for found in (by_kohya(file), by_diffusers(file, world), by_peft(file, rank), by_us(file),
                  deltas(module)):  # fmt: skip
        assert found.keys() == expected.keys()
        worst = max(float((found[n] - change).norm() / change.norm())
                    for n, change in expected.items())  # fmt: skip
        assert worst < 2e-7


def test_a_lora_that_an_earlier_version_exported(tmp_path):
    """Its alpha stands in the header, and its weights are as they were trained."""
    generator = torch.Generator().manual_seed(1)
    layer = "transformer_blocks.1.ff.net.2"
    down, up = torch.randn(2, 512, generator=generator), torch.randn(128, 2, generator=generator)
    FluxPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers={f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up},
        transformer_lora_adapter_metadata={
            "r": 2, "lora_alpha": 5, "target_modules": FLUX.lora_targets["all"]
        },
    )  # fmt: skip
    (file,) = tmp_path.iterdir()
    ((name, change),) = by_us(file).items()
    assert name == layer
    torch.testing.assert_close(change, 2.5 * (up.double() @ down.double()), rtol=0, atol=1e-4)


def test_shards_are_those_of_the_model_that_was_trained(straight, world, tmp_path):
    """Though this was moved since, and in half precision; one tensor is held at a time."""
    moved = tmp_path / "moved"
    shutil.copytree(world.model, moved)
    whole = load_file(moved / "transformer" / NAME)
    (moved / "transformer" / NAME).unlink()
    places = {name: f"{NAME[:-12]}-0000{1 + i % 3}.safetensors" for i, name in enumerate(whole)}
    for file in set(places.values()):
        part = {n: w.bfloat16() for n, w in whole.items() if places[n] == file}
        save_file(part, moved / "transformer" / file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (moved / "transformer" / f"{NAME}.index.json").write_text(json.dumps(index))

    held = []
    read = Shards.read

    def counting(self, state, group=None):
        held.append(sum(len(tensors) for tensors in state.values()))
        read(self, state, group)

    output = tmp_path / "model"
    with mock.patch.object(Shards, "read", counting):
        words = ["export", str(straight), "--output", str(output), "--model", str(moved)]
        assert main(words) == 0
    assert held == [1] * len(whole)

    written = json.loads((output / "transformer" / f"{NAME}.index.json").read_text())
    assert written["weight_map"] == places
    assert written["metadata"]["total_size"] == 4 * sum(w.numel() for w in whole.values())
    for file in set(places.values()):
        with safe_open(output / "transformer" / file, "pt") as opened:
            assert set(opened.keys()) == {n for n in places if places[n] == file}
    module = FluxTransformer2DModel.from_pretrained(output / "transformer")
    assert same(dict(module.state_dict()), saved_tensors(checkpoint_folder(straight, 4)))


def test_a_streamed_file_is_what_safetensors_reads(tmp_path):
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.randn((), generator=generator),
        "c": torch.randn(2, 0, generator=generator),
        "d": torch.randn(4, 3, generator=generator).bfloat16().T,
        "e": torch.randn(4, generator=generator).half(),
    }
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    write_streamed(tmp_path / "a.safetensors", shapes, iter(tensors.values()))
    assert same(load_file(tmp_path / "a.safetensors"), tensors)


# ---- what cannot be exported


def test_where_there_is_no_checkpoint(refused, tmp_path):
    assert "is neither a run's folder with a checkpoint" in refused(str(tmp_path))


def test_an_average_that_was_not_kept(refused, lora_run):
    assert "holds no average, because its run kept none; leave out --ema" in refused(
        str(lora_run), "--ema"
    )


def test_damage(refused, straight, tmp_path):
    run = copy_run(straight, tmp_path / "run", 2)
    file = checkpoint_folder(run, 2) / "model_00000.distcp"
    damaged = bytearray(file.read_bytes())
    damaged[-len(damaged) // 3] ^= 1
    file.write_bytes(damaged)
    assert "model_00000.distcp differs from what was saved" in refused(str(run))


def test_the_model_that_was_trained_is_gone_or_another(refused, straight, world, tmp_path):
    line = refused(str(straight), "--model", str(tmp_path / "gone"))
    assert str(tmp_path / "gone") in line
    other = tmp_path / "other"
    shutil.copytree(world.model, other)
    whole = load_file(other / "transformer" / NAME)
    save_file({**whole, "more": torch.zeros(1)}, other / "transformer" / NAME)
    line = refused(str(straight), "--model", str(other))
    assert str(other) in line and "unexpected: more" in line


def test_a_lora_is_written_whole_or_not_at_all(lora_run, tmp_path, monkeypatch):
    def half(state, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("mixgrpo.models.export_files.save_file", half)
    output = tmp_path / "output"
    assert main(["export", str(lora_run), "--output", str(output)]) == 1
    assert not list(output.rglob("*"))


def test_a_folder_in_which_something_is(straight, tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert main(["export", str(straight), "--output", str(tmp_path)]) == 1
    assert "which is not empty; name a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_mistyped_option(capsys):
    assert main(["export", "runs/a", "--ouput", "b"]) == 1
    assert "output" in capsys.readouterr().err
