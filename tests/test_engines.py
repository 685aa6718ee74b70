"""Engines: in two processes each trains as one process does, saves, resumes, exports."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from engine_processes import (
    MAX_NORM,
    STEPS,
    VARIANTS,
    EngineConfig,
    evaluate,
    learn,
    make_engine,
)
from peft import LoraConfig, get_peft_model
from processes import Command
from safetensors.torch import load_file
from tiny_world import (
    ROOT,
    World,
    checkpoint_folder,
    copy_run,
    same,
    saved_tensors,
    train_here,
    training_records,
)
from torch import Tensor
from whole_states import read_from, whole, whole_of

from mixgrpo.checks import check
from mixgrpo.config import Config, ModelConfig
from mixgrpo.engines.shards import copy_part
from mixgrpo.engines.zero_setup import settings
from mixgrpo.models.policy import DiffusersPolicy
from mixgrpo.models.stored import StoredWeights, draw_adapter

LORA = {"model__train": "lora", "model__lora_rank": 2, "model__lora_alpha": 4}
SHORT: dict[str, Any] = {
    "run__iterations": 2,
    "checkpoint__every": 1,
    "checkpoint__keep": 0,
    "update__kl": 0.1,
    "validation__every": 0,
    "validation__prompts": 1,
    "validation__steps": 2,
    "validation__pictures": 0,
}
FSDP = {"engine__kind": "fsdp"}
SMALL_GPU = {
    **FSDP,
    "engine__gather": "evaluation",
    "engine__reduce": "micro_batch",
    "engine__offload": True,
    "model__gradient_checkpointing": True,
    "model__checkpoint_every": 2,
    "ema__placement": "cpu",
}
ZERO3 = {"engine__kind": "deepspeed", "engine__zero_stage": 3}
# Trainings in two processes; those after the dash continue the first one's first iteration.
RUNS: dict[str, dict[str, Any]] = {
    "fsdp": FSDP,
    "fsdp lora": {**FSDP, **LORA},
    "fsdp - fsdp": {**SMALL_GPU, "run__resume": True},
    "zero3 lora": {**ZERO3, **LORA},
    "fsdp - zero3": {**ZERO3, "run__resume": True},
    "fsdp lora - zero2": {**ZERO3, **LORA, "engine__zero_stage": 2, "run__resume": True},
    # Of Qwen-Image with guidance: two evaluations before each backward pass, weights that are never
    # trained, and tables that no engine knows of.
    "qwen fsdp": FSDP,
    "qwen ddp lora": {"engine__kind": "ddp", **LORA},
    "qwen fsdp - zero3": {**ZERO3, "run__resume": True},
    "qwen fsdp lora - zero2": {**ZERO3, **LORA, "engine__zero_stage": 2, "run__resume": True},
}


@pytest.fixture(scope="session")
def alone(
    world: World, qwen_world: World, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same trainings in one process, with full weights and with adapters."""
    root = tmp_path_factory.mktemp("alone")
    return {
        f"{family}{name}": train_here(of.config(root / f"{family}{name}", **SHORT, **knobs))
        for family, of in (("", world), ("qwen ", qwen_world))
        for name, knobs in (("full", {}), ("lora", LORA))
    }


def counterpart(alone: dict[str, Path], name: str) -> Path:
    """The training in one process that a training in two must equal."""
    family = "qwen " if name.startswith("qwen ") else ""
    return alone[f"{family}{'lora' if 'lora' in name else 'full'}"]


@pytest.fixture(scope="session")
def two(
    world: World,
    qwen_world: World,
    alone: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], Path]:
    """What the engines did in two processes, and the folder of their trainings."""
    root = tmp_path_factory.mktemp("two")
    for name, knobs in RUNS.items():
        if "run__resume" in knobs:
            copy_run(counterpart(alone, name), root / name, 1)
    jobs = [
        (qwen_world if name.startswith("qwen ") else world).arguments(
            root / name, **{**SHORT, **knobs}
        )
        for name, knobs in RUNS.items()
    ]
    (root / "jobs.json").write_text(json.dumps(jobs))
    return in_processes(2, root), root


