"""From a configuration to the parts of a run."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from mixgrpo import checkpoint as checkpoints
from mixgrpo.checkpoint import Position, Saved
from mixgrpo.checks import check_resumable
from mixgrpo.config import Config
from mixgrpo.engines import Engine, Network
from mixgrpo.engines.adamw import FrugalAdamW
from mixgrpo.engines.data_parallel import DataParallel
from mixgrpo.engines.distributed import Process
from mixgrpo.engines.fsdp import FullySharded
from mixgrpo.engines.zero import Zero
from mixgrpo.maths.dpm_solver import make_solver
from mixgrpo.maths.objective import make_kl
from mixgrpo.maths.schedule import compressed_steps, dynamic_shift, flash_sigmas
from mixgrpo.maths.transitions import make_log_ratio, make_transition
from mixgrpo.maths.window import WindowSchedule
from mixgrpo.methods.grpo import Objective
from mixgrpo.models import Policy, Text
from mixgrpo.models.registry import ENCODERS, FAMILIES
from mixgrpo.noise import Noise
from mixgrpo.rewards import Reward, build_reward
from mixgrpo.rollout import SamplingPlan
from mixgrpo.text.prompts import PromptBatch
from mixgrpo.text.stored import open_stored
from mixgrpo.types import Velocity, Window


def make_policy(
    config: Config, device: torch.device, stored: Text | None = None, world_size: int = 1
) -> Policy:
    """The model of the wanted family, loaded; ``stored`` embeddings replace its text encoders.

    What an engine of several processes will shard is not loaded: none of them ever holds it all.

    Raises:
        FileNotFoundError: a part of it is missing.
    """
    kind, knobs = engine_kind(config, world_size), config.engine
    empty = kind == "fsdp" or (kind == "deepspeed" and knobs.zero_stage == 3)
    return FAMILIES[config.model.family].load(
        config.model, device, config.run.seed, config.text.placement, stored, empty
    )


def engine_kind(config: Config, world_size: int) -> str:
    """single, ddp, fsdp or deepspeed."""
    if world_size == 1:
        return "single"
    return "ddp" if config.engine.kind == "auto" else config.engine.kind


def make_engine(config: Config, process: Process, policy: Policy) -> Engine:
    """What trains the policy's network."""
    kind = engine_kind(config, process.world_size)
    optimizer = partial(make_optimizer, config)
    network = network_of(policy, policy.module)
    if kind == "fsdp":
        return FullySharded(network, config.engine, process.device, optimizer)
    if kind == "deepspeed":
        return Zero(network, config.engine, process.device, optimizer)
    return DataParallel(policy.module, process.device, optimizer)


def network_of(policy: Policy, module: torch.nn.Module) -> Network:
    """The policy's network, or a copy of it, as engines take it."""
    return Network(module, policy.blocks(module), policy.compute_dtype, policy.stored)


def make_reference(policy: Policy, engine: Engine, untrained: torch.nn.Module | None) -> Velocity:
    """The velocity of the untrained model, of which ``untrained`` is the copy, if there is one."""
    if untrained is None:
        return policy.without_adapters(engine.module)
    return policy.velocity(engine.place(network_of(policy, untrained)))


def make_stored_text(config: Config, prompts: list[str], device: torch.device) -> Text | None:
    """The stored embeddings, checked to hold these prompts; None if prompts are encoded online.

    Raises:
        FileNotFoundError, ValueError: see ``open_stored``.
    """
    if config.text.mode == "online":
        return None
    encoder = ENCODERS[config.model.family].identify(config.model)
    return open_stored(config, encoder, prompts, device)


def make_windows(config: Config) -> WindowSchedule:
    """The window of every iteration. Raises ValueError if it does not fit the steps."""
    knobs = asdict(config.window)
    if knobs["envelope"] is not None:
        knobs["envelope"] = tuple(knobs["envelope"])
    if knobs["seed"] is None:
        knobs["seed"] = config.run.seed
    return WindowSchedule(steps=config.sampling.steps, **knobs)


def make_plan(config: Config, window: Window) -> SamplingPlan:
    """The sampling of an iteration whose window is ``window``."""
    sampling, prefix, tail = config.sampling, config.prefix, config.tail
    sigmas = flash_sigmas(sampling.steps, shift_for(config), window, tail.ratio, prefix.ratio)
    start = compressed_steps(window.start, prefix.ratio)
    return SamplingPlan(
        sigmas=sigmas,
        window=Window(start, start + window.size),
        transition=make_transition(sampling.transition, sampling.eta),
        solver=partial(make_solver, tail.solver, sigmas, tail.order, tail.variant),
        prefix=partial(make_solver, prefix.solver, sigmas, prefix.order, prefix.variant),
    )


