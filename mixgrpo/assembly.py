"""A run's parts, each made once from the configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from mixgrpo.config import Config
from mixgrpo.engines import Engine, Network
from mixgrpo.engines.data_parallel import DataParallel
from mixgrpo.engines.distributed import Process
from mixgrpo.engines.ema import Ema
from mixgrpo.engines.fsdp import FullySharded
from mixgrpo.engines.optimizer import make_optimizer
from mixgrpo.engines.zero import Zero
from mixgrpo.maths.dpm_solver import make_solver
from mixgrpo.maths.objective import make_kl
from mixgrpo.maths.schedule import Spacing, compressed_steps, flash_sigmas
from mixgrpo.maths.transitions import make_log_ratio, make_transition
from mixgrpo.maths.window import WindowSchedule
from mixgrpo.methods.grpo import Objective
from mixgrpo.models import Policy, Text
from mixgrpo.models.guidance import Guidance, Guides
from mixgrpo.models.spacing import spacing_of
from mixgrpo.noise import Noise
from mixgrpo.rewards import Reward, ScoreStream, build_reward
from mixgrpo.rollout import SamplingPlan
from mixgrpo.run.scorable import options_of
from mixgrpo.run.validation import Validator
from mixgrpo.text.negative import GuidedText, encoded_texts, negative_for
from mixgrpo.text.prompt_files import PromptList
from mixgrpo.text.prompts import PromptBatch, PromptBatches, read_prompts
from mixgrpo.text.stored import open_stored
from mixgrpo.types import TextEmbedding, Velocity, Window


@dataclass(frozen=True)
class Velocities:
    """The policy's velocity in each phase."""

    rollout: Velocity
    update: Velocity
    validation: Velocity


@dataclass(frozen=True)
class Parts:
    """The parts of a run that the training loop uses.

    Attributes:
        windows: the window of every iteration.
        batches: this process's prompts of every iteration.
        policy: the model, its text encoder and its decoder.
        trained_weights: number of weights that are trained.
        engine: trains the policy's network and communicates with the other processes.
        text: encodes prompts, with the negative prompts of guidance.
        velocities: the policy's velocity in each phase, evaluated through the engine.
        ema: the moving average of the trained weights; None if none is kept.
        rewards: the rewards that are trained on, by name.
        validator: samples the validation prompts and scores them by all rewards.
        objective: the objective of the update, with the initial weight of the KL.
        plan: makes the sampling plan of an iteration from its window.
        noise: makes the noise of a rollout from its prompts and iteration.
        score_stream: starts a thread that scores images by the trained rewards.
    """

    windows: WindowSchedule
    batches: PromptBatches
    policy: Policy
    trained_weights: int
    engine: Engine
    text: GuidedText
    velocities: Velocities
    ema: Ema | None
    rewards: dict[str, Reward]
    validator: Validator
    objective: Objective
    plan: Callable[[Window], SamplingPlan]
    noise: Callable[[PromptBatch, int], Noise]
    score_stream: Callable[[], ScoreStream]


@dataclass(frozen=True)
class Prompts:
    """The prompts of training and of validation."""

    training: PromptList
    validation: PromptList

    def all(self, negative: str | None) -> list[str]:
        """Every prompt that is encoded; see ``encoded_texts``."""
        return encoded_texts((self.training, self.validation), negative)

    @staticmethod
    def read(config: Config) -> Prompts:
        """Raises ValueError, FileNotFoundError: see ``read_prompts``."""
        training = read_prompts(config.batch.prompts_file, "batch.prompts_file")
        validation = read_prompts(config.validation.prompts_file, "validation.prompts_file")
        return Prompts(training, validation.first(config.validation.prompts))


