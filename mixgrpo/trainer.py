"""The training loop: rollout, rewards, advantages, update, log, checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mixgrpo.assembly import Parts, Prompts, assemble, make_negative, make_stored_text, make_windows
from mixgrpo.checks import check
from mixgrpo.config import Config
from mixgrpo.devices import deterministic, is_out_of_memory
from mixgrpo.engines.distributed import Process, process_group
from mixgrpo.files.disk import own_folder
from mixgrpo.maths.advantages import group_advantages
from mixgrpo.maths.emphasis import balanced
from mixgrpo.maths.objective import adapted_kl_weight
from mixgrpo.methods.emphasis import emphasize
from mixgrpo.methods.grpo import NonFiniteUpdate, update
from mixgrpo.models.export import export
from mixgrpo.planning.memory import OutOfMemory, explain_training, memory_of
from mixgrpo.rewards import RewardError, Scoring, check_failures, resident
from mixgrpo.rollout import rollout
from mixgrpo.run.contents import read_contents
from mixgrpo.run.record import progress_line, sampling_record, seconds_record, update_record
from mixgrpo.run.saving import Saving, resumed_checkpoint
from mixgrpo.run.scorable import check_scorable
from mixgrpo.run.start import announce, prepare_folder, warn_of_truncation
from mixgrpo.run.stopping import SamplingStopped
from mixgrpo.run.tracking import Phases, Tracker
from mixgrpo.run.validation import Validations
from mixgrpo.run.watchdog import Watchdog
from mixgrpo.types import Scores, Trajectory, Window


def train(config: Config) -> Path:
    """Runs a training from its start (or its newest checkpoint) to its end; returns its folder.

    Raises:
        ValueError, FileNotFoundError: something that the user can mend, before training starts.
        TrainingStopped: a signal, a non-finite loss or a failing reward ended it.
        CheckpointError: a checkpoint could not be written or read.
        OutOfMemory: the GPU is too small.
    """
    with (
        process_group(config.run.threads) as process,
        deterministic(config.run.deterministic),
        _explained(config, process),
        Watchdog(config.run.patience, process) as watchdog,
    ):
        check(config, process.world_size)
        windows = make_windows(config)
        watchdog.progress("reading the files' contents")
        contents = read_contents(config, process)
        resumed = resumed_checkpoint(config, process, contents)
        prompts = Prompts.read(config)
        check_scorable(config, prompts.training, prompts.validation)
        negative = make_negative(config)
        stored = make_stored_text(config, prompts.all(negative), process.device)
        with process.first(own_folder(config.run.folder, "run.folder")):
            parts = assemble(
                *(config, process, windows, prompts, stored, negative),
                *(watchdog.progress, watchdog.beat),
            )
            phases = Phases(process.device, watchdog.progress)
            saving = Saving(config, contents, process, parts.engine, parts.ema, phases)
            if resumed is not None:
                watchdog.progress("reading the checkpoint")
                saving.restore(resumed)
            with saving.stop.from_signals():
                prepare_folder(config, parts.engine, saving)
                done = saving.progress.iteration
                tracker = Tracker(config, Path(config.run.folder), done, process.rank == 0)
                with contextlib.closing(tracker):
                    Trainer(config, parts, saving, tracker, phases).run()
    return Path(config.run.folder)


@contextlib.contextmanager
def _explained(config: Config, process: Process) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        there, per_node = memory_of(process.device), max(1, torch.cuda.device_count())
        said = explain_training(config, there, process.world_size, per_node)
        raise OutOfMemory(said) from error


@dataclass(frozen=True)
class Batch:
    """An iteration's images with their scores, as far as this process sampled them.

    Attributes:
        trajectory: what the rollout leaves for the update.
        texts: the P prompts.
        scoring: their scores, and why rewards failed where they did.
    """

    trajectory: Trajectory
    texts: list[str]
    scoring: Scoring


class Trainer:
    """The loop over a run's parts."""

    def __init__(
        self, config: Config, parts: Parts, saving: Saving, tracker: Tracker, phases: Phases
    ) -> None:
        self.config = config
        self.parts = parts
        self.engine = parts.engine
        self.saving = saving
        self.progress = saving.progress
        self.tracker = tracker
        self.phases = phases
        self.validations = Validations(
            *(config, parts.validator, parts.engine, parts.velocities.validation, parts.ema),
            *(saving, tracker, phases),
        )

    def run(self) -> None:
        """Trains from the present iteration to the last one."""
        self._announce()
        if self.validations.is_missing():
            self.validations.run()
        while self.progress.iteration < self.config.run.iterations:
            self._iterate()
            self._after_iteration()
        self._finish()

    def _iterate(self) -> None:
        """One iteration: rollout, rewards, advantages, update, log."""
        window = self.parts.windows.at(self.progress.iteration)
        try:
            batch = self._sample(window)
        except SamplingStopped:
            self.saving.stop_if_asked()  # out here, where nothing of the sampling is open any more
            raise
        self.saving.stop_if_asked()
        scores = self._gather(batch.scoring)
        advantages = self._advantages(scores)
        metrics = self._update(window, batch, advantages)
        self.progress.iteration += 1
        ema = self.parts.ema
        if ema and self.progress.iteration % self.config.ema.every == 0:
            ema.update()
        self._log(window, batch, scores, advantages, metrics)

    def _sample(self, window: Window) -> Batch:
        """Samples images for this process's prompts; scores them while others are sampled."""
        config, parts, iteration = self.config, self.parts, self.progress.iteration
        prompts = parts.batches.at(iteration)
        with self.phases("text"):
            text = parts.text.encode(prompts.texts, prompts.metadata)
        noise = parts.noise(prompts, iteration)
        samples = range(config.batch.samples)
        texts = [text for text in prompts.texts for _ in samples]
        metadata = [each for each in prompts.metadata for _ in samples]
        with resident(parts.rewards, config.scoring.placement, self.engine.device):
            stream = parts.score_stream()

            def decode_and_score(latents: Tensor, rows: range) -> None:
                with self.phases("decode"):
                    batches = latents.split(config.sampling.decode_batch)
                    images = torch.cat([parts.policy.decode(batch) for batch in batches])
                part = slice(rows.start, rows.stop)
                stream.submit(images, texts[part], metadata[part])
                if self.saving.is_asked_to_stop():
                    raise SamplingStopped

            with self.phases("rollout"), stream.given_up_on_error():
                plan, size = parts.plan(window), config.sampling.micro_batch
                with self.engine.gathered():
                    trajectory = rollout(
                        parts.velocities.rollout, text, plan, noise, size, decode_and_score
                    )
            with self.phases("reward"):
                scoring = stream.result()
        self.phases.add("reward_hidden", stream.hidden)
        return Batch(trajectory, prompts.texts, scoring)

    def _gather(self, scoring: Scoring) -> Scores:
        """[world*B] scores of all processes, the same on each of them."""
        local = {name: values.to(self.engine.device) for name, values in scoring.scores.items()}
        scores = {name: self.engine.gather(values) for name, values in local.items()}
        try:
            check_failures(Scoring(scores, scoring.causes), self.config.scoring.max_failed)
        except RewardError as error:
            raise self.saving.stop_for_reward(error) from error
        return scores

    def _advantages(self, scores: Scores) -> Tensor:
        """[world*B] advantages over the global batch, the same on every process."""
        knobs = self.config.advantage
        weights = {name: self.config.rewards[name].weight for name in scores}
        count = self.config.batch.prompts * self.config.batch.samples
        group = torch.arange(count, device=self.engine.device) // self.config.batch.samples
        advantages = group_advantages(scores, group, weights, knobs.kind, knobs.clip, knobs.trim)
        return balanced(advantages) if knobs.balance else advantages

    def _update(self, window: Window, batch: Batch, advantages: Tensor) -> dict[str, Tensor]:
        """The iteration's optimizer steps; returns this process's metrics."""
        trajectory, mine, emphasis = emphasize(
            self.config,
            self.progress.iteration,
            window,
            batch.trajectory,
            advantages,
            self.engine.rank,
            self.engine.world_size,
        )
        objective = replace(self.parts.objective, kl=self.progress.kl_weight)
        velocity, knobs = self.parts.velocities.update, self.config.update
        try:
            with self.phases("update"):
                metrics = update(
                    self.engine, velocity, trajectory, mine, objective, knobs, emphasis
                )
        except NonFiniteUpdate as error:
            place = f"window {window}: {error}; this process's prompts: {batch.texts}"
            raise self.saving.stop_for_update(error, place) from error
        metrics["evaluations_per_image"] *= len(trajectory) / len(batch.trajectory)
        return metrics

    def _log(
        self,
        window: Window,
        batch: Batch,
        scores: Scores,
        advantages: Tensor,
        metrics: dict[str, Tensor],
    ) -> None:
        record = update_record(self.engine, metrics)
        self._adapt_kl(record)
        record |= sampling_record(window, batch.trajectory, scores, advantages)
        seconds = self.phases.take()
        self.tracker.log(self.progress.iteration, record | seconds_record(seconds))
        self.tracker.advance(progress_line(window, scores, seconds))

    def _adapt_kl(self, record: dict[str, float]) -> None:
        """Sets the KL's weight for the next iteration from the mean KL of all processes."""
        first, target = self.config.update.kl, self.config.update.kl_target
        if target:
            present = record["update/kl_weight"] = self.progress.kl_weight
            self.progress.kl_weight = adapted_kl_weight(present, record["update/kl"], target, first)

    def _after_iteration(self) -> None:
        """Validates and saves when that is due; stops if a signal asked for it."""
        every, done = self.config.checkpoint.every, self.progress.iteration
        self.saving.poll()
        if done == self.config.run.iterations:
            self.saving.save_now()
            return
        self.saving.stop_if_asked()  # whoever asked should not wait for a validation
        if self.validations.is_due():
            self.validations.run()
        if every and done % every == 0:
            self.saving.save()
        self.saving.stop_if_asked()

    def _announce(self) -> None:
        say, config, parts = self.tracker.say, self.config, self.parts
        if self.tracker.active:
            prompts = [*parts.batches.prompts.texts, *parts.validator.prompts.texts]
            warn_of_truncation(say, parts.policy, prompts)
        announce(
            *(say, config, self.engine, parts.windows),
            *(parts.trained_weights, self.progress.iteration),
        )

    def _finish(self) -> None:
        """The last validation, the exported model, the report."""
        self.validations.run()
        checkpoint, folder = self.saving.newest(), Path(self.config.run.folder)
        if self.engine.rank == 0 and checkpoint is not None:
            from mixgrpo.report.summary import summarize

            self.phases.progress("exporting")
            export(checkpoint, folder / "model")
            self.tracker.say(summarize(folder, self.config))
        self.engine.barrier()
