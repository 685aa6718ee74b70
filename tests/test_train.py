"""Whole runs on a tiny FLUX: what they leave, resumed, interrupted, split over two processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from processes import ALONE, Command
from tiny_world import (
    CPU,
    QUICK,
    REWARDS,
    STEPS,
    WINDOW,
    Gate,
    checkpoint_folder,
    copy_run,
    environment,
    files_of,
    python,
    records,
    same,
    saved_tensors,
    train_here,
    training_records,
    without_times,
)

from mixgrpo import checkpoint as checkpoints
from mixgrpo.checks import BOUNDS
from mixgrpo.config import Config, RewardConfig, RunConfig, flatten
from mixgrpo.models.policy import DiffusersPolicy
from mixgrpo.rewards import RewardError
from mixgrpo.rollout import rollout
from mixgrpo.run.contents import contents_of
from mixgrpo.run.saving import resumed_checkpoint
from mixgrpo.run.start import prepare_folder
from mixgrpo.run.stopping import StopRequest, TrainingStopped
from mixgrpo.trainer import Trainer


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """Weights, average, optimizer, schedule and position, to the last bit."""
    for part in ("model", "ema", "optimizer"):
        one, two = saved_tensors(first, part), saved_tensors(second, part)
        assert one, f"a checkpoint without {part} proves nothing"
        assert same(one, two), part
    one, two = (checkpoints.open_saved(path).position for path in (first, second))
    for name in ("iteration", "ema_updates", "kl_weight"):
        assert getattr(one, name) == getattr(two, name), name
    assert same(schedule_of(first), schedule_of(second))


def schedule_of(path: Path) -> dict[str, Any]:
    state = {"schedule": {"last_epoch": -1, "_last_lr": []}}
    checkpoints.Shards(path).read(state)
    assert state["schedule"]["last_epoch"] >= 0
    return state


# ---- one run, end to end


def test_a_run_leaves_what_a_user_needs(straight):
    found = records(straight)
    assert [r["iteration"] for r in found if "validation/redness" in r] == [0, 2, 4]
    assert [r["iteration"] for r in found if "validation_ema/redness" in r] == [2, 4]
    assert [r["iteration"] for r in found if "update/loss" in r] == [1, 2, 3, 4]
    for name in ("before_after.png", "rewards.png"):
        with Image.open(straight / name) as picture:
            assert min(picture.size) > 100
    for iteration in (0, 2, 4):
        pictures = sorted((straight / "pictures" / f"iteration_{iteration:08d}").iterdir())
        names = ["000.png", "001.png", "002.png", "scores.json"]
        assert [picture.name for picture in pictures] == names
        with Image.open(pictures[0]) as picture:
            assert picture.size == (64, 64)
    assert (straight / "model" / "model_index.json").is_file()


def test_without_the_first_validation_nothing_is_shown_as_before(world, folder, capsys):
    knobs = {"run__iterations": 1, "validation__before": False}
    train_here(world.config(folder, **knobs), summary=True)
    assert [r["iteration"] for r in records(folder) if "validation/redness" in r] == [1]
    said = capsys.readouterr().out.splitlines()
    _, before, after, change, *_ = next(line for line in said if line.startswith("redness")).split()
    assert (before, change) == ("-", "-")
    assert float(after) == pytest.approx(records(folder)[-1]["validation/redness"], abs=1e-4)


def test_config_json_holds_the_resolved_configuration_and_the_revision(straight, world):
    saved = json.loads((straight / "config.json").read_text())
    expected = world.config(straight, checkpoint__every=1, checkpoint__keep=0)
    assert saved["config"]["window"]["size"] == WINDOW
    assert saved["config"]["rewards"]["jpeg"]["weight"] == 0.0
    assert saved["config"]["sampling"]["eta"] == expected.sampling.eta
    assert isinstance(saved["revision"], str)
    assert saved["revision"]


def test_the_ratio_before_the_first_update_is_one(straight):
    errors = [r["update/ratio_error_on_policy"] for r in training_records(straight)]
    assert len(errors) == 4
    assert all(error <= 1e-6 for error in errors)


def test_the_weights_move_and_the_window_too(straight):
    found = training_records(straight)
    assert [r["window/start"] for r in found] == [0, 1, 2, 2]
    assert all(r["update/ratio_deviation"] > 1e-9 for r in found)
    assert all(r["update/grad_norm"] > 0 for r in found)
    before = saved_tensors(checkpoint_folder(straight, 1))
    after = saved_tensors(checkpoint_folder(straight, 4))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_pictures_before_training_are_the_base_models(straight, world):
    from mixgrpo.maths.schedule import make_sigmas
    from mixgrpo.noise import Noise
    from mixgrpo.rollout import sample_ode
    from mixgrpo.run.pictures import save_pictures, to_bytes

    policy = world.policy()
    noise = Noise(617, 0, [0, 1, 2], 1, policy.latent_shape, True, CPU).initial()
    text = policy.encode(world.validation_prompts.read_text().splitlines())
    latents = sample_ode(policy.velocity(policy.module), noise, text, make_sigmas(4, 3.0), 8)
    save_pictures(to_bytes(policy.decode(latents)), straight.parent / "base")
    for name in ("000.png", "001.png", "002.png"):
        ours = (straight / "pictures" / "iteration_00000000" / name).read_bytes()
        assert ours == (straight.parent / "base" / name).read_bytes()


# ---- resumed, interrupted


def test_four_iterations_equal_two_and_two_resumed(straight, world, folder):
    train_here(world.config(folder, run__iterations=2, checkpoint__asynchronous=False))
    train_here(world.config(folder, run__iterations=4, run__resume=True))
    assert_same_checkpoint(checkpoint_folder(folder, 4), checkpoint_folder(straight, 4))
    later = [r for r in without_times(records(straight)) if r["iteration"] >= 3]
    assert [r for r in without_times(records(folder)) if r["iteration"] >= 3] == later


def test_a_run_continues_from_where_it_is_told(straight, world, folder):
    copy_run(straight, folder, 2)
    copy_run(straight, folder, 3)
    damaged = next(checkpoint_folder(folder, 3).glob("ema_*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])

    def resumed(where: str) -> int:
        config = world.config(folder, run__resume=True, run__resume_from=where)
        return resumed_checkpoint(config, ALONE, contents_of(config)).position.iteration

    with pytest.raises(checkpoints.Damaged, match=r"ema_00000\.distcp has .* bytes.*undamaged"):
        resumed("latest")
    assert resumed("undamaged") == resumed("iteration_00000002") == 2


def test_what_saving_takes_from_the_loop_is_logged(straight):
    """With the iteration that follows."""
    found = [record.get("seconds/save") for record in training_records(straight)]
    assert found[0] is None
    assert all(seconds > 0 for seconds in found[1:])


def test_a_killed_run_repeats_nothing_in_its_metrics(straight, world, folder):
    copy_run(straight, folder, 3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "rewa')
    train_here(world.config(folder, run__resume=True, checkpoint__every=1, checkpoint__keep=0))
    assert without_times(records(folder)) == without_times(records(straight))
    assert_same_checkpoint(checkpoint_folder(folder, 4), checkpoint_folder(straight, 4))


def test_a_finished_run_resumed_changes_nothing(straight, world, folder):
    copy_run(straight, folder, 4)
    train_here(world.config(folder, run__resume=True))
    assert without_times(records(folder)) == without_times(records(straight))
    assert_same_checkpoint(checkpoint_folder(folder, 4), checkpoint_folder(straight, 4))


def test_pictures_of_what_a_run_does_again_are_not_kept(straight, world, folder):
    """Else those of the course that it left would be shown as its last."""
    copy_run(straight, folder, 3)
    for iteration in (0, 2, 9):
        (folder / "pictures" / f"iteration_{iteration:08d}").mkdir(parents=True)
    train_here(world.config(folder, run__resume=True))
    left = sorted(place.name for place in (folder / "pictures").iterdir())
    assert left == [f"iteration_{iteration:08d}" for iteration in (0, 2, 4)]


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_without_a_checkpoint_begins_anew_and_loses_nothing(world, folder, capsys, resume):
    """As where a run was killed before its first checkpoint, or its checkpoints were deleted."""
    old = {
        "metrics.jsonl": '{"iteration": 300, "validation/redness": 9.0}\n',
        "pictures/iteration_00000009/000.png": "a picture",
        "model/model_index.json": "{}",
        "config.json": "{}",
    }
    for number in (1, 2):
        for name, content in old.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        train_here(world.config(folder, **QUICK, run__resume=resume))
        assert not (folder / "pictures" / "iteration_00000009").exists()
        assert [r["iteration"] for r in records(folder)] == [0, 1, 1]
        assert f"are now in {folder / f'earlier_{number}'}" in capsys.readouterr().err
        for name, content in old.items():
            assert (folder / f"earlier_{number}" / name).read_text() == content


@pytest.mark.parametrize(
    ("name", "make"),
    [
        *(("metrics.jsonl", os.mkfifo), ("metrics.jsonl", os.mkdir), ("config.json", os.mkdir)),
        *(("config.json", os.mkfifo), ("wandb_id", os.mkfifo), ("report.html", os.mkdir)),
        *(("pictures", Path.touch), ("pictures", os.mkfifo), ("tensorboard", Path.touch)),
        *(("model", Path.touch), ("rewards.png", lambda path: path.symlink_to("/dev/zero"))),
    ],
)
def test_what_is_in_the_way_of_results_is_told_before_training(folder, name, make):
    folder.mkdir()
    make(folder / name)
    engine = mock.Mock(rank=0, settings={})
    config = Config(run=RunConfig(folder=str(folder)))
    with pytest.raises(ValueError, match=rf"{name} is not a .*; move it away, or .*--run\.folder"):
        prepare_folder(config, engine, mock.Mock(continues=True))
    assert [path.name for path in folder.iterdir()] == [name]


def test_checkpoints_that_are_a_file_are_told_before_training(world, folder):
    folder.mkdir()
    (folder / "checkpoints").write_text("not a folder")
    with pytest.raises(
        checkpoints.CheckpointError, match="checkpoints is not a folder that exists"
    ):
        train_here(world.config(folder, **QUICK))


@pytest.mark.parametrize("resume", [False, True])
def test_a_lost_pointer_does_not_begin_the_run_again_over_its_checkpoints(
    straight, world, folder, resume
):
    copy_run(straight, folder, 2)
    (folder / "checkpoints" / "latest").unlink()
    before = files_of(folder)
    with pytest.raises(checkpoints.CheckpointError, match=r"latest is missing.*from undamaged"):
        train_here(world.config(folder, run__resume=resume))
    assert files_of(folder) == before
    config = world.config(folder, run__resume=True, run__resume_from="undamaged")
    assert resumed_checkpoint(config, ALONE, contents_of(config)).position.iteration == 2


def test_resuming_where_nothing_was_saved_starts_from_the_beginning(world, folder):
    train_here(world.config(folder, **{**QUICK, "run__resume": True}))
    assert len(training_records(folder)) == 1


@pytest.mark.parametrize(
    ("number", "call", "saved_after"),
    [(signal.SIGTERM, 3, 1), (signal.SIGINT, 1, 0), (signal.SIGTERM, 4, 2)],
    ids=["SIGTERM in iteration 2", "Ctrl-C in the first validation", "SIGTERM in the second"],
)
def test_a_signal_saves_and_ends(straight, world, folder, number, call, saved_after):
    folder.mkdir()
    gate = Gate(folder, call)
    knobs = {"checkpoint__every": 1, "checkpoint__keep": 0}
    running = Command(world.arguments(folder, **knobs), folder, **gate.environment)
    gate.wait_until_reached(running)
    running.send_signal(number)
    gate.open()
    codes = running.wait()
    said = running.stdout + running.stderr
    assert codes == [128 + number], said
    complaints = [line for line in said.splitlines() if line.startswith("error")]
    assert len(complaints) == 1
    assert signal.Signals(number).name in complaints[0]
    assert f"iteration {saved_after}" in complaints[0]
    assert "--run.resume true" in complaints[0]
    assert "Traceback" not in said
    newest = checkpoints.latest(folder / "checkpoints")
    assert str(newest) in complaints[0]
    assert checkpoints.open_saved(newest).position.iteration == saved_after

    train_here(world.config(folder, run__resume=True, **knobs))
    assert_same_checkpoint(checkpoint_folder(folder, 4), checkpoint_folder(straight, 4))
    assert without_times(records(folder)) == without_times(records(straight))


def test_a_signal_is_heeded_between_micro_batches(world, folder, monkeypatch):
    """The next one is not sampled, and what is saved is the last whole iteration."""
    sampled = []

    def stopped(*arguments):
        *others, finished = arguments

        def and_stop(latents, rows):
            sampled.append(rows)
            os.kill(os.getpid(), signal.SIGTERM)
            finished(latents, rows)

        return rollout(*others, and_stop)

    monkeypatch.setattr("mixgrpo.trainer.rollout", stopped)
    config = world.config(folder, **QUICK, sampling__micro_batch=4, scoring__micro_batch=4)
    with pytest.raises(TrainingStopped, match="stopped by SIGTERM after iteration 0; saved"):
        train_here(config)
    assert sampled == [range(4)]
    assert checkpoint_folder(folder, 0).is_dir()


def test_a_second_ctrl_c_ends_at_once_but_a_signal_that_is_passed_on_counts_once(monkeypatch):
    clock = iter([100.0, 100.5, 110.0])
    monkeypatch.setattr("mixgrpo.run.stopping.monotonic", lambda: next(clock))
    stop = StopRequest()
    before = signal.getsignal(signal.SIGTERM)
    with stop.from_signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # half a second later: the same request
        signal.raise_signal(signal.SIGTERM)  # SLURM repeats it while the run saves
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


# ---- two processes


def test_two_processes_equal_one(straight, world, folder):
    """The same global batch in two halves: equal but for the rounding of other batch shapes.

    Tolerances: rewards 1e-5; weights 1e-5, a tenth of one optimizer step's 1e-4, of which Adam
    makes four whatever a gradient's size; and in all no more than 0.1% of the distance travelled.
    """
    torchrun = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [*torchrun, "-m", "mixgrpo", *world.arguments(folder, run__iterations=2)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for two, one in zip(records(folder), records(straight), strict=False):
        assert two["iteration"] == one["iteration"]
        for key in one:
            if key.startswith(("reward/", "validation/", "validation_ema/", "advantage/")):
                tolerance = 2e-2 if "jpeg" in key else 1e-5
                assert two[key] == pytest.approx(one[key], rel=tolerance, abs=1e-5), key
    start = dict(world.policy().module.named_parameters())
    one = saved_tensors(checkpoint_folder(straight, 2))
    two = saved_tensors(checkpoint_folder(folder, 2))
    assert one.keys() == two.keys() == start.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
    apart = sum((two[name] - one[name]).square().sum() for name in one).sqrt()
    travelled = sum((one[name] - start[name]).square().sum() for name in one).sqrt()
    assert 0 < apart < 1e-3 * travelled


# ---- not finite


class PoisonedFrom:
    """A velocity that turns to NaN from the n-th evaluation with gradients on."""

    def __init__(self, velocity, first: int) -> None:
        self.velocity, self.first, self.seen = velocity, first, 0

    def __call__(self, x, sigma, text):
        v = self.velocity(x, sigma, text)
        if not torch.is_grad_enabled():
            return v
        self.seen += 1
        return v * float("nan") if self.seen >= self.first else v


def test_a_non_finite_loss_stops_before_the_step(straight, world, folder, monkeypatch):
    # Window 2, 4 samples a step, 2 prompts: 2 + 4 = 6 evaluations, one pass of 8, so 2 passes an
    # iteration; the third belongs to iteration 2.
    plain = DiffusersPolicy.velocity
    monkeypatch.setattr(
        DiffusersPolicy, "velocity", lambda self, *given: PoisonedFrom(plain(self, *given), first=3)
    )
    with pytest.raises(TrainingStopped) as stopped:
        train_here(world.config(folder))
    message = str(stopped.value)
    assert stopped.value.exit_code == 1
    assert "iteration 2" in message
    assert "window [1, 3)" in message
    assert "gradient norm nan" in message
    assert "transitions" in message
    prompts = world.prompts.read_text().splitlines()
    assert any(prompt in message for prompt in prompts)
    assert "--run.resume true" in message
    newest = checkpoints.latest(folder / "checkpoints")
    assert newest is not None
    assert str(newest) in message
    assert_same_checkpoint(newest, checkpoint_folder(straight, 1))

    monkeypatch.setattr(DiffusersPolicy, "velocity", plain)
    train_here(world.config(folder, run__resume=True))
    assert_same_checkpoint(checkpoint_folder(folder, 4), checkpoint_folder(straight, 4))


def test_a_learning_rate_far_too_high_is_stopped(world, folder, monkeypatch):
    monkeypatch.setitem(BOUNDS, "update.learning_rate", "(0, 1e30]")
    config = world.config(folder, update__learning_rate=1e30, update__weight_decay=0.0)
    with pytest.raises(TrainingStopped, match=r"iteration 1, .*not finite at optimizer step 1"):
        train_here(config)
    saved = saved_tensors(checkpoints.latest(folder / "checkpoints"))
    assert all(weight.isfinite().all() for weight in saved.values())


# ---- rewards that fail


def test_samples_that_a_reward_cannot_score_leave_training_alone(world, folder):
    rewards = {**REWARDS, "holes": RewardConfig(kind="tiny_world:sometimes_nan")}
    config = world.config(folder, **QUICK, rewards=rewards)
    train_here(config)
    (record,) = training_records(folder)
    assert record["reward_failed/holes"] == 3
    assert record["reward_failed/redness"] == 0
    assert math.isfinite(record["update/loss"])
    assert record["update/grad_norm"] > 0
    saved = saved_tensors(checkpoints.latest(folder / "checkpoints"))
    assert all(weight.isfinite().all() for weight in saved.values())


def test_a_reward_that_never_works_is_one_error(world, folder):
    rewards = {"service": RewardConfig(kind="tiny_world:broken")}
    with pytest.raises(RewardError, match=r"'service'.*ConnectionError.*does not answer"):
        train_here(world.config(folder, **QUICK, rewards=rewards))
    assert not (folder / "checkpoints").exists()


def test_a_reward_that_fails_too_often_stops_and_loses_nothing(world, folder):
    rewards = {**REWARDS, "holes": RewardConfig(kind="tiny_world:sometimes_nan")}
    knobs = {**QUICK, "run__iterations": 2, "rewards": rewards}
    with pytest.raises(TrainingStopped, match=r"iteration 1: .*'holes' gave no score for 3 of 8"):
        train_here(world.config(folder, **knobs, scoring__max_failed=0.3))
    assert training_records(folder) == []
    train_here(world.config(folder, **knobs, run__resume=True))
    assert len(training_records(folder)) == 2


def test_metadata_of_the_prompts_reaches_the_rewards(world, folder, tmp_path):
    """In training and in validation, also where a prompt is there twice."""
    numbers = {}
    for name, texts in (("train", ["a", "b", "a", "c"]), ("validation", ["d", "e", "d"])):
        entries = [{"text": text, "prompt": text, "n": 2**n} for n, text in enumerate(texts)]
        numbers[name] = [entry["n"] for entry in entries]
        lines = [json.dumps(entry) for entry in entries]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    files = {
        "batch__prompts_file": str(tmp_path / "train.jsonl"),
        "validation__prompts_file": str(tmp_path / "validation.jsonl"),
    }
    rewards = {"redness": REWARDS["redness"], "told": RewardConfig("tiny_world:told")}
    knobs = {**QUICK, **files, "validation__prompts": 2, "scoring__micro_batch": 3}
    train_here(world.config(folder, **{**knobs, "run__iterations": 2}, rewards=rewards))
    found = [record["reward/told"] for record in training_records(folder)]
    assert sum(found) / 2 == sum(numbers["train"]) / 4  # an epoch of two iterations
    assert records(folder)[0]["validation/told"] == sum(numbers["validation"][:2]) / 2


def test_rewards_off_loaded_or_in_small_batches_train_the_same(straight, world, folder):
    config = world.config(folder, scoring__placement="offload", scoring__micro_batch=3)
    train_here(config)
    assert without_times(records(folder)) == without_times(records(straight))
    (first, *_) = training_records(folder)
    assert first["seconds/reward"] >= 0
    assert first["seconds/reward_hidden"] >= 0


def test_falling_held_out_rewards_are_warned_of(world, folder, capsys):
    """Redness is trained; its negative, which nobody trains on, falls as it rises."""
    rewards = {
        "redness": RewardConfig(kind="tiny_world:redness"),
        "paleness": RewardConfig(kind="tiny_world:paleness", weight=0),
    }
    knobs = {"run__iterations": 3, "validation__every": 1, "validation__patience": 1}
    train_here(world.config(folder, **knobs, rewards=rewards), summary=True)
    validations = [r["validation/redness"] for r in records(folder) if "validation/redness" in r]
    assert validations[-1] > validations[-2], "the run does not show what it is to show"
    said = capsys.readouterr().out
    assert "warning: the trained rewards rose over the last 1 validations" in said
    assert "paleness" in said.splitlines()[-1]


# ---- the reference policy


@pytest.fixture
def loaded(monkeypatch) -> Iterator[list[DiffusersPolicy]]:
    """The policies that runs load."""
    policies: list[DiffusersPolicy] = []
    load = DiffusersPolicy.load

    def remembered(*arguments, **knobs) -> DiffusersPolicy:
        policies.append(load(*arguments, **knobs))
        return policies[-1]

    monkeypatch.setattr(DiffusersPolicy, "load", remembered)
    yield policies


@pytest.mark.parametrize("train", ["lora", "full"])
def test_kl_to_the_reference_starts_at_zero(world, folder, loaded, train):
    knobs = {
        **QUICK,
        "run__iterations": 2,
        "model__train": train,
        "update__kl": 0.1,
        "update__optimizer_steps": 1,
        "update__learning_rate": 1e-3,
    }
    train_here(world.config(folder, **knobs))
    first, second = (record["update/kl"] for record in training_records(folder))
    assert first == 0
    assert 1e-9 < second < 1

    base = world.policy().module.state_dict()
    trained = loaded[0].module.state_dict()
    if train == "lora":
        frozen = {key.replace(".base_layer", ""): value for key, value in trained.items()
                  if "lora_" not in key}  # fmt: skip
        assert same(frozen, dict(base))
        adapters = saved_tensors(checkpoints.latest(folder / "checkpoints"))
        assert adapters
        assert all("lora_" in name for name in adapters)
    else:
        moved = [key for key in base if not torch.equal(base[key], trained[key])]
        assert len(moved) > len(base) / 2
        text = loaded[0].encode(["a red circle on a gray background"])
        x, sigma = torch.ones(1, 16, 64), torch.tensor([0.5])
        assert not any(p.requires_grad for p in loaded[0].pipeline.vae.parameters())
        expected = world.policy().velocity(world.policy().module)(x, sigma, text)
        now = loaded[0].velocity(loaded[0].module)(x, sigma, text)
        assert not torch.allclose(now, expected)


# ---- every way to sample and to place the window


def evaluations(start: int, kept: int, shared: bool = True) -> float:
    """Model evaluations per image: two prompts of four samples, ``kept`` steps in all."""
    return (2 * (start + 1) + 8 * (kept - start - 1)) / 8 if shared else float(kept)


VARIANTS = {
    "frozen, Flash tail": (
        {"window__strategy": "frozen", "window__start": 1, "tail__solver": "dpm",
         "tail__ratio": 0.4},
        evaluations(1, 3 + 1),  # two steps behind the window become round(0.8) = 1
    ),
    "DPM tail of order 3, heun": (
        {"sampling__steps": 8, "tail__solver": "dpm", "tail__order": 3, "tail__variant": "heun"},
        evaluations(0, 8),
    ),
    "random, dance": (
        {"window__strategy": "random", "run__seed": 714, "sampling__transition": "dance_sde",
         "sampling__eta": 0.3, "advantage__kind": "gdpo"},
        None,
    ),
    "decay, cps": (
        {"window__strategy": "decay", "window__min_iters": 1, "window__max_iters": 3,
         "sampling__transition": "cps", "sampling__log_ratio": "unscaled",
         "advantage__kind": "reward_sum"},
        evaluations(0, STEPS),
    ),
    "exp_decay, precise": (
        {"window__strategy": "exp_decay", "sampling__transition": "precise",
         "advantage__kind": "global_std", "window__envelope": (1, 4), "window__start": 1},
        evaluations(1, STEPS),
    ),
    "all, no shared noise": (
        {"window__strategy": "all", "sampling__shared_noise": False,
         "model__gradient_checkpointing": True},
        evaluations(0, STEPS, shared=False),
    ),
    "wrap, dynamic shift, warm-up": (
        {"window__at_end": "wrap", "sampling__shift": 0.0, "update__warmup": 3,
         "model__lora_targets": "attention", "sampling__micro_batch": 3,
         "sampling__decode_batch": 3, "update__micro_batch": 3},
        evaluations(0, STEPS),
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains(world, folder, variant):
    knobs, expected = VARIANTS[variant]
    train_here(world.config(folder, **{**QUICK, **knobs}))
    (record,) = training_records(folder)
    assert record["update/ratio_error_on_policy"] <= 1e-6
    assert record["update/grad_norm"] > 0
    assert record["update/ratio_deviation"] > 0
    if expected is not None:
        assert record["rollout/evaluations_per_image"] == pytest.approx(expected)


def test_half_precision_trains_and_keeps_float32_weights(world, folder):
    train_here(world.config(folder, **{**QUICK, "model__compute_dtype": "bfloat16"}))
    (record,) = training_records(folder)
    assert record["update/grad_norm"] > 0
    assert record["update/ratio_error_on_policy"] < 0.1
    saved = saved_tensors(checkpoints.latest(folder / "checkpoints"))
    assert {weight.dtype for weight in saved.values()} == {torch.float32}


def test_the_flash_recipe_is_a_recipe_of_knobs(world, folder):
    """MixGRPO-Flash: 2M midpoint, ratio 0.4; the first step of a frozen window is shared."""
    knobs = {**QUICK, "sampling__steps": 6, "tail__solver": "dpm", "tail__ratio": 0.4}
    train_here(world.config(folder, **knobs))
    (record,) = training_records(folder)
    # Window [0, 2), four steps behind it become two.
    assert record["rollout/evaluations_per_image"] == pytest.approx(evaluations(0, 4))


def test_saved_configuration_is_the_one_that_ran(straight, world):
    saved = checkpoints.open_saved(checkpoint_folder(straight, 4)).position.config
    expected = world.config(straight, checkpoint__every=1, checkpoint__keep=0)
    assert saved == {**flatten(expected), **contents_of(expected)}


def test_a_user_interrupt_closes_the_metrics_file(world, folder):
    """Whatever ends a run, its records are complete lines."""
    with (
        mock.patch.object(Trainer, "_after_iteration", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        train_here(world.config(folder, **QUICK))
    assert (folder / "metrics.jsonl").read_text().endswith("\n")
    assert len(training_records(folder)) == 1