def assemble(
    config: Config,
    process: Process,
    windows: WindowSchedule,
    prompts: Prompts,
    stored: Text | None,
    negative: str | None,
    progress: Callable[[str], None],
    beat: Callable[[], None],
) -> Parts:
    """Loads the rewards and the model, and builds the parts that depend on them.

    Args:
        stored: stored embeddings; None loads the text encoders.
        negative: the negative prompt of prompts that name none; None if no phase has guidance.
        progress: called with the name of each stage when it begins.
        beat: called at every evaluation of the policy.
    """
    guides = Guides.of(config.guidance)
    progress("loading the rewards")
    rewards = make_rewards(config, reward_device(config, process.device))
    trained_rewards = {n: r for n, r in rewards.items() if config.rewards[n].weight > 0}
    progress("loading the model")
    policy = make_policy(config, process.device, stored, process.world_size)
    trained_weights = sum(p.numel() for p in policy.module.parameters() if p.requires_grad)
    untrained = policy.untrained() if config.update.kl > 0 else None  # before an engine shards it
    engine = make_engine(config, process, policy)
    reference = None
    if config.update.kl > 0:
        reference = make_reference(policy, engine, untrained, guides.update)
    text = GuidedText(policy, negative)
    return Parts(
        windows=windows,
        batches=PromptBatches(
            prompts.training,
            config.batch.prompts,
            config.run.seed,
            process.rank,
            process.world_size,
        ),
        policy=policy,
        trained_weights=trained_weights,
        engine=engine,
        text=text,
        velocities=make_velocities(policy, engine, guides, beat),
        ema=make_ema(config, engine),
        rewards=trained_rewards,
        validator=Validator(
            config,
            policy,
            text,
            rewards,
            prompts.validation,
            spacing_for(config, config.validation.steps),
        ),
        objective=make_objective(config, reference),
        plan=partial(make_plan, config, spacing=spacing_for(config, config.sampling.steps)),
        noise=partial(make_noise, config, policy.latent_shape, process.device),
        score_stream=partial(
            ScoreStream,
            trained_rewards,
            config.scoring.micro_batch,
            reward_device(config, process.device, while_scoring=True),
        ),
    )


def make_policy(
    config: Config, device: torch.device, stored: Text | None = None, world_size: int = 1
) -> Policy:
    """Loads the policy of the configured family; ``stored`` embeddings replace its text encoders.

    What an engine of several processes will shard is not loaded: none of them ever holds it all.

    Raises:
        FileNotFoundError: a part of it is missing.
    """
    kind, knobs = engine_kind(config, world_size), config.engine
    empty = kind == "fsdp" or (kind == "deepspeed" and knobs.zero_stage == 3)
    from mixgrpo.models.policy import DiffusersPolicy  # imports diffusers, which takes seconds

    return DiffusersPolicy.load(
        config.model, device, config.run.seed, config.text.placement, stored, empty
    )


def engine_kind(config: Config, world_size: int) -> str:
    """The engine that is used: single, ddp, fsdp or deepspeed."""
    if world_size == 1:
        return "single"
    return "ddp" if config.engine.kind == "auto" else config.engine.kind


def make_engine(config: Config, process: Process, policy: Policy) -> Engine:
    """The engine, which holds the policy's network from now on."""
    kind = engine_kind(config, process.world_size)
    optimizer = partial(make_optimizer, config)
    network = network_of(policy, policy.module)
    if kind == "fsdp":
        return FullySharded(network, config.engine, process.device, optimizer)
    if kind == "deepspeed":
        return Zero(network, config.engine, process.device, optimizer)
    return DataParallel(policy.module, process.device, optimizer)


def network_of(policy: Policy, module: torch.nn.Module) -> Network:
    """Describes the policy's network, or a copy of it, to an engine."""
    return Network(module, policy.blocks(module), policy.compute_dtype, policy.stored)


def watched(velocity: Velocity, beat: Callable[[], None]) -> Velocity:
    """The velocity, which tells that the process is alive: an update or a validation of a large
    model on few GPUs can take longer than a watchdog waits."""

    def evaluate(x: Tensor, sigma: Tensor, text: TextEmbedding) -> Tensor:
        beat()
        return velocity(x, sigma, text)

    return evaluate


def make_negative(config: Config) -> str | None:
    """The negative prompt of prompts that name none; None if no phase has guidance.

    Raises:
        FileNotFoundError: there is no model folder.
        ValueError: the family is unknown, or has no classifier-free guidance.
    """
    knobs = config.guidance
    names = ("scale", "update_scale", "validation_scale")
    scales = {f"guidance.{name}": getattr(knobs, name) for name in names}
    return negative_for(config.model, scales, knobs.negative_prompt)


def make_velocities(
    policy: Policy, engine: Engine, guides: Guides, beat: Callable[[], None]
) -> Velocities:
    """The policy's velocity in each phase, through the engine; each evaluation calls ``beat``."""
    rollout, update, validation = (
        watched(policy.velocity(engine.module, guidance), beat)
        for guidance in (guides.rollout, guides.update, guides.validation)
    )
    return Velocities(rollout, update, validation)