def shift_for(config: Config) -> float:
    """The time shift; where the knob is 0, FLUX's own for the picture's size."""
    tokens = (config.model.height // 16) * (config.model.width // 16)
    return config.sampling.shift or dynamic_shift(tokens)


def make_rewards(config: Config, device: torch.device) -> dict[str, Reward]:
    """Every reward of the recipe by its name, held-out ones included."""
    rewards = {}
    for name, knobs in config.rewards.items():
        given = {key: getattr(knobs, key) for key in ("model", "checkpoint")}
        options = {key: value for key, value in given.items() if value is not None}
        try:
            rewards[name] = build_reward(knobs.kind, {**options, **knobs.options}, device)
        except (ValueError, FileNotFoundError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"rewards.{name}: {error}") from error
    return rewards


def reward_device(
    config: Config, device: torch.device, while_scoring: bool = False
) -> torch.device:
    """Where the reward models are: with placement offload, on the device only to score."""
    away = {"cpu"} if while_scoring else {"cpu", "offload"}
    return torch.device("cpu") if config.scoring.placement in away else device


def make_optimizer(
    config: Config, parameters: list[torch.nn.Parameter]
) -> tuple[Optimizer, LRScheduler]:
    """AdamW, torch's own where it can be, and its linear warm-up."""
    knobs = config.update
    betas = (knobs.betas[0], knobs.betas[1])
    optimizer: Optimizer
    if knobs.optimizer == "adamw" and config.model.weights == "float32":
        optimizer = torch.optim.AdamW(
            parameters,
            lr=knobs.learning_rate,
            betas=betas,
            weight_decay=knobs.weight_decay,
            fused=parameters[0].device.type == "cuda",
        )
    else:
        eight_bit = knobs.optimizer == "adamw_8bit"
        optimizer = FrugalAdamW(
            parameters, knobs.learning_rate, betas, knobs.weight_decay, eight_bit, config.run.seed
        )
    warmup = max(1, knobs.warmup)
    return optimizer, LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))


def make_noise(
    config: Config,
    prompts: PromptBatch,
    iteration: int,
    shape: tuple[int, int],
    device: torch.device,
) -> Noise:
    """The noise of an iteration's rollout."""
    return Noise(
        seed=config.run.seed,
        iteration=iteration,
        prompts=prompts.positions,
        samples=config.batch.samples,
        shape=shape,
        shared=config.sampling.shared_noise,
        device=device,
    )


def make_objective(config: Config, reference: Velocity | None, kl: float) -> Objective:
    """What the update optimises; ``kl`` is the KL's present weight."""
    return Objective(
        transition=make_transition(config.sampling.transition, config.sampling.eta),
        log_ratio=make_log_ratio(config.sampling.log_ratio),
        clip=config.update.clip,
        kl=kl,
        reference=reference,
        kl_form=make_kl(config.update.kl_form),
    )


def checkpoints_root(config: Config) -> Path:
    """Where a run's checkpoints are."""
    return Path(config.run.folder) / "checkpoints"


def prompt_digests(config: Config) -> dict[str, str]:
    """What tells the prompt files' contents, by ``contents.`` and the knob that names the file."""
    files = {
        "batch.prompts_file": config.batch.prompts_file,
        "validation.prompts_file": config.validation.prompts_file,
    }
    return {
        f"contents.{knob}": hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()
        for knob, file in files.items()
        if Path(file).is_file()
    }


def resumed_checkpoint(config: Config, process: Process) -> Saved | None:
    """The checkpoint to continue from, checked against the recipe; None to start afresh."""
    root = checkpoints_root(config)
    if not config.run.resume:
        newest = checkpoints.latest(root)
        if newest is not None:
            raise ValueError(
                f"{config.run.folder!r} holds a run already (newest checkpoint {newest.name}); "
                "continue it with --run.resume true, or choose another --run.folder"
            )
        return None
    saved = checkpoints.choose(process, root, config.run.resume_from)
    if saved is None:
        return None
    position = saved.position
    check_same_run(position, config)
    if position.iteration > config.run.iterations:
        raise ValueError(
            f"the checkpoint {saved.path} has {position.iteration} iterations, run.iterations is "
            f"{config.run.iterations}; raise --run.iterations"
        )
    return saved


def check_same_run(position: Position, config: Config) -> None:
    """Whether a run of these knobs is the one that was there, uninterrupted.

    Raises:
        ValueError: a knob, or what a prompt file holds, has changed since.
    """
    check_resumable(position.config, config)
    for key, digest in prompt_digests(config).items():
        if position.config.get(key, digest) != digest:
            knob = key.removeprefix("contents.")
            raise ValueError(
                f"the file of {knob} has other contents than when this run began, and a resumed "
                "run must be the run uninterrupted; put the old ones back, or train into another "
                "--run.folder"
            )
