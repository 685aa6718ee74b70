"""The training loop: rollout, rewards, advantages, update, log, checkpoint."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixgrpo import checkpoint as checkpoints
from mixgrpo.assembly import (
    checkpoints_root,
    make_engine,
    make_noise,
    make_objective,
    make_plan,
    make_policy,
    make_reference,
    make_rewards,
    make_stored_text,
    make_windows,
    prompt_digests,
    resumed_checkpoint,
    reward_device,
    shift_for,
)
from mixgrpo.checkpoint import Position, Saved, Saver, Shards
from mixgrpo.checks import check
from mixgrpo.config import Config, flatten
from mixgrpo.engines.distributed import Process, process_group
from mixgrpo.engines.ema import Ema
from mixgrpo.files.disk import own_folder
from mixgrpo.files.revision import git_revision
from mixgrpo.maths.advantages import group_advantages
from mixgrpo.maths.emphasis import balanced
from mixgrpo.maths.objective import adapted_kl_weight
from mixgrpo.maths.window import WindowSchedule
from mixgrpo.methods.emphasis import emphasize
from mixgrpo.methods.grpo import NonFiniteUpdate, update
from mixgrpo.models import Policy
from mixgrpo.models.export import export
from mixgrpo.planning.memory import OutOfMemory, explain_training, memory_of
from mixgrpo.rewards import (
    Reward,
    RewardError,
    ScoreStream,
    Scoring,
    check_failures,
    resident,
)
from mixgrpo.rollout import rollout
from mixgrpo.run.hacking import hacking_warning
from mixgrpo.run.stopping import SamplingStopped, StopRequest, TrainingStopped
from mixgrpo.run.tracking import Phases, Tracker, is_validation, read_metrics
from mixgrpo.run.validation import Validation, Validator
from mixgrpo.run.watchdog import Watchdog
from mixgrpo.text.prompts import PromptBatches, read_prompts
from mixgrpo.types import Scores, Trajectory, Window


def train(config: Config) -> Path:
    """Runs a training from start (or its newest checkpoint) to end; returns the run's folder.

    Raises:
        ValueError, FileNotFoundError: something that the user can mend, before training starts.
        TrainingStopped: a signal, a non-finite loss or a failing reward ended it.
        CheckpointError: a checkpoint could not be written or read.
        OutOfMemory: the GPU is too small.
    """
    with (
        process_group(config.run.threads) as process,
        _explained(config, process),
        Watchdog(config.run.patience, process) as watchdog,
    ):
        check(config, process.world_size)
        windows = make_windows(config)
        resumed = resumed_checkpoint(config, process)
        prompts = read_prompts(config.batch.prompts_file, "batch.prompts_file")
        validation_prompts = read_prompts(
            config.validation.prompts_file, "validation.prompts_file"
        )[: config.validation.prompts or None]
        stored = make_stored_text(config, prompts + validation_prompts, process.device)
        with process.first(own_folder(config.run.folder, "run.folder")):
            watchdog.progress("loading the rewards")
            rewards = make_rewards(config, reward_device(config, process.device))
            watchdog.progress("loading the model")
            policy = make_policy(config, process.device, stored, process.world_size)
            trainer = Trainer(
                config, process, watchdog, windows, policy, rewards, prompts, validation_prompts
            )
            if resumed is not None:
                watchdog.progress("reading the checkpoint")
                trainer.restore(resumed)
            trainer.run()
    return Path(config.run.folder)


@contextlib.contextmanager
def _explained(config: Config, process: Process) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        there, per_node = memory_of(process.device), max(1, torch.cuda.device_count())
        said = explain_training(config, there, process.world_size, per_node)
        raise OutOfMemory(said) from error


@dataclass(frozen=True)
class Batch:
    """The rollout's pictures and their scores, as far as this process sampled them."""

    trajectory: Trajectory
    texts: list[str]
    scoring: Scoring


