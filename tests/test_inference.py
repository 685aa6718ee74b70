"""Sampling test prompts: whose weights, which noise, what a folder keeps, what can go wrong."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from lora_world import SPLIT, Form, behind, named, patterns
from PIL import Image
from processes import Command
from safetensors.torch import load_file, save_file
from tiny_world import (
    CPU,
    QUICK,
    ROOT,
    checkpoint_folder,
    files_of,
    saved_tensors,
    train_here,
)
from torch import Tensor

from mixgrpo.commands import main
from mixgrpo.commands.sample import parse
from mixgrpo.config import flatten
from mixgrpo.files.fingerprint import fingerprint_files
from mixgrpo.files.weight_sets import NAME
from mixgrpo.inference import config as inference_config
from mixgrpo.inference.config import InferenceConfig, SampledModelConfig, check, tuned_steps
from mixgrpo.inference.folder import PictureFolder
from mixgrpo.inference.memory import estimate, explain
from mixgrpo.inference.sample import OutOfMemory, sample, settings_of
from mixgrpo.maths.schedule import dynamic_shift, make_sigmas
from mixgrpo.models.adapters import attach_lora
from mixgrpo.models.flux import FLUX
from mixgrpo.models.lora_files import read_lora
from mixgrpo.models.policy import DiffusersPolicy
from mixgrpo.noise import Noise
from mixgrpo.rollout import sample_ode
from mixgrpo.run.pictures import to_bytes
from mixgrpo.text.prompt_files import PromptList

STEPS = 4
PROMPTS = 3
SHIFT = 3.0
LORA = {**QUICK, "update__learning_rate": 1e-2}
INDEX = f"{NAME}.index.json"
Draw = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def no_gpu() -> Iterator[None]:
    with mock.patch("torch.cuda.is_available", return_value=False):
        yield


@pytest.fixture
def knobs(world, tmp_path) -> Callable[..., InferenceConfig]:
    """A configuration for the tiny world's validation prompts."""

    def make(**given: Any) -> InferenceConfig:
        base = InferenceConfig(
            model=SampledModelConfig(
                path=str(world.model), compute_dtype="float32", height=64, width=64, text_length=16
            ),
            prompts_file=str(world.validation_prompts),
            folder=str(tmp_path / "pictures"),
            steps=STEPS,
            shift=SHIFT,
            micro_batch=8,
            decode_batch=8,
            threads=1,
            progress=False,
        )
        return replace(base, **given)

    return make


@pytest.fixture
def draw(knobs, tmp_path) -> Draw:
    """Samples into a folder of its own; returns the pictures [N, H, W, 3]."""
    count = iter(range(100))

    def run(**given: Any) -> Tensor:
        return read(sample(knobs(folder=str(tmp_path / f"drawn{next(count)}"), **given)))

    return run


def read(folder: Path) -> Tensor:
    """The pictures that the manifest lists, [N, H, W, 3]."""
    manifest = json.loads((folder / "manifest.json").read_text())
    images = [np.array(Image.open(folder / image["file"])) for image in manifest["images"]]
    return torch.from_numpy(np.stack(images)).int()


@torch.no_grad()
def by_hand(prompts: Sequence[str], *parts: tuple[DiffusersPolicy, int]) -> Tensor:
    """Pictures [N, H, W, 3] by these models, each up to its step."""
    policy, sigmas, start = parts[0][0], make_sigmas(STEPS, SHIFT), 0
    x = Noise(617, 0, range(len(prompts)), 1, policy.latent_shape, True, CPU).initial()
    text = policy.encode(prompts)
    for policy, stop in parts:
        velocity = policy.velocity(policy.module)
        x = sample_ode(velocity, x, text, sigmas[start : stop + 1], 8)
        start = stop
    return to_bytes(policy.decode(x)).permute(0, 2, 3, 1).int()


def largest(first: Tensor, second: Tensor) -> int:
    return int((first - second).abs().max())


@pytest.fixture(scope="module")
def prompts(world) -> list[str]:
    return world.validation_prompts.read_text().splitlines()


@pytest.fixture(scope="module")
def base(world) -> DiffusersPolicy:
    return world.policy()


@pytest.fixture(scope="module")
def base_pictures(base, prompts) -> Tensor:
    return by_hand(prompts, (base, STEPS))


@pytest.fixture(scope="module")
def trained(world, straight) -> DiffusersPolicy:
    policy = world.policy()
    policy.module.load_state_dict(saved_tensors(checkpoint_folder(straight, 4)))
    return policy


@pytest.fixture(scope="module")
def trained_pictures(trained, prompts, base_pictures) -> Tensor:
    pictures = by_hand(prompts, (trained, STEPS))
    assert largest(pictures, base_pictures) > 0, "training must have changed the pictures"
    return pictures


