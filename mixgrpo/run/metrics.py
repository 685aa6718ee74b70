"""The metrics that a run logs: names, meanings and units."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number of ``metrics.jsonl``.

    Attributes:
        key: its name there; ``NAME`` stands for the name of a reward.
        title: its name in the report; ``NAME`` as in ``key``.
        unit: empty for plain numbers.
        meaning: one sentence.
    """

    key: str
    title: str
    unit: str
    meaning: str


_REWARD = "the reward's own"

METRICS = (
    Metric(
        "reward/NAME", "NAME, training prompts", _REWARD,
        "mean score of the iteration's images; the prompts differ between iterations",
    ),
    Metric(
        "reward_failed/NAME", "NAME, failed", "images",
        "images of the iteration that this reward could not score",
    ),
    Metric(
        "validation/NAME", "NAME, validation", _REWARD,
        "mean score of the validation images: always the same prompts and noise, deterministic "
        "sampling",
    ),
    Metric(
        "validation_ema/NAME", "NAME, validation of the average", _REWARD,
        "the same with the moving average of the weights (`ema.decay`)",
    ),
    Metric(
        "advantage/deviation", "Advantage spread", "",
        "standard deviation of the advantages; near 0, the images of a prompt have equal scores, "
        "and there is nothing to learn",
    ),
    Metric(
        "update/loss", "Loss", "",
        "negative clipped objective, averaged over the window's transitions; it is near 0 in "
        "every healthy run, so it tells little",
    ),
    Metric(
        "update/ratio_mean", "Ratio, mean", "",
        "mean ratio of the new to the old probability of the rollout's transitions",
    ),
    Metric(
        "update/ratio_deviation", "Ratio, distance from 1", "",
        "mean distance of that ratio from 1: how far the iteration's optimizer steps have moved "
        "the policy",
    ),
    Metric(
        "update/ratio_error_on_policy", "Ratio error before the first step", "",
        "largest distance of the ratio from 1 before the iteration's first optimizer step; more "
        "than rounding is an error",
    ),
    Metric(
        "update/clip_fraction", "Clipped", "fraction of transitions",
        "transitions without a gradient, because their ratio is outside 1 ± `update.clip`",
    ),
    Metric(
        "update/kl", "KL to the untrained model", "nats",
        "mean KL from a transition to that of the reference policy, averaged over the elements of "
        "the latent; with `update.kl_form velocity`, the squared distance of the velocities. Only "
        "with `update.kl`",
    ),
    Metric(
        "update/kl_weight", "KL weight", "",
        "weight of the KL in the loss of this iteration; only with `update.kl_target`",
    ),
    Metric(
        "update/grad_norm", "Gradient norm", "",
        "gradient norm before clipping to `update.max_grad_norm`, averaged over the optimizer "
        "steps",
    ),
    Metric(
        "update/evaluations_per_image", "Evaluations for the update", "per image",
        "model evaluations with a gradient, divided by the number of images",
    ),
    Metric(
        "rollout/evaluations_per_image", "Evaluations for the rollout", "per image",
        "model evaluations of the sampling, divided by the number of images; shared steps count "
        "once",
    ),
    Metric(
        "window/start", "Window", "step",
        "first denoising step that is sampled by the SDE and trained",
    ),
    Metric("window/stop", "Window, end", "step", "the step before which the window ends"),
    Metric("seconds/text", "Text encoding", "s", "encoding the prompts, or reading embeddings"),
    Metric("seconds/rollout", "Rollout", "s", "sampling the images, without decoding"),
    Metric("seconds/decode", "Decoding", "s", "latents to pixels"),
    Metric("seconds/reward", "Rewards, waited for", "s", "scoring for which the run had to wait"),
    Metric(
        "seconds/reward_hidden", "Rewards, hidden", "s",
        "scoring while other images were sampled; not part of the run's time",
    ),
    Metric("seconds/update", "Update", "s", "forward and backward passes and optimizer steps"),
    Metric(
        "seconds/save", "Saving", "s",
        "time that a checkpoint took from the loop, at its start and its end; logged with the "
        "iteration or validation that follows",
    ),
    Metric("seconds/validation", "Validation", "s", "a validation, including that of the average"),
)  # fmt: skip


def describe(key: str) -> Metric:
    """The metric of a logged name, with the name of its reward in place of ``NAME``.

    A name that is not in the table is its own title.
    """
    for metric in METRICS:
        prefix, is_pattern, _ = metric.key.partition("NAME")
        if key == metric.key or (is_pattern and key.startswith(prefix)):
            name = key.removeprefix(prefix)
            return Metric(key, metric.title.replace("NAME", name), metric.unit, metric.meaning)
    return Metric(key, key, "", "")


def table() -> str:
    """All metrics as a table in Markdown."""
    rows = [f"| `{metric.key}` | {metric.meaning} | {metric.unit} |" for metric in METRICS]
    return "\n".join(["| metric | | unit |", "|---|---|---|", *rows])