def make_reference(
    policy: Policy, engine: Engine, untrained: torch.nn.Module | None, guidance: Guidance
) -> Velocity:
    """The velocity of the reference policy: of the copy ``untrained`` or, if that is None, of the
    trained network with its adapters switched off."""
    if untrained is None:
        return policy.without_adapters(engine.module, guidance)
    return policy.velocity(engine.place(network_of(policy, untrained)), guidance)


def make_ema(config: Config, engine: Engine) -> Ema | None:
    """The moving average of the trained weights; None if none is kept."""
    if not config.ema.decay:
        return None
    on_cpu = config.ema.placement == "cpu"
    return Ema(engine.shards, config.ema.decay, engine.refresh, on_cpu)


def make_stored_text(config: Config, prompts: list[str], device: torch.device) -> Text | None:
    """Opens the stored embeddings of these prompts; None if prompts are encoded online.

    Raises:
        FileNotFoundError, ValueError: see ``open_stored``.
    """
    if config.text.mode == "online":
        return None
    from mixgrpo.models.text import TextEncoders  # imports diffusers, which takes seconds

    encoder = TextEncoders.identify(config.model)
    return open_stored(config, encoder, prompts, device)


def make_windows(config: Config) -> WindowSchedule:
    """The window schedule. Raises ValueError if a window does not fit into the steps."""
    knobs = asdict(config.window)
    if knobs["envelope"] is not None:
        knobs["envelope"] = tuple(knobs["envelope"])
    if knobs["seed"] is None:
        knobs["seed"] = config.run.seed
    return WindowSchedule(steps=config.sampling.steps, **knobs)


def make_plan(config: Config, window: Window, spacing: Spacing | None = None) -> SamplingPlan:
    """The sampling plan of an iteration whose window is ``window``.

    Args:
        spacing: of the steps, where it is known already.
    """
    sampling, prefix, tail = config.sampling, config.prefix, config.tail
    spacing = spacing or spacing_for(config, sampling.steps)
    sigmas = flash_sigmas(sampling.steps, spacing, window, tail.ratio, prefix.ratio)
    start = compressed_steps(window.start, prefix.ratio)
    return SamplingPlan(
        sigmas=sigmas,
        window=Window(start, start + window.size),
        transition=make_transition(sampling.transition, sampling.eta),
        solver=partial(make_solver, tail.solver, sigmas, tail.order, tail.variant),
        prefix=partial(make_solver, prefix.solver, sigmas, prefix.order, prefix.variant),
        passes=Guides.of(config.guidance).rollout.passes,
    )


def spacing_for(config: Config, steps: int) -> Spacing:
    """The spacing of this number of steps; see ``spacing_of``."""
    return spacing_of(config.model, config.sampling.shift, steps)


def make_rewards(config: Config, device: torch.device) -> dict[str, Reward]:
    """Loads every reward of the recipe, including held-out ones; returns them by name."""
    rewards = {}
    for name, knobs in config.rewards.items():
        try:
            rewards[name] = build_reward(knobs.kind, options_of(knobs), device)
        except (ValueError, FileNotFoundError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"rewards.{name}: {error}") from error
    return rewards


def reward_device(
    config: Config, device: torch.device, while_scoring: bool = False
) -> torch.device:
    """The device of the reward models; with placement offload it differs while they score."""
    away = {"cpu"} if while_scoring else {"cpu", "offload"}
    return torch.device("cpu") if config.scoring.placement in away else device


def make_noise(
    config: Config,
    shape: tuple[int, int],
    device: torch.device,
    prompts: PromptBatch,
    iteration: int,
) -> Noise:
    """The noise of an iteration's rollout, for latents of shape (S, C)."""
    return Noise(
        seed=config.run.seed,
        iteration=iteration,
        prompts=prompts.positions,
        samples=config.batch.samples,
        shape=shape,
        shared=config.sampling.shared_noise,
        device=device,
    )


def make_objective(config: Config, reference: Velocity | None) -> Objective:
    """The objective of the update."""
    return Objective(
        transition=make_transition(config.sampling.transition, config.sampling.eta),
        log_ratio=make_log_ratio(config.sampling.log_ratio),
        clip=config.update.clip,
        kl=config.update.kl,
        reference=reference,
        kl_form=make_kl(config.update.kl_form),
        passes=Guides.of(config.guidance).update.passes,
    )