@pytest.fixture(scope="module")
def lora_run(world, tmp_path_factory) -> Path:
    with mock.patch("torch.cuda.is_available", return_value=False):
        return train_here(world.config(tmp_path_factory.mktemp("lora") / "run", **LORA))


@pytest.fixture(scope="module")
def with_lora(world, lora_run) -> DiffusersPolicy:
    """The policy as training left it."""
    policy = world.policy(**LORA)
    saved = saved_tensors(checkpoint_folder(lora_run, 1))
    assert not policy.module.load_state_dict(saved, strict=False).unexpected_keys
    return policy


@pytest.fixture(scope="module")
def lora_pictures(with_lora, prompts, base_pictures) -> Tensor:
    pictures = by_hand(prompts, (with_lora, STEPS))
    assert largest(pictures, base_pictures) > 0, "training must have changed the pictures"
    return pictures


# ---- whose weights


def test_without_a_checkpoint_the_base_model_draws(draw, base_pictures):
    assert torch.equal(draw(), base_pictures)
    assert base_pictures.float().std() > 1


def test_the_base_model_draws_as_plain_diffusers_does(world, draw, base, prompts):
    pipeline = FluxPipeline.from_pretrained(world.model)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompt=prompts,
        latents=Noise(617, 0, range(PROMPTS), 1, base.latent_shape, True, CPU).initial(),
        num_inference_steps=STEPS,
        height=64,
        width=64,
        max_sequence_length=16,
        output_type="pt",
    ).images
    assert largest(draw(), to_bytes(images).permute(0, 2, 3, 1).int()) <= 1


def test_shift_0_takes_the_schedule_of_flux_for_the_pictures_size(draw, base, prompts):
    with mock.patch(f"{__name__}.SHIFT", dynamic_shift(16)):
        expected = by_hand(prompts, (base, STEPS))
    assert torch.equal(draw(shift=0.0), expected)


def test_a_runs_model_folder(draw, straight, trained_pictures):
    assert torch.equal(draw(checkpoint=str(straight / "model")), trained_pictures)


def test_a_checkpoint_folder_plain_and_averaged(draw, world, straight, prompts, trained_pictures):
    path = checkpoint_folder(straight, 4)
    averaged = world.policy()
    averaged.module.load_state_dict(saved_tensors(path, "ema"))
    expected = by_hand(prompts, (averaged, STEPS))
    assert torch.equal(draw(checkpoint=str(path)), trained_pictures)
    assert torch.equal(draw(checkpoint=str(path), weights="ema"), expected)
    assert largest(expected, trained_pictures) > 0


def test_the_first_sample_is_what_validation_drew(draw, straight):
    """Same noise, same schedule; validation's batches may differ, so rounding may."""
    last = sorted((straight / "pictures").iterdir())[-1]
    shown = torch.stack(
        [torch.from_numpy(np.array(Image.open(p))).int() for p in sorted(last.glob("*.png"))]
    )
    assert len(shown) == PROMPTS
    assert largest(draw(checkpoint=str(straight / "model")), shown) <= 1


def test_a_lone_file_and_shards_with_their_index(draw, straight, tmp_path, trained_pictures):
    lone = straight / "model" / "transformer" / NAME
    assert torch.equal(draw(checkpoint=str(lone)), trained_pictures)

    index = shards(load_file(lone), tmp_path / "sharded")
    assert torch.equal(draw(checkpoint=str(index)), trained_pictures)
    assert torch.equal(draw(checkpoint=str(index.parent)), trained_pictures)


