"""A run's checkpoints as the training loop needs them: saving, restoring, and stopping early."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixgrpo import checkpoint as checkpoints
from mixgrpo.checkpoint import Position, Saved, Saver, Shards
from mixgrpo.checks import check_resumable
from mixgrpo.config import Config, flatten
from mixgrpo.engines import Engine
from mixgrpo.engines.distributed import Process
from mixgrpo.engines.ema import Ema
from mixgrpo.methods.grpo import NonFiniteUpdate
from mixgrpo.rewards import RewardError
from mixgrpo.run.contents import binding, changes
from mixgrpo.run.stopping import StopRequest, TrainingStopped
from mixgrpo.run.tracking import Phases


@dataclass
class Progress:
    """What changes over a run, apart from the weights and the optimizer.

    Attributes:
        iteration: number of iterations done.
        kl_weight: weight of the KL to the reference in the next iteration.
    """

    iteration: int
    kl_weight: float


class Saving:
    """Saves a run, restores it, and stops it with a checkpoint when a signal or a failure asks to.

    Every method is called by all processes together.

    Args:
        contents: digests of the files that the knobs name, which are stored in every checkpoint;
            read at the start, because the files may change while the run goes on.

    Attributes:
        progress: where the run is; the training loop advances it.
        stop: the request to stop that signals make.
    """

    def __init__(
        self,
        config: Config,
        contents: Mapping[str, str],
        process: Process,
        engine: Engine,
        ema: Ema | None,
        phases: Phases,
    ) -> None:
        self.progress = Progress(iteration=0, kl_weight=config.update.kl)
        self.stop = StopRequest()
        self._config = config
        self._engine = engine
        self._ema = ema
        self._phases = phases
        self._root = checkpoints_root(config)
        self._saver = Saver(
            process, self._root, config.checkpoint.keep, config.checkpoint.asynchronous
        )
        self._contents = contents
        self._resumed_from: Path | None = None

    @property
    def continues(self) -> bool:
        """Whether the run continues from a checkpoint."""
        return self._resumed_from is not None

    def check_shared(self, path: Path) -> None:
        """Raises CheckpointError if a process does not see a file that the first one wrote."""
        self._saver.check_shared(path)

    def save(self) -> None:
        """Starts writing a checkpoint; an asynchronous one is complete some iterations later."""
        position = Position(
            iteration=self.progress.iteration,
            ema_updates=self._ema.updates if self._ema else 0,
            config={**flatten(self._config), **self._contents},
            kl_weight=self.progress.kl_weight,
        )
        with self._phases("save"):
            # The average is copied first, because the weights hold it while it is copied.
            self._saver.save({**self._average(), **self._engine.state()}, position)

    def save_now(self) -> Path:
        """Saves the present weights unless that was done; returns the complete checkpoint."""
        if not self._saver.has(self.progress.iteration):
            self.save()
        with self._phases("save"):
            path = self._saver.wait()
        assert path is not None
        return path

    def poll(self) -> None:
        """Completes an asynchronous save that every process has finished writing."""
        if self._saver.under_way:
            with self._phases("save"):
                self._saver.poll()

    def newest(self) -> Path | None:
        """The newest checkpoint that this run saved or, if none, the one that it continued from."""
        return self._saver.wait() or self._resumed_from

    def restore(self, saved: Saved) -> None:
        """Continues from a checkpoint of this same recipe."""
        shards, group = Shards(saved.path), self._saver.group
        self._engine.restore(lambda state: shards.read(state, group))
        if self._ema:
            with self._ema.swapped():
                self._engine.load_weights(lambda weights: shards.read({"ema": weights}, group))
            self._ema.updates = saved.position.ema_updates
        self.progress.iteration = saved.position.iteration
        self.progress.kl_weight = saved.position.kl_weight
        self._resumed_from = saved.path

    def _average(self) -> dict[str, Any]:
        if not self._ema:
            return {}
        with self._ema.swapped():
            return self._saver.copy({"ema": self._engine.weights()})

    # ---- stopping

    def is_asked_to_stop(self) -> bool:
        """Whether any process received a signal; a collective operation."""
        return self._engine.any(self.stop.signal is not None)

    def stop_if_asked(self) -> None:
        """Saves and raises TrainingStopped if a signal asked for it.

        To be called where the weights are those of a whole number of iterations.
        """
        if not self.is_asked_to_stop():
            return
        path = self.save_now()
        number = self.stop.signal or signal.SIGTERM
        raise TrainingStopped(
            f"stopped by {signal.Signals(number).name} after iteration "
            f"{self.progress.iteration}; saved {path}; continue with --run.resume true",
            exit_code=128 + number,
        )

    def stop_for_reward(self, error: RewardError) -> TrainingStopped:
        """Saves; returns what to raise after a reward has failed on too many images."""
        path = self.save_now()
        return TrainingStopped(
            f"iteration {self.progress.iteration + 1}: {error}; saved {path}; mend the reward or "
            "raise --scoring.max_failed, then continue with --run.resume true",
            exit_code=1,
        )

    def stop_for_update(self, error: NonFiniteUpdate, place: str) -> TrainingStopped:
        """Saves where that helps; returns what to raise after an update was not finite.

        After the iteration's first optimizer step the weights lie between two iterations, and that
        step may be what broke them: an older checkpoint is the better one, if there is one.
        """
        self._saver.wait()
        if error.optimizer_step == 0 or checkpoints.latest(self._root) is None:
            self.save_now()
        newest = checkpoints.latest(self._root)
        return TrainingStopped(
            f"iteration {self.progress.iteration + 1}, {place}; the optimizer step was not taken; "
            f"the newest checkpoint is {newest}; lower --update.learning_rate or "
            "--update.max_grad_norm and train into another --run.folder, or continue with "
            "--run.resume true",
            exit_code=1,
        )


# ---- which checkpoint a run continues from


def checkpoints_root(config: Config) -> Path:
    """The folder of a run's checkpoints."""
    return Path(config.run.folder) / "checkpoints"


def resumed_checkpoint(
    config: Config, process: Process, contents: Mapping[str, str]
) -> Saved | None:
    """The checkpoint to continue from, checked against the recipe; None for a new run.

    Args:
        contents: digests of the files that the knobs name; see ``contents_of``.

    Raises:
        ValueError: the folder holds a run and ``run.resume`` is false, or its checkpoint does not
            fit these knobs or files.
        CheckpointError: the checkpoint cannot be read.
    """
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
    check_same_run(position, config, contents)
    if process.rank == 0:
        for change in changes(position.config, config, contents):
            print(f"warning: {change}", file=sys.stderr)
    if position.iteration > config.run.iterations:
        raise ValueError(
            f"the checkpoint {saved.path} has {position.iteration} iterations, run.iterations is "
            f"{config.run.iterations}; raise --run.iterations"
        )
    return saved


def check_same_run(position: Position, config: Config, contents: Mapping[str, str]) -> None:
    """Checks that a run with these knobs continues the saved one as if it had not stopped.

    Raises:
        ValueError: a knob, or what its files hold, has changed since.
    """
    check_resumable(position.config, config, binding(position.config, config, contents))
