"""One iteration as a record of ``metrics.jsonl`` and as a line beside the progress bar."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mixgrpo.engines import Engine
from mixgrpo.types import Scores, Trajectory, Window


def update_record(engine: Engine, metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """The update's metrics, each a mean over all processes, by one gathering.

    Of ``ratio_error_on_policy`` it is the maximum: one process that is off must show.
    """
    names = list(metrics)
    local = torch.stack([metrics[name].float().to(engine.device) for name in names])
    gathered = engine.gather(local[None])
    record = dict(zip((f"update/{n}" for n in names), gathered.mean(0).tolist(), strict=True))
    worst = gathered[:, names.index("ratio_error_on_policy")].max()
    record["update/ratio_error_on_policy"] = worst.item()
    return record


def sampling_record(
    window: Window, trajectory: Trajectory, scores: Scores, advantages: Tensor
) -> dict[str, float]:
    """What the iteration sampled and how it scored.

    Args:
        window: the iteration's, in the whole schedule.
        scores: of every process's samples.
        advantages: [world*B], NaN for failed samples.
    """
    record: dict[str, float] = {}
    for name, values in scores.items():
        record[f"reward/{name}"] = values.nanmean().item()
        record[f"reward_failed/{name}"] = values.isnan().sum().item()
    record["advantage/deviation"] = advantages[~advantages.isnan()].std().item()
    record["rollout/evaluations_per_image"] = trajectory.evaluations_per_image
    record["window/start"], record["window/stop"] = window.start, window.stop
    return record


def seconds_record(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by phase, by the names of the metrics."""
    return {f"seconds/{name}": value for name, value in seconds.items()}


def progress_line(window: Window, scores: Scores, seconds: Mapping[str, float]) -> str:
    """What the progress bar shows of an iteration."""
    rewards = " ".join(f"{name} {values.nanmean():.3f}" for name, values in scores.items())
    phases = " ".join(f"{name} {value:.2f}s" for name, value in seconds.items())
    return f"window {window} | {rewards} | {phases}"