def shards(weights: dict[str, Tensor], folder: Path) -> Path:
    """Writes the weights in two files; returns their index."""
    folder.mkdir(parents=True)
    names = sorted(weights)
    files = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file)
    places = {name: file for file, part in files.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder / INDEX


def test_a_base_model_in_shards(draw, world, straight, tmp_path, trained_pictures):
    """As FLUX.1-dev is published; a hybrid run reads them again for its last steps."""
    folder = tmp_path / "model"
    shutil.copytree(straight / "model", folder)
    weights = folder / "transformer" / NAME
    state = load_file(weights)
    weights.unlink()
    config = (folder / "transformer" / "config.json").read_bytes()
    shutil.rmtree(folder / "transformer")
    shards(state, folder / "transformer")
    (folder / "transformer" / "config.json").write_bytes(config)
    model = SampledModelConfig("flux", str(folder), "float32", 3.5, 64, 64, 16)
    assert torch.equal(draw(model=model), trained_pictures)
    base_file = str(world.model / "transformer")
    there_and_back = draw(model=model, checkpoint=base_file, hybrid=0.0)
    assert torch.equal(there_and_back, trained_pictures)


def test_a_lora_at_no_half_and_full_strength(draw, lora_run, base_pictures, lora_pictures):
    path = str(lora_run / "model")
    assert torch.equal(draw(checkpoint=path, lora_scale=0.0), base_pictures)
    assert torch.equal(draw(checkpoint=path), lora_pictures)
    half = draw(checkpoint=path, lora_scale=0.5)
    assert largest(half, base_pictures) > 0
    assert largest(half, lora_pictures) > 0


def test_a_lora_from_a_checkpoint_folder(draw, lora_run, lora_pictures):
    assert torch.equal(draw(checkpoint=str(checkpoint_folder(lora_run, 1))), lora_pictures)


def test_a_lora_with_its_scale_beside_the_weights(draw, tmp_path):
    """By diffusers' names with an alpha, and by kohya's, which diffusers converts; rank 2."""
    generator = torch.Generator().manual_seed(4)
    down, up = torch.randn(2, 128, generator=generator), torch.randn(128, 2, generator=generator)
    module, alpha = "transformer.transformer_blocks.0.attn.to_out.0", torch.tensor(3.0)
    kohya = "lora_unet_double_blocks_0_img_attn_proj"
    forms = {
        "folded": {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up * 1.5},
        "alpha": {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up,
                  f"{module}.alpha": alpha},
        "kohya": {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up,
                  f"{kohya}.alpha": alpha},
    }  # fmt: skip
    drawn = {}
    for name, state in forms.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        drawn[name] = draw(checkpoint=str(tmp_path / f"{name}.safetensors"))
    assert largest(drawn["alpha"], drawn["folded"]) <= 1
    assert largest(drawn["kohya"], drawn["folded"]) <= 1
    assert largest(drawn["folded"], draw(checkpoint=str(tmp_path / "alpha.safetensors"),
                                         lora_scale=0.5)) > 1  # fmt: skip


def test_a_folder_of_peft_with_its_settings(draw, knobs, tmp_path, capfd):
    """Changed settings are other weights; and what a text encoder would need is told of once."""
    spread = named(SPLIT, behind("base_model.model."))
    text = {"base_model.model.text_encoder.a.lora_A.weight": torch.ones(1, 1)}
    peft = Form({}, {**spread, **text}, beside=patterns(SPLIT), file="adapter_model.bin")
    folder = peft.write(tmp_path / "peft").parent
    folded = Form({}, named(SPLIT, behind("transformer."), folded=True)).write(tmp_path)
    drawn = draw(checkpoint=str(folder), micro_batch=1)
    assert capfd.readouterr().out.count("that part is not used") == 1
    assert largest(drawn, draw(checkpoint=str(folded))) <= 1
    assert largest(drawn, draw()) > 1
    sample(knobs(checkpoint=str(folder)))
    settings = {**peft.beside, "lora_alpha": 8, "alpha_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"checkpoint was .*, is .* with other contents"):
        sample(knobs(checkpoint=str(folder)))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_hybrid_in_bfloat16(knobs, draw, straight, lora_run, base_pictures, kind):
    model = replace(knobs().model, compute_dtype="bfloat16")
    run = straight if kind == "full" else lora_run
    drawn = draw(model=model, checkpoint=str(run / "model"), hybrid=0.5)
    assert (drawn - base_pictures).abs().float().mean() < 8
    assert not torch.equal(drawn, draw(model=model))


def test_adapters_stay_float32_beside_weights_in_bfloat16(knobs, lora_run):
    policy = DiffusersPolicy.frozen(
        inference_config.model_config(
            knobs(model=replace(knobs().model, compute_dtype="bfloat16"))
        ),
        CPU,
    )
    file = next((lora_run / "model").glob("*.safetensors"))
    attach_lora(FLUX, policy.module, read_lora(file), 1.0)
    for name, parameter in policy.module.named_parameters():
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name
        assert ".lora_" in name or not parameter.requires_grad


# ---- hybrid


@pytest.mark.parametrize(("share", "tuned"), [(0.5, 2), (0.8, 3), (0.0, 0)])
def test_hybrid_is_the_tuned_model_first_then_the_base(
    draw, share, tuned, straight, lora_run, trained, with_lora, base, prompts
):
    assert tuned_steps(InferenceConfig(steps=STEPS, hybrid=share, checkpoint="a")) == tuned
    for run, policy in ((straight, trained), (lora_run, with_lora)):
        drawn = draw(checkpoint=str(run / "model"), hybrid=share, micro_batch=8)
        assert torch.equal(drawn, by_hand(prompts, (policy, tuned), (base, STEPS)))


def test_hybrid_changes_full_weights_once_for_all_pictures(draw, straight, base, trained, prompts):
    with mock.patch("mixgrpo.inference.tuned.fill", wraps=inference_fill()) as filled:
        drawn = draw(checkpoint=str(straight / "model"), hybrid=0.5, micro_batch=1)
    assert filled.call_count == 2
    assert largest(drawn, by_hand(prompts, (trained, 2), (base, STEPS))) <= 1
    with mock.patch("mixgrpo.inference.tuned.fill", wraps=inference_fill()) as filled:
        draw(checkpoint=str(straight / "model"), micro_batch=1)
    assert filled.call_count == 1


def inference_fill() -> Callable[..., None]:
    from mixgrpo.files.weight_files import fill

    return fill


def test_the_published_share_is_30_of_50_steps():
    assert tuned_steps(InferenceConfig(hybrid=0.6, checkpoint="a")) == 30


def test_only_base_leaves_the_checkpoint_aside(draw, straight, base_pictures):
    assert torch.equal(draw(checkpoint=str(straight / "model"), only_base=True), base_pictures)


# ---- noise, batches, processes


def test_batches_do_not_change_the_noise(knobs, draw, base_pictures):
    assert largest(draw(micro_batch=2, decode_batch=1), base_pictures) <= 1


def test_two_processes_draw_the_same(knobs, tmp_path):
    alone = sample(knobs(folder=str(tmp_path / "one"), micro_batch=1, samples=2))
    config = flatten(knobs(folder=str(tmp_path / "two"), micro_batch=1, samples=2))
    words = [w for k, v in config.items() if v is not None for w in (f"--{k}", str(v).lower()
             if isinstance(v, bool) else str(v))]  # fmt: skip
    done = Command(["sample", *words], tmp_path / "said", count=2)
    assert done.wait() == [0, 0], done.stderr
    assert done.stdout.splitlines() == [f"pictures: {tmp_path / 'two'}"]
    together = tmp_path / "two"
    assert sorted(p.name for p in together.iterdir()) == sorted(p.name for p in alone.iterdir())
    for picture in alone.glob("*.png"):
        assert (together / picture.name).read_bytes() == picture.read_bytes()
    images = [json.loads((f / "manifest.json").read_text())["images"] for f in (alone, together)]
    assert images[0] == images[1]


def test_several_samples_of_a_prompt(knobs, prompts, base_pictures):
    folder = sample(knobs(samples=3, micro_batch=4))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert manifest["images"] == [
        {"index": i, "sample": s, "prompt": prompts[i], "file": f"{i:05d}_{s:02d}.png"}
        for i in range(PROMPTS)
        for s in range(3)
    ]
    pictures = read(folder).reshape(PROMPTS, 3, *base_pictures.shape[1:])
    assert largest(pictures[:, 0], base_pictures) <= 1
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert largest(pictures[:, first], pictures[:, second]) > 10


def test_another_seed_draws_other_pictures(draw, base_pictures):
    assert largest(draw(seed=618), base_pictures) > 10


# ---- what is there is not drawn again


def test_settings_are_saved(knobs, world):
    folder = sample(knobs())
    settings = json.loads((folder / "manifest.json").read_text())["settings"]
    assert flatten(knobs()).items() <= settings.items()
    assert set(settings) - set(flatten(knobs())) == {
        "revision", "fingerprints.model", "fingerprints.checkpoint", "fingerprints.prompts"
    }  # fmt: skip


def test_a_finished_folder_is_left_as_it_is(knobs):
    folder = sample(knobs())
    before = {k: v for k, v in files_of(folder).items() if k.endswith(".png")}
    with mock.patch.object(
        DiffusersPolicy, "frozen", side_effect=AssertionError("loaded for nothing")
    ):
        sample(knobs(micro_batch=2, decode_batch=3, progress=True))
    assert {k: v for k, v in files_of(folder).items() if k.endswith(".png")} == before


def test_only_what_is_missing_is_drawn(knobs):
    folder = sample(knobs())
    before = files_of(folder)
    (folder / "00001_00.png").unlink()
    sample(knobs())
    after = files_of(folder)
    assert after["00001_00.png"][2] == before["00001_00.png"][2]
    assert after["00001_00.png"] != before["00001_00.png"]
    for other in ("00000_00.png", "00002_00.png"):
        assert after[other] == before[other]


def interrupted_after(count: int, what: Callable[[], None]) -> Any:
    """Patches saving so that ``what`` happens before the picture behind the ``count`` first."""
    save, calls = PictureFolder.save, iter(range(100))

    def saving(self: PictureFolder, *given: Any) -> None:
        if next(calls) == count:
            what()
        save(self, *given)

    return mock.patch.object(PictureFolder, "save", saving)


def test_an_interrupted_run_goes_on(knobs, draw, base_pictures):
    def stop() -> None:
        raise KeyboardInterrupt

    with interrupted_after(2, stop), pytest.raises(KeyboardInterrupt):
        sample(knobs())
    folder = Path(knobs().folder)
    assert len(read(folder)) == 2
    assert torch.equal(read(sample(knobs())), base_pictures)


def test_a_signal_is_told_in_a_line(knobs, capfd):
    before = signal.getsignal(signal.SIGTERM)
    with (
        interrupted_after(1, lambda: signal.raise_signal(signal.SIGTERM)),
        mock.patch("mixgrpo.commands.sample.parse", return_value=knobs()),
    ):
        code = main(["sample"])
    assert signal.getsignal(signal.SIGTERM) == before
    assert code == 128 + signal.SIGTERM
    said = capfd.readouterr().err
    assert f"stopped by SIGTERM; the images in {knobs().folder} are complete" in said
    assert len(read(Path(knobs().folder))) == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left"), r"00001_00\.png could not be written \(No space.*free some"),
        (KeyboardInterrupt("a signal"), "a signal"),
    ],
)
def test_a_picture_is_written_whole_or_not_at_all(knobs, error, message):
    flush, calls = os.fsync, iter(range(100))

    def fail_at_the_second_picture(handle: int) -> None:
        # The manifest and the first picture come before, each with its folder.
        if next(calls) == 4:
            raise error
        flush(handle)

    with (
        mock.patch("mixgrpo.inference.folder.os.fsync", fail_at_the_second_picture),
        pytest.raises(type(error), match=message),
    ):
        sample(knobs())
    left = sorted(path.name for path in Path(knobs().folder).iterdir())
    assert left == ["00000_00.png", "manifest.json"]


# ---- other settings, other contents


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 5}, "steps was 4, is 5"),
        ({"seed": 1, "shift": 0.0}, "seed was 617, is 1; shift was 3.0, is 0.0"),
        ({"samples": 2}, "samples was 1, is 2"),
        ({"model": {"guidance": 2.0}}, "model.guidance was 3.5, is 2.0"),
    ],
)
def test_pictures_by_other_settings_are_refused(knobs, given, message):
    folder = sample(knobs())
    before = files_of(folder)
    if "model" in given:
        given = {"model": replace(knobs().model, **given["model"])}
    with pytest.raises(ValueError, match="choose another --folder") as caught:
        sample(knobs(**given))
    assert message in str(caught.value)
    assert files_of(folder) == before


