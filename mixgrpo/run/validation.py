"""Validation: fixed prompts, fixed noise, the deterministic ODE, every reward of the recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixgrpo.config import Config
from mixgrpo.engines import Engine
from mixgrpo.engines.ema import Ema
from mixgrpo.maths.schedule import Spacing, make_sigmas
from mixgrpo.models import Policy
from mixgrpo.noise import Noise
from mixgrpo.rewards import Reward, resident, score
from mixgrpo.rollout import sample_ode
from mixgrpo.run.hacking import hacking_warning
from mixgrpo.run.pictures import save_pictures, save_scores, to_bytes
from mixgrpo.run.record import seconds_record
from mixgrpo.run.saving import Saving
from mixgrpo.run.stopping import SamplingStopped
from mixgrpo.run.tracking import Phases, Tracker, is_validation, read_metrics
from mixgrpo.text.negative import GuidedText
from mixgrpo.text.prompt_files import PromptList
from mixgrpo.types import Velocity


@dataclass(frozen=True)
class Validation:
    """Mean scores over all validation prompts, and the first few images.

    Attributes:
        means: reward name -> mean score over the prompts that were scored.
        failed: reward name -> number of prompts that could not be scored.
        pictures: [n, 3, H, W] uint8.
        prompts: their n prompts.
        scores: reward name -> [n] their scores.
    """

    means: dict[str, float]
    failed: dict[str, int]
    pictures: Tensor
    prompts: list[str]
    scores: dict[str, Tensor]

    def save_pictures(self, folder: Path) -> None:
        """Writes the images as PNG files, and their scores to ``scores.json`` beside them."""
        save_pictures(self.pictures, folder)
        save_scores(self.prompts, self.scores, folder)


class Validator:
    """Samples and scores the validation prompts; each process takes consecutive ones.

    The noise depends only on the prompt's position in the file, so that it changes neither with the
    number of processes nor with the iteration.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        text: GuidedText,
        rewards: Mapping[str, Reward],
        prompts: PromptList,
        spacing: Spacing,
    ) -> None:
        self.config = config
        self.policy = policy
        self.text = text
        self.rewards = rewards
        self.prompts = prompts
        self.sigmas = make_sigmas(config.validation.steps, spacing)

    def __call__(
        self, engine: Engine, velocity: Velocity, is_stopped: Callable[[], bool]
    ) -> Validation:
        """Samples and scores.

        Args:
            is_stopped: called before every batch, on all processes together.

        Raises:
            SamplingStopped: ``is_stopped`` returned True.
        """
        # Gathering needs equally many on every process, so the last processes repeat the last one.
        count, total = -(-len(self.prompts) // engine.world_size), len(self.prompts)
        places = [min(engine.rank * count + i, total - 1) for i in range(count)]
        images, scores = self._score(engine, velocity, places, is_stopped)
        kept = engine.gather(images[: self.config.validation.pictures])
        gathered = {name: engine.gather(values)[:total] for name, values in scores.items()}
        shown = min(self.config.validation.pictures, total)
        return Validation(
            means={name: values.nanmean().item() for name, values in gathered.items()},
            failed={name: int(values.isnan().sum()) for name, values in gathered.items()},
            pictures=kept[:shown].cpu(),
            prompts=list(self.prompts.texts[:shown]),
            scores={name: values[:shown].cpu() for name, values in gathered.items()},
        )

    def _score(
        self,
        engine: Engine,
        velocity: Velocity,
        places: list[int],
        is_stopped: Callable[[], bool],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [n, 3, H, W] uint8 and scores [n] of the prompts at these positions."""
        size = self.config.sampling.decode_batch
        pictures, scores = [], []
        for start in range(0, len(places), size):
            if is_stopped():
                raise SamplingStopped
            part = places[start : start + size]
            texts = [self.prompts.texts[place] for place in part]
            metadata = [self.prompts.metadata[place] for place in part]
            noise = Noise(
                seed=self.config.validation.seed,
                iteration=0,
                prompts=part,
                samples=1,
                shape=self.policy.latent_shape,
                shared=True,
                device=engine.device,
            )
            latents = sample_ode(
                velocity,
                noise.initial(),
                self.text.encode(texts, metadata),
                self.sigmas,
                self.config.sampling.micro_batch,
            )
            images = self.policy.decode(latents)
            scores.append(
                score(self.rewards, images, texts, self.config.scoring.micro_batch, metadata)
            )
            pictures.append(to_bytes(images))
        merged = {name: torch.cat([part[name] for part in scores]) for name in self.rewards}
        return torch.cat(pictures), merged


class Validations:
    """A run's validations: when they are due, how they are logged, what they warn of.

    Every method is called by all processes together.
    """

    def __init__(
        self,
        config: Config,
        validator: Validator,
        engine: Engine,
        velocity: Velocity,
        ema: Ema | None,
        saving: Saving,
        tracker: Tracker,
        phases: Phases,
    ) -> None:
        self.config = config
        self.folder = Path(config.run.folder)
        self.validator = validator
        self.engine = engine
        self.velocity = velocity
        self.ema = ema
        self.saving = saving
        self.tracker = tracker
        self.phases = phases

    def is_due(self) -> bool:
        """Whether the iteration just done ends with a validation; the last one always does."""
        every, done = self.config.validation.every, self.saving.progress.iteration
        return bool(every) and done % every == 0 and done != self.config.run.iterations

    def is_missing(self) -> bool:
        """Whether the weights that a run starts or continues from were still to be validated.

        A run that was stopped before a validation makes up for it when it continues.
        """
        done = self.saving.progress.iteration
        if done == 0:
            return self.config.validation.before
        if not self.is_due():
            return False
        records = read_metrics(self.folder) if self.tracker.active else []
        found = any(record["iteration"] == done and is_validation(record) for record in records)
        return self.engine.any(self.tracker.active and not found)

    def run(self) -> None:
        """Scores the fixed prompts, with and without the average; logs, and keeps images.

        Raises:
            TrainingStopped: a signal asked for it; a checkpoint was saved.
        """
        try:
            plain, average = self._validate()
        except SamplingStopped:
            self.saving.stop_if_asked()
            raise
        iteration = self.saving.progress.iteration
        record = {f"validation/{name}": value for name, value in plain.means.items()}
        if average:
            record |= {f"validation_ema/{name}": value for name, value in average.means.items()}
        record |= seconds_record(self.phases.take())
        self.tracker.log(iteration, record)
        self._warn_of_hacking()
        if self.engine.rank == 0:
            plain.save_pictures(self.folder / "pictures" / f"iteration_{iteration:08d}")
            self.tracker.pictures(iteration, plain.pictures, plain.prompts)

    def _validate(self) -> tuple[Validation, Validation | None]:
        """By the weights, and by their average if there is one."""
        rewards, placement = self.validator.rewards, self.config.scoring.placement
        with self.phases("validation"), resident(rewards, placement, self.engine.device):
            with self.engine.gathered():
                plain = self._by_present_weights()
            if not self.ema or self.saving.progress.iteration == 0:
                return plain, None
            with self.ema.swapped(), self.engine.gathered():
                return plain, self._by_present_weights()

    def _by_present_weights(self) -> Validation:
        return self.validator(self.engine, self.velocity, self.saving.is_asked_to_stop)

    def _warn_of_hacking(self) -> None:
        weights = {name: knobs.weight for name, knobs in self.config.rewards.items()}
        history = read_metrics(self.folder) if self.tracker.active else []
        warning = hacking_warning(history, weights, self.config.validation.patience)
        if warning:
            self.tracker.warn("reward hacking", warning)