def in_processes(count: int, root: Path, *source: str) -> dict[str, Any]:
    script = ROOT / "tests" / "engine_processes.py"
    done = Command([str(root), *source], root / "said", count, script)
    assert done.wait() == [0] * count, done.stderr[-4000:]
    return torch.load(root / "found.pt", weights_only=True)


# ---- each engine against one process, on a small net


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """One process, the whole batch."""
    engine = make_engine(EngineConfig("single"))
    before, norms = evaluate(engine), learn(engine, range(2))
    middle, state = evaluate(engine), whole(engine.state())
    norms += learn(engine, range(2, STEPS))
    return {
        "before": before,
        "middle": middle,
        "norms": norms,
        "state": state,
        "weights": whole(engine.weights()),
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_an_engine_computes_what_one_process_computes(name, two, single):
    found = two[0][name]
    assert max(single["norms"]) > MAX_NORM, "nothing would have been clipped"
    assert found["norms"] == pytest.approx(single["norms"], rel=1e-5)
    for key in ("before", "middle"):
        torch.testing.assert_close(found[key], single[key], rtol=0, atol=1e-6)
    close(found["weights"], single["weights"])


@pytest.mark.parametrize("name", VARIANTS)
def test_an_engine_resumed_is_the_engine_uninterrupted(name, two):
    found = two[0][name]
    torch.testing.assert_close(found["continued"], found["middle"], rtol=0, atol=1e-6)
    close(found["resumed"], found["weights"])


@pytest.mark.parametrize("name", VARIANTS)
def test_what_two_processes_saved_one_continues(name, two, single):
    """Read from torch.distributed.checkpoint's files, in which two processes wrote their parts."""
    engine = make_engine(EngineConfig("single"), seed=1)
    saved = two[1] / "states" / name
    engine.restore(partial(dcp.load, checkpoint_id=saved, no_dist=True))
    learn(engine, range(2, STEPS))
    close(whole(engine.weights()), single["weights"])


@pytest.mark.parametrize("name", VARIANTS)
def test_the_whole_state_is_that_of_one_process(name, two, single):
    found, expected = two[0][name]["state"], single["state"]
    assert found["schedule"]["last_epoch"] == expected["schedule"]["last_epoch"] == 2
    close(found["model"], expected["model"])
    for name_of, moments in expected["optimizer"]["state"].items():
        close(found["optimizer"]["state"][name_of], moments)
    (group,), (same_group,) = (s["optimizer"]["param_groups"] for s in (found, expected))
    assert group["lr"] == pytest.approx(same_group["lr"])
    assert sorted(group["params"]) == sorted(same_group["params"])


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_changed_from_outside_are_those_evaluated(name, two):
    """As by an average that takes the weights' place; gathered copies must not survive."""
    found = two[0][name]
    engine = make_engine(EngineConfig("single"))
    engine.load_weights(read_from(found["weights"]))
    for shard in engine.shards:
        shard.mul_(0.5)
    torch.testing.assert_close(found["exchanged"], evaluate(engine), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_gradient_that_is_not_finite_shows_before_the_step(name, two):
    assert not torch.tensor(two[0][name]["not_finite"]).isfinite()


@pytest.mark.parametrize("name", VARIANTS)
def test_half_precision_is_autocasts(name, two):
    """The same products, to the last bit; weights and sums of gradients float32."""
    engine = make_engine(EngineConfig("single"), dtype=torch.bfloat16)
    found = two[0][name]["bfloat16"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found["before"], evaluate(engine))
        assert found["norms"] == pytest.approx(learn(engine, range(1)), rel=2e-2)
    assert found["dtypes"] == ["torch.float32"]


@pytest.mark.four_processes
def test_four_processes_and_what_they_saved_resumed_by_two(tmp_path, single):
    """By hand: pytest -m four_processes."""
    four, two = tmp_path / "four", tmp_path / "two"
    for folder in (four, two):
        folder.mkdir()
    for found in (in_processes(4, four), in_processes(2, two, str(four))):
        assert found.keys() == VARIANTS.keys()
        for name in VARIANTS:
            assert found[name]["norms"] == pytest.approx(single["norms"], rel=1e-5), name
            close(found[name]["weights"], single["weights"])
            close(found[name]["resumed"], single["weights"])


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


# ---- whole trainings


@pytest.mark.parametrize("name", RUNS)
def test_a_training_in_two_processes_equals_one(name, two, alone, world, qwen_world):
    """Tolerances as for two processes of DDP: see test_train."""
    folder, reference = two[1] / name, counterpart(alone, name)
    one, found = ({r["iteration"]: r for r in training_records(run)} for run in (reference, folder))
    assert found.keys() == one.keys()
    for iteration, record in found.items():
        assert record["update/ratio_error_on_policy"] <= 1e-6
        for key in ("update/kl", "update/loss", "update/grad_norm", "reward/redness"):
            assert record[key] == pytest.approx(one[iteration][key], rel=1e-3, abs=1e-6), key
    own = qwen_world if name.startswith("qwen ") else world
    start = own.policy(**(LORA if "lora" in name else {})).module
    for part in ("model", "ema"):
        a, b = (saved_tensors(checkpoint_folder(run, 2), part) for run in (reference, folder))
        assert a.keys() == b.keys()
        first = {n: p.detach() for n, p in start.named_parameters() if p.requires_grad}
        apart, travelled = distance(a, b), distance(a, first)
        assert apart < 1e-3 * travelled, (apart, travelled)


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return sum((first[n] - second[n]).square().sum() for n in first).sqrt().item()


def test_exports_are_those_of_the_last_checkpoint(two, world):
    """A pipeline folder; adapters that fit."""
    config = ModelConfig(path=str(two[1] / "fsdp" / "model"), compute_dtype="float32")
    model = DiffusersPolicy.load(config, torch.device("cpu"), 0).module
    weights = saved_tensors(checkpoint_folder(two[1] / "fsdp", 2))
    assert same(weights, {n: p.detach() for n, p in model.named_parameters()})
    for name in ("fsdp lora", "zero3 lora"):
        file = two[1] / name / "model" / "pytorch_lora_weights.safetensors"
        exported, saved = load_file(file), saved_tensors(checkpoint_folder(two[1] / name, 2))
        # The scale, alpha / rank, is a part of the exported weights.
        named = {
            f"transformer.{key.replace('.default.', '.')}": value * (2 if ".lora_B." in key else 1)
            for key, value in saved.items()
        }
        assert same(exported, named)


def test_deepspeeds_own_settings_are_kept(two):
    text = (two[1] / "zero3 lora" / "engine.json").read_text()
    assert json.loads(text) == settings(EngineConfig("deepspeed"), torch.float32)
    assert not (two[1] / "fsdp" / "engine.json").exists()
    bfloat = settings(EngineConfig("deepspeed", zero_stage=2), torch.bfloat16)
    assert bfloat["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert bfloat["zero_optimization"]["stage"] == 2


# ---- loading


def test_stored_weights_are_those_that_are_loaded(world):
    """Also with adapters beside them, whose first values need no order."""
    for knobs in ({}, LORA, {**LORA, "model__lora_init": "gaussian"}):
        loaded = world.policy(**knobs).module
        model = world.config(world.root, **knobs).model
        empty = DiffusersPolicy.load(model, torch.device("cpu"), seed=7, empty=True)
        assert all(parameter.is_meta for parameter in empty.module.parameters())
        assert empty.stored is not None
        for name, parameter in loaded.named_parameters():
            assert torch.equal(empty.stored[name][:], parameter), name
        assert set(empty.stored) == {name for name, _ in loaded.named_parameters()}


def test_weights_of_another_model_are_refused(world):
    other = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"does not fit the model: missing: weight, bias"):
        StoredWeights(world.model / "transformer", other, 0)


def test_adapters_are_drawn_within_their_bound():
    drawn = draw_adapter("a.lora_A.default.weight", torch.Size([64, 100]), 7)
    assert drawn.abs().max() <= 0.1
    assert drawn.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert not torch.equal(drawn, draw_adapter("b.lora_A.default.weight", drawn.shape, 7))
    assert not torch.equal(drawn, draw_adapter("a.lora_A.default.weight", drawn.shape, 8))
    assert not draw_adapter("a.lora_B.default.weight", torch.Size([5, 2]), 7).any()


def test_gaussian_adapters_have_pefts_spread():
    """PEFT's own, drawn beside: the mean and the deviation of 64 x 100 numbers."""
    name, shape = "a.lora_A.default.weight", torch.Size([64, 100])
    drawn = draw_adapter(name, shape, 7, "gaussian")
    torch.manual_seed(0)
    chosen = LoraConfig(r=64, target_modules=["0"], init_lora_weights="gaussian")
    module = torch.nn.Sequential(torch.nn.Linear(100, 5))
    theirs = get_peft_model(module, chosen).base_model.model[0]
    for weight in (drawn, theirs.lora_A["default"].weight):
        assert abs(weight.mean().item()) < 4 / 64 / 6400**0.5
        assert weight.std().item() == pytest.approx(1 / 64, rel=0.04)
    assert drawn.abs().max() > 3 / 64  # beyond any bound of a uniform one
    assert torch.equal(drawn, draw_adapter(name, shape, 7, "gaussian"))
    assert not torch.equal(drawn, draw_adapter(name, shape, 8, "gaussian"))
    assert not draw_adapter("a.lora_B.default.weight", torch.Size([5, 2]), 7, "gaussian").any()


def test_a_saved_state_fills_tensors_in_place_and_replaces_the_rest():
    tensor = torch.zeros(2, 3)
    state = {"a": {"t": tensor}, "groups": [{"lr": 1.0, "betas": (0.1, 0.2)}]}
    saved = {"a": {"t": torch.arange(6.0).view(2, 3)}, "groups": [{"lr": 2.0, "betas": (0.3, 0.4)}]}
    read_from(saved)(state)
    assert torch.equal(tensor, saved["a"]["t"])
    assert state["groups"] == saved["groups"]
    copy_part(tensor, torch.ones(2, 3))
    assert whole_of(tensor, keep=True).sum() == 6
    assert whole_of(tensor, keep=False).numel() == 0


# ---- every n-th block


def test_every_second_block_is_recomputed(world, monkeypatch):
    recomputed = []
    plain = torch.utils.checkpoint.checkpoint

    def counted(function, *inputs, **knobs):
        recomputed.append(function)
        return plain(function, *inputs, **knobs)

    monkeypatch.setattr("mixgrpo.models.policy.checkpoint", counted)
    knobs = {"model__gradient_checkpointing": True, "model__checkpoint_every": 2}
    policy = world.policy(**knobs)
    text = policy.encode(["a red circle"])
    velocity = policy.velocity(policy.module)
    velocity(torch.ones(1, 16, 64), torch.tensor([0.5]), text).sum().backward()
    assert recomputed == policy.blocks(policy.module)[::2]
    found = {n: p.grad for n, p in policy.module.named_parameters()}
    policy = world.policy()
    policy.velocity(policy.module)(
        torch.ones(1, 16, 64), torch.tensor([0.5]), text
    ).sum().backward()
    assert same(found, {n: p.grad for n, p in policy.module.named_parameters()})


# ---- combinations that cannot work


@pytest.mark.parametrize(
    ("kind", "processes", "more", "complaint"),
    [
        ("single", 2, {}, r"'single', but there are 2 processes"),
        ("ddp", 2, {"hybrid": True}, r"engine.hybrid is true, which only fsdp supports"),
        ("deepspeed", 2, {"offload": True}, r"engine.offload is true, which only fsdp supports"),
        ("fsdp", 1, {"offload": True}, r"a single process shards nothing"),
    ],
)
def test_combinations_that_cannot_work_are_refused(kind, processes, more, complaint):
    config = Config()
    config.engine = EngineConfig(kind, **more)
    config.batch.prompts = 2
    with pytest.raises(ValueError, match=complaint):
        check(config, processes)


def test_deepspeed_keeps_its_own_float32_weights():
    config = Config()
    config.engine = EngineConfig("deepspeed")
    config.batch.prompts = 2
    config.update.optimizer = "adamw_8bit"
    with pytest.raises(ValueError, match=r"update.optimizer is 'adamw_8bit', but DeepSpeed"):
        check(config, 2)
    config.update.optimizer = "adamw"
    config.model.weights = "bfloat16_stochastic"
    with pytest.raises(ValueError, match=r"model.weights is 'bfloat16_stochastic', but DeepSpeed"):
        check(config, 2)