def test_other_contents_under_the_same_name_are_noticed(knobs, world, straight, tmp_path):
    weights, prompts = tmp_path / "tuned.safetensors", tmp_path / "prompts.txt"
    shutil.copy(straight / "model" / "transformer" / NAME, weights)
    shutil.copy(world.validation_prompts, prompts)
    given = {"checkpoint": str(weights), "prompts_file": str(prompts)}
    sample(knobs(**given))
    shutil.copy(weights, tmp_path / "copy.safetensors")
    sample(knobs(**{**given, "checkpoint": str(tmp_path / "copy.safetensors")}))  # the same
    save_file(saved_tensors(checkpoint_folder(straight, 4), "ema"), weights)
    with pytest.raises(ValueError, match=r"checkpoint was .*, is .* with other contents"):
        sample(knobs(**given))
    shutil.copy(straight / "model" / "transformer" / NAME, weights)
    prompts.write_text("a red circle\n" * 3)
    with pytest.raises(ValueError, match=r"prompts_file was .*, is .* with other contents"):
        sample(knobs(**given))


def test_metadata_of_the_prompts_is_in_the_manifest(knobs, tmp_path):
    """No image depends on it: with other metadata, the images stay and the manifest changes."""
    texts, path = ["a red circle", "a blue\nsquare", "a red circle"], tmp_path / "prompts.jsonl"

    def sampled(metadata: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        lines = [{**each, "prompt": text} for text, each in zip(texts, metadata, strict=True)]
        path.write_text("\n".join(map(json.dumps, lines)) + "\n")
        folder = sample(knobs(prompts_file=str(path), steps=2))
        return json.loads((folder / "manifest.json").read_text())["images"]

    metadata = [{"n": 1, "list": [0.1, {"k": None}], "file": "x"}, {}, {"n": 2}]
    first = sampled(metadata)
    assert [entry.get("metadata", {}) for entry in first] == metadata
    assert "metadata" not in first[1]
    assert [entry["prompt"] for entry in first] == texts
    drawn = {name: of for name, of in files_of(tmp_path / "pictures").items() if "png" in name}
    assert [entry.get("metadata", {}) for entry in sampled([{}, {"m": 3}, {}])] == [
        {},
        {"m": 3},
        {},
    ]
    assert drawn.items() <= files_of(tmp_path / "pictures").items()


def test_line_breaks_in_prompts_are_told_apart_from_those_between_prompts(knobs):
    both, two = (settings_of(knobs(), PromptList.plain(texts)) for texts in (["a\nb"], ["a", "b"]))
    assert both["fingerprints.prompts"] != two["fingerprints.prompts"]


def test_a_fingerprint_is_of_size_and_contents_whatever_the_names(tmp_path):
    files = [tmp_path / "a", tmp_path / "b", tmp_path / "c", tmp_path / "d"]
    for file, contents in zip(files, (b"123", b"123", b"124", b"1230"), strict=True):
        file.write_bytes(contents)
    first, same, *others = [fingerprint_files([file]) for file in files]
    assert first == same
    assert len({first, *others}) == 3


def test_pictures_without_a_manifest_and_a_damaged_one(knobs):
    folder = Path(knobs().folder)
    folder.mkdir()
    (folder / "manifest.json").write_text("{")
    sample(knobs(steps=2))  # without pictures there is nothing to protect
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"00000_00\.png, but no manifest\.json.*another --folder"):
        sample(knobs())
    for text in ("{", "[]", '{"settings": 3}', "{}"):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            sample(knobs())