class Trainer:
    """One run's parts, and the loop over them."""

    def __init__(
        self,
        config: Config,
        process: Process,
        watchdog: Watchdog,
        windows: WindowSchedule,
        policy: Policy,
        rewards: dict[str, Reward],
        prompts: list[str],
        validation_prompts: list[str],
    ) -> None:
        self.config = config
        self.folder = Path(config.run.folder)
        self.windows = windows
        self.policy = policy
        self.trained_rewards = {n: r for n, r in rewards.items() if config.rewards[n].weight > 0}
        self.batches = PromptBatches(
            prompts, config.batch.prompts, config.run.seed, process.rank, process.world_size
        )
        self.trained = sum(p.numel() for p in policy.module.parameters() if p.requires_grad)
        untrained = policy.untrained() if config.update.kl > 0 else None
        self.engine = engine = make_engine(config, process, policy)
        self.velocity = policy.velocity(engine.module)
        self.reference = make_reference(policy, engine, untrained) if config.update.kl > 0 else None
        self.kl_weight = config.update.kl
        on_cpu = config.ema.placement == "cpu"
        self.ema = (
            Ema(engine.shards, config.ema.decay, engine.refresh, on_cpu)
            if config.ema.decay
            else None
        )
        self.validator = Validator(config, policy, rewards, validation_prompts, shift_for(config))
        self.saver = Saver(
            process,
            checkpoints_root(config),
            config.checkpoint.keep,
            config.checkpoint.asynchronous,
        )
        self.resumed: Path | None = None  # the checkpoint that this continues from
        self.watchdog = watchdog
        self.phases = Phases(process.device, watchdog.progress)
        self.iteration = 0  # iterations done
        self.contents = prompt_digests(config)  # at the beginning: files may change meanwhile
        self.stop = StopRequest()

    def run(self) -> None:
        """Trains from the present position to the last iteration."""
        with self.stop.from_signals():
            self._prepare_folder()
            self.tracker = Tracker(self.config, self.folder, self.iteration, self.engine.rank == 0)
            try:
                self._tell_start()
                if self._lacks_validation():
                    self._validate()
                while self.iteration < self.config.run.iterations:
                    self._iterate()
                    self._after_iteration()
                self._finish()
            finally:
                self.tracker.close()

    def _iterate(self) -> None:
        """One iteration, as the design's sentence."""
        window = self.windows.at(self.iteration)
        try:
            batch = self._sample(window)
        except SamplingStopped:
            self._stop_if_asked()  # saves, out of all that sampling keeps open
            raise
        self._stop_if_asked()
        scores = self._gather(batch.scoring)
        advantages = self._advantages(scores)
        metrics = self._update(window, batch, advantages)
        self.iteration += 1
        if self.ema and self.iteration % self.config.ema.every == 0:
            self.ema.update()
        self._log(window, batch, scores, advantages, metrics)

    def _sample(self, window: Window) -> Batch:
        """Rollout of this process's prompts; pictures are scored while others are sampled."""
        config = self.config
        prompts = self.batches.at(self.iteration)
        with self.phases("text"):
            text = self.policy.encode(prompts.texts)
        noise = make_noise(
            config, prompts, self.iteration, self.policy.latent_shape, self.engine.device
        )
        texts = [text for text in prompts.texts for _ in range(config.batch.samples)]
        with resident(self.trained_rewards, config.scoring.placement, self.engine.device):
            stream = self._score_stream()

            def decode_and_score(latents: Tensor, rows: range) -> None:
                with self.phases("decode"):
                    parts = latents.split(config.sampling.decode_batch)
                    images = torch.cat([self.policy.decode(part) for part in parts])
                stream.submit(images, texts[rows.start : rows.stop])
                if self._is_asked_to_stop():
                    raise SamplingStopped

            with self.phases("rollout"), stream.given_up_on_error():
                plan, size = make_plan(config, window), config.sampling.micro_batch
                with self.engine.gathered():
                    trajectory = rollout(self.velocity, text, plan, noise, size, decode_and_score)
            with self.phases("reward"):
                scoring = stream.result()
        self.phases.add("reward_hidden", stream.hidden)
        return Batch(trajectory, prompts.texts, scoring)

    def _score_stream(self) -> ScoreStream:
        device = reward_device(self.config, self.engine.device, while_scoring=True)
        return ScoreStream(self.trained_rewards, self.config.scoring.micro_batch, device)

    def _gather(self, scoring: Scoring) -> Scores:
        """[world*B] scores of every process, on every process the same."""
        local = {name: values.to(self.engine.device) for name, values in scoring.scores.items()}
        scores = {name: self.engine.gather(values) for name, values in local.items()}
        try:
            check_failures(Scoring(scores, scoring.causes), self.config.scoring.max_failed)
        except RewardError as error:
            path = self._save_now()
            raise TrainingStopped(
                f"iteration {self.iteration + 1}: {error}; saved {path}; mend the reward or raise "
                "--scoring.max_failed, then continue with --run.resume true",
                exit_code=1,
            ) from error
        return scores

    def _advantages(self, scores: Scores) -> Tensor:
        """[world*B] advantages over the global batch, on every rank the same."""
        knobs = self.config.advantage
        weights = {name: self.config.rewards[name].weight for name in scores}
        count = self.config.batch.prompts * self.config.batch.samples
        group = torch.arange(count, device=self.engine.device) // self.config.batch.samples
        advantages = group_advantages(scores, group, weights, knobs.kind, knobs.clip, knobs.trim)
        return balanced(advantages) if knobs.balance else advantages

    def _update(self, window: Window, batch: Batch, advantages: Tensor) -> dict[str, Tensor]:
        knobs = self.config.update
        trajectory, mine, emphasis = emphasize(
            self.config,
            self.iteration,
            window,
            batch.trajectory,
            advantages,
            self.engine.rank,
            self.engine.world_size,
        )
        objective = make_objective(self.config, self.reference, self.kl_weight)
        try:
            with self.phases("update"):
                metrics = update(
                    self.engine, self.velocity, trajectory, mine, objective, knobs, emphasis
                )
        except NonFiniteUpdate as error:
            # After the first optimizer step the weights are between two iterations, and it may be
            # that step which broke them: an older checkpoint is better, if there is one.
            root = checkpoints_root(self.config)
            self.saver.wait()
            if error.optimizer_step == 0 or checkpoints.latest(root) is None:
                self._save_now()
            newest = checkpoints.latest(root)
            raise TrainingStopped(
                f"iteration {self.iteration + 1}, window {window}: {error}; this "
                f"process's prompts: {batch.texts}; the optimizer step was not taken; the newest "
                f"checkpoint is {newest}; lower --update.learning_rate or --update.max_grad_norm "
                "and train into another --run.folder, or continue with --run.resume true",
                exit_code=1,
            ) from error
        metrics["evaluations_per_image"] *= len(trajectory) / len(batch.trajectory)
        return metrics

    # ---- after an iteration

    def _after_iteration(self) -> None:
        config = self.config
        last = self.iteration == config.run.iterations
        if self.saver.under_way:
            with self.phases("save"):
                self.saver.poll()
        if not last:
            self._stop_if_asked()  # whoever asked will not wait for a validation
        if config.validation.every and self.iteration % config.validation.every == 0 and not last:
            self._validate()
        if last:
            self._save_now()
        elif config.checkpoint.every and self.iteration % config.checkpoint.every == 0:
            self._save()
        if not last:
            self._stop_if_asked()

    def _log(
        self,
        window: Window,
        batch: Batch,
        scores: Scores,
        advantages: Tensor,
        metrics: dict[str, Tensor],
    ) -> None:
        """One reduction over the processes, one record."""
        names = list(metrics)
        local = torch.stack([metrics[name].float().to(self.engine.device) for name in names])
        reduced = self.engine.gather(local[None])
        record = dict(zip((f"update/{n}" for n in names), reduced.mean(0).tolist(), strict=True))
        worst = names.index("ratio_error_on_policy")
        record["update/ratio_error_on_policy"] = reduced[:, worst].max().item()
        self._adapt_kl(record)
        for name, values in scores.items():
            record[f"reward/{name}"] = values.nanmean().item()
            record[f"reward_failed/{name}"] = values.isnan().sum().item()
        record["advantage/deviation"] = advantages[~advantages.isnan()].std().item()
        record["rollout/evaluations_per_image"] = batch.trajectory.evaluations_per_image
        record["window/start"], record["window/stop"] = window.start, window.stop
        seconds = self.phases.take()
        record.update({f"seconds/{name}": value for name, value in seconds.items()})
        self.tracker.log(self.iteration, record)
        rewards = " ".join(f"{name} {values.nanmean():.3f}" for name, values in scores.items())
        phases = " ".join(f"{name} {value:.2f}s" for name, value in seconds.items())
        self.tracker.advance(f"window {window} | {rewards} | {phases}")

    def _adapt_kl(self, record: dict[str, float]) -> None:
        """The KL's weight for the next iteration, from every process's KL."""
        first, target = self.config.update.kl, self.config.update.kl_target
        if target:
            record["update/kl_weight"] = self.kl_weight
            self.kl_weight = adapted_kl_weight(self.kl_weight, record["update/kl"], target, first)

    def _lacks_validation(self) -> bool:
        """Whether the present weights were to be validated, and a stop came between."""
        every, done = self.config.validation.every, self.iteration
        if done == 0:
            return self.config.validation.before
        if not every or done % every or done == self.config.run.iterations:
            return False
        records = read_metrics(self.folder) if self.tracker.active else []
        found = any(record["iteration"] == done and is_validation(record) for record in records)
        return self.engine.any(self.tracker.active and not found)

    def _validate(self) -> None:
        """Scores the fixed prompts, with and without the average; logs and keeps pictures."""
        try:
            plain, average = self._validated()
        except SamplingStopped:
            self._stop_if_asked()
            raise
        record = {f"validation/{name}": value for name, value in plain.means.items()}
        if average:
            record |= {f"validation_ema/{name}": value for name, value in average.means.items()}
        record |= {f"seconds/{name}": value for name, value in self.phases.take().items()}
        self.tracker.log(self.iteration, record)
        self._watch()
        if self.engine.rank == 0:
            plain.save_pictures(self.folder / "pictures" / f"iteration_{self.iteration:08d}")
            self.tracker.pictures(self.iteration, plain.pictures, plain.prompts)

    def _validated(self) -> tuple[Validation, Validation | None]:
        """By the weights, and by their average if there is one."""
        rewards, placement = self.validator.rewards, self.config.scoring.placement
        with self.phases("validation"), resident(rewards, placement, self.engine.device):
            with self.engine.gathered():
                plain = self.validator(self.engine, self.velocity, self._is_asked_to_stop)
            if not self.ema or self.iteration == 0:
                return plain, None
            with self.ema.swapped(), self.engine.gathered():
                return plain, self.validator(self.engine, self.velocity, self._is_asked_to_stop)

    def _watch(self) -> None:
        """Warns of reward hacking."""
        weights = {name: knobs.weight for name, knobs in self.config.rewards.items()}
        history = read_metrics(self.folder) if self.tracker.active else []
        warning = hacking_warning(history, weights, self.config.validation.patience)
        if warning:
            self.tracker.warn("reward hacking", warning)

    def _finish(self) -> None:
        self._validate()
        checkpoint = self.saver.wait() or self.resumed
        if self.engine.rank == 0 and checkpoint is not None:
            from mixgrpo.report.summary import summarize

            self.watchdog.progress("exporting")
            export(checkpoint, self.folder / "model")
            self.tracker.say(summarize(self.folder, self.config))
        self.engine.barrier()

    # ---- saving and stopping

    def _save(self) -> None:
        """Writes a checkpoint; asynchronously, it is whole after some iterations."""
        position = Position(
            iteration=self.iteration,
            ema_updates=self.ema.updates if self.ema else 0,
            config={**flatten(self.config), **self.contents},
            kl_weight=self.kl_weight,
        )
        with self.phases("save"):
            # The average comes first: it is where the weights are while it is copied.
            self.saver.save({**self._average(), **self.engine.state()}, position)

    def _save_now(self) -> Path:
        """Lets a checkpoint of the present weights be whole; returns its path."""
        if not self.saver.has(self.iteration):
            self._save()
        with self.phases("save"):
            path = self.saver.wait()
        assert path is not None
        return path

    def _average(self) -> dict[str, Any]:
        if not self.ema:
            return {}
        with self.ema.swapped():
            return self.saver.copy({"ema": self.engine.weights()})

    def restore(self, saved: Saved) -> None:
        """Continues from a checkpoint of this same recipe."""
        shards, group = Shards(saved.path), self.saver.group
        self.engine.restore(lambda state: shards.read(state, group))
        if self.ema:
            with self.ema.swapped():
                self.engine.load_weights(lambda weights: shards.read({"ema": weights}, group))
            self.ema.updates = saved.position.ema_updates
        self.kl_weight = saved.position.kl_weight
        self.iteration = saved.position.iteration
        self.resumed = saved.path

    def _is_asked_to_stop(self) -> bool:
        """Asked by all processes together."""
        return self.engine.any(self.stop.signal is not None)

    def _stop_if_asked(self) -> None:
        """Called where the weights are those of a whole number of iterations."""
        if not self._is_asked_to_stop():
            return
        path = self._save_now()
        number = self.stop.signal or signal.SIGTERM
        raise TrainingStopped(
            f"stopped by {signal.Signals(number).name} after iteration {self.iteration}; saved "
            f"{path}; continue with --run.resume true",
            exit_code=128 + number,
        )

    # ---- beginning

    def _prepare_folder(self) -> None:
        if self.engine.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            saved = {"revision": git_revision(), "config": asdict(self.config)}
            (self.folder / "config.json").write_text(json.dumps(saved, indent=1) + "\n")
            if self.engine.settings:
                text = json.dumps(self.engine.settings, indent=1)
                (self.folder / "engine.json").write_text(text + "\n")
        self.engine.barrier()
        self.saver.check_shared(self.folder / "config.json")

    def _tell_start(self) -> None:
        say = self.tracker.say
        prompts = [*self.batches.prompts, *self.validator.prompts]
        truncated = self.policy.count_truncated(prompts) if self.tracker.active else 0
        if truncated:
            say(
                f"warning: {truncated} of {len(prompts)} training and validation prompts are "
                "longer than the text encoder takes and are truncated"
            )
        if self.config.run.resume and self.iteration == 0:
            say(f"nothing to continue from in {self.folder}: starting at the beginning")
        if self.iteration >= self.config.run.iterations:
            say(f"all {self.config.run.iterations} iterations are done; results in {self.folder}")
            return
        windows = [self.windows.at(i) for i in range(self.iteration, self.config.run.iterations)]
        start, stop = min(w.start for w in windows), max(w.stop for w in windows)
        say(
            f"iterations {self.iteration + 1} to {self.config.run.iterations} on "
            f"{self.engine.world_size} x {self.engine.device.type}, {self.trained / 1e6:.2f}M "
            f"trained weights; windows of {windows[0].size} steps lie in [{start}, {stop}) "
            f"of {self.config.sampling.steps}; results in {self.folder}"
        )