# ---- tuned weights that do not fit


def refused(knobs: Callable[..., InferenceConfig], **given: Any) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        sample(knobs(**given))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_of_other_weights(knobs, straight, tmp_path):
    weights = load_file(straight / "model" / "transformer" / NAME)
    first, second = sorted(weights)[:2]
    file = tmp_path / "other.safetensors"
    save_file({k: v for k, v in weights.items() if k != first}, file)
    assert f"does not fit the model: missing: {first}" in refused(knobs, checkpoint=str(file))
    save_file({**weights, "double_blocks.0.weight": torch.ones(2)}, file)
    assert "unexpected: double_blocks.0.weight" in refused(knobs, checkpoint=str(file))
    save_file({**weights, second: torch.ones(2, 3)}, file)
    shape = list(weights[second].shape)
    message = refused(knobs, checkpoint=str(file))
    assert f"of another size: {second} [2, 3] instead of {shape}" in message


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_truncated_file(knobs, straight, lora_run, tmp_path, kind):
    source = straight / "model" / "transformer" / NAME
    if kind == "lora":
        source = next((lora_run / "model").glob("*.safetensors"))
    file = tmp_path / "cut.safetensors"
    file.write_bytes(source.read_bytes()[:-1000])
    message = refused(knobs, checkpoint=str(file))
    assert str(file) in message
    assert "is truncated" in message
    assert "download it again" in message


def test_a_file_that_is_no_safetensors(knobs, world):
    message = refused(knobs, checkpoint=str(world.prompts))
    assert "is text, not weights" in message


def changed_lora(lora_run: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any]) -> str:
    state = load_file(next((lora_run / "model").glob("*.safetensors")))
    change(state)
    save_file(state, tmp_path / "lora.safetensors")
    return str(tmp_path / "lora.safetensors")


Q = "transformer.transformer_blocks.0.attn.to_q"


def pair(layer: str, into: int, out: int) -> dict[str, Tensor]:
    return {
        f"{layer}.lora_A.weight": torch.ones(2, into),
        f"{layer}.lora_B.weight": torch.ones(out, 2),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update(pair(Q.replace("0", "7"), 128, 128)),
            "it changes transformer_blocks.7.attn.to_q, which the model does not have",
        ),
        (
            lambda s: s.update(pair(Q, 3072, 128)),
            f"its adapter of {Q} takes 3072 inputs, but the model's transformer_blocks.0.attn.to_q "
            "takes 128",
        ),
        (
            lambda s: s.update(pair(Q, 128, 3072)),
            f"its adapter of {Q} has 3072 outputs, but the model needs 128",
        ),
        (
            lambda s: s.update(pair("lora_unet_down_blocks_0_attentions_0_proj_in", 4, 4)),
            "it changes lora_unet_down_blocks_0_attentions_0_proj_in, and FLUX has no such layer",
        ),
        (
            lambda s: s.update(pair("transformer.transformer_blocks.0.attn.norm_q", 4, 4)),
            "it changes transformer.transformer_blocks.0.attn.norm_q, and FLUX has no such layer",
        ),
    ],
)
def test_a_lora_for_another_model(knobs, lora_run, tmp_path, change, message):
    said = refused(knobs, checkpoint=changed_lora(lora_run, tmp_path, change))
    assert "is a LoRA for another model" in said
    assert message in said


def test_a_lora_that_is_too_strong(knobs, lora_run):
    message = refused(knobs, checkpoint=str(lora_run / "model"), lora_scale=1e39)
    assert "lora_scale is 1e+39; it must be at most 1000" in message


def test_other_adapters_than_lora(knobs, tmp_path):
    """Known by their names alone, even in a file without a plain LoRA."""
    file = Form({}, {"lycoris_proj_out.lokr_w1": torch.ones(2, 2)}).write(tmp_path)
    assert "is LoKr (lycoris_proj_out.lokr_w1), and only plain" in refused(
        knobs, checkpoint=str(file)
    )
    (tmp_path / "lora").mkdir()
    file.unlink()
    assert f"did you mean {str(tmp_path / 'lora')!r}?" in refused(knobs, checkpoint=str(tmp_path))


def test_places_without_weights(knobs, straight, tmp_path):
    assert "'no/such', which contains no weights" in refused(knobs, checkpoint="no/such")
    message = refused(knobs, checkpoint=str(straight))
    assert f"did you mean {str(straight / 'model')!r}?" in message
    newest = checkpoint_folder(straight, 4)
    message = refused(knobs, checkpoint=str(straight / "checkpoints"))
    assert f"did you mean {str(newest)!r}?" in message
    (tmp_path / INDEX).write_text("[]")
    assert "is not an index of weights" in refused(knobs, checkpoint=str(tmp_path))
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert "names gone.safetensors, which does not exist" in refused(
        knobs, checkpoint=str(tmp_path)
    )


def test_an_average_where_there_is_none(knobs, straight, lora_run):
    message = refused(knobs, checkpoint=str(straight / "model"), weights="ema")
    assert "is not a checkpoints/iteration_N folder" in message
    message = refused(knobs, checkpoint=str(checkpoint_folder(lora_run, 1)), weights="ema")
    assert "holds no moving average, since its run kept none; set --weights plain" in message


def test_a_lora_scale_for_whole_weights(knobs, straight):
    message = refused(knobs, checkpoint=str(straight / "model"), lora_scale=0.5)
    assert "lora_scale is 0.5, but" in message


# ---- knobs and prompts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 1}, "steps is 1; it must be at least 2"),
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"decode_batch": 0}, "decode_batch is 0"),
        ({"shift": -1.0}, "shift is -1.0; it must be at least 0"),
        ({"hybrid": 1.5, "checkpoint": "a"}, "hybrid is 1.5; it must be at most 1"),
        ({"hybrid": 0.8}, "hybrid is 0.8, but no tuned weights are given; set --checkpoint"),
        ({"lora_scale": 2.0}, "lora_scale is 2.0, but no tuned weights are given"),
        ({"weights": "ema"}, "weights is ema, but no tuned weights are given"),
        ({"model": SampledModelConfig(height=100)}, "model.height is 100; it must be a positive"),
        ({"model": SampledModelConfig(text_length=0)}, "model.text_length is 0"),
    ],
)
def test_knobs_that_cannot_work(given, message):
    with pytest.raises(ValueError) as caught:
        check(InferenceConfig(**given))
    assert message in str(caught.value)


def test_prompt_files_without_prompts_and_models_without_parts(knobs, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    message = refused(knobs, prompts_file=str(tmp_path / "empty.txt"))
    assert "contains no prompt" in message
    assert "set --prompts_file" in refused(knobs, prompts_file="no/such.txt")
    model = replace(knobs().model, path="no/such")
    assert "set --model.path" in refused(knobs, model=model)
    assert not Path(knobs().folder).exists()


def test_truncated_prompts_are_told_of(knobs, tmp_path, capfd):
    (tmp_path / "long.txt").write_text("red " * 40 + "\na red circle\n")
    sample(knobs(prompts_file=str(tmp_path / "long.txt")))
    assert "1 of 2 prompts exceed" in capfd.readouterr().out


def test_every_knob_is_documented_and_read():
    documented, tree = set(), ast.parse(Path(inference_config.__file__).read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(text, ast.Expr) and isinstance(field, ast.AnnAssign):
                    documented.add(field.target.id)
    used: set[str] = set()
    for path in (ROOT / "mixgrpo" / "inference").glob("*.py"):
        used |= {n.attr for n in ast.walk(ast.parse(path.read_text()))
                 if isinstance(n, ast.Attribute)}  # fmt: skip
    hints = get_type_hints(InferenceConfig)
    knobs = {field.name for field in fields(InferenceConfig)}
    assert knobs - {name for name, kind in hints.items() if is_dataclass(kind)} <= documented
    assert knobs <= used
    assert {field.name for field in fields(SampledModelConfig)} <= documented


def test_recipes():
    flux = parse(["--recipe", "flux"])
    assert (flux.model.height, flux.model.width, flux.steps, flux.seed) == (1024, 1024, 50, 617)
    assert replace(flux, folder=InferenceConfig().folder) == InferenceConfig()
    shapes = parse(["--recipe", "shapes", "--hybrid", "0.8", "--checkpoint", "a"])
    assert (shapes.model.path, shapes.hybrid, shapes.steps) == ("data/shapes/flux", 0.8, 10)
    check(shapes)


def test_the_command_line(knobs, tmp_path, capfd):
    words = ["--prompts_file", knobs().prompts_file, "--folder", knobs().folder, "--steps", "2",
             "--model.path", knobs().model.path, "--progress", "false"]  # fmt: skip
    assert main(["sample", "--recipe", "shapes", *words]) == 0
    assert capfd.readouterr().out == f"pictures: {knobs().folder}\n"
    assert len(read(Path(knobs().folder))) == PROMPTS
    assert main(["sample", "--recipe", "shapes", "--stepz", "3"]) == 1
    assert capfd.readouterr().err == "error: there is no knob stepz; did you mean steps?\n"
    assert main(["sample", "--recipe", "shaeps"]) == 1
    assert "did you mean 'shapes'? Known: flux, qwen_image, shapes" in capfd.readouterr().err
    (tmp_path / "broken.yaml").write_text("steps: [1\n")
    assert main(["sample", "--recipe", str(tmp_path / "broken.yaml")]) == 1
    assert "broken.yaml is not a valid recipe: " in capfd.readouterr().err
    assert main(["sample", "--recipe", "shapes", "--steps", "1"]) == 1
    assert capfd.readouterr().err == "error: steps is 1; it must be at least 2\n"


def test_help_tells_every_knob(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    for key in flatten(InferenceConfig()):
        assert f"--{key}" in shown


# ---- damage


@pytest.mark.parametrize("name", ["manifest.json", "00000_00.png", "00002_00.png"])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/null")])
def test_what_is_no_file_in_the_folder_is_kept(knobs, name, make):
    folder = Path(knobs().folder)
    folder.mkdir()
    make(folder / name)
    with pytest.raises(ValueError, match=rf"{name} is a .*so it is not replaced; name another"):
        sample(knobs())
    assert [file.name for file in folder.iterdir()] == [name]


def test_what_a_killed_process_left_is_no_picture(knobs):
    folder = Path(knobs().folder)
    folder.mkdir()
    (folder / "partial_00000_00.png").write_bytes(b"half")
    (folder / "partial_manifest.json").write_bytes(b"half")
    sample(knobs())
    assert not list(folder.glob("partial_*"))
    assert len(read(folder)) == PROMPTS


@pytest.mark.parametrize(
    "content",
    ["[" * 99999, '{"settings": {"a": NaN}}', '{"settings": 1, "settings": 2}', "9" * 5000],
)
def test_a_manifest_that_cannot_be_read_is_damaged(knobs, content):
    folder = Path(knobs().folder)
    folder.mkdir()
    (folder / "manifest.json").write_text(content)
    (folder / "00000_00.png").write_bytes(b"kept")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged; choose another --folder"):
        sample(knobs())
    assert (folder / "00000_00.png").read_bytes() == b"kept"


def test_a_damaged_picture_is_drawn_again(knobs, base_pictures):
    config = knobs()
    sample(config)
    folder = Path(config.folder)
    whole = files_of(folder)
    first, second, *_ = sorted(folder.glob("*.png"))
    first.write_bytes(first.read_bytes()[:-3])
    second.write_bytes(b"abc")
    sample(config)
    assert largest(read(folder), base_pictures) == 0
    assert files_of(folder)[first.name][2] == whole[first.name][2]


def test_weights_that_are_not_finite_are_told_of(knobs, straight, tmp_path):
    weights = saved_tensors(checkpoint_folder(straight, 4))
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match=r"nan\.safetensors produces images that are not finite"):
        sample(knobs(checkpoint=str(tmp_path / "nan.safetensors")))


# ---- memory


def test_a_gpu_that_is_too_small(knobs):
    with (
        mock.patch("mixgrpo.inference.sample.sample_ode", side_effect=torch.OutOfMemoryError("!")),
        mock.patch("mixgrpo.inference.sample.memory_of", return_value=24 * 2**30),
        pytest.raises(OutOfMemory) as caught,
    ):
        sample(knobs())
    said = str(caught.value)
    assert "the GPU's 24.0 GiB are not enough" in said
    for knob in ("--micro_batch", "--decode_batch", "--model.compute_dtype bfloat16"):
        assert knob in said
    bfloat16 = replace(knobs().model, compute_dtype="bfloat16")
    assert "compute_dtype" not in explain(knobs(model=bfloat16), 1)


def test_the_estimate_counts_weights_and_activations(world, knobs, base):
    needed = estimate(knobs(micro_batch=3, decode_batch=5))
    pipeline = base.pipeline
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert needed.weights == 4 * sum(p.numel() for part in parts for p in part.parameters())
    width = pipeline.transformer.inner_dim
    # About 20 widths of every token, and five maps of twice the decoder's first width.
    assert needed.evaluation == pytest.approx(3 * (16 + 16) * width * 20 * 4, rel=0.1)
    first = pipeline.vae.config.block_out_channels[0]
    assert needed.decoding == pytest.approx(3 * 64 * 64 * 2 * first * 5 * 4, rel=0.02)
