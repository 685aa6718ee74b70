"""Every number that a run logs: its name, what it means, its unit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A number of ``metrics.jsonl``.

    Attributes:
        key: its name there; ``NAME`` stands for any reward's.
        title: what it is called where people read it; ``NAME`` as in ``key``.
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
        "mean score of the iteration's pictures; other prompts in every iteration",
    ),
    Metric(
        "reward_failed/NAME", "NAME, failed", "pictures",
        "pictures of the iteration that this reward could not score",
    ),
    Metric(
        "validation/NAME", "NAME, validation", _REWARD,
        "mean score of the validation pictures: the same prompts and noise each time, "
        "deterministic sampling",
    ),
    Metric(
        "validation_ema/NAME", "NAME, validation of the average", _REWARD,
        "the same by the moving average of the weights (`ema.decay`)",
    ),
    Metric(
        "advantage/deviation", "Advantage spread", "",
        "standard deviation of the advantages; near 0 the pictures of a prompt score alike, and "
        "there is nothing to learn from",
    ),
    Metric(
        "update/loss", "Loss", "",
        "clipped objective with the opposite sign, mean over the window's transitions; near 0 in "
        "every healthy run, so it says little",
    ),
    Metric(
        "update/ratio_mean", "Ratio, mean", "",
        "mean ratio of the new to the old probability of the rollout's transitions",
    ),
    Metric(
        "update/ratio_deviation", "Ratio, distance from 1", "",
        "mean distance of that ratio from 1: how far the iteration's optimizer steps moved the "
        "policy",
    ),
    Metric(
        "update/ratio_error_on_policy", "Ratio error before the first step", "",
        "largest distance of the ratio from 1 before the iteration's first optimizer step; what is "
        "not rounding there is an error",
    ),
    Metric(
        "update/clip_fraction", "Clipped", "share of transitions",
        "transitions without a gradient because their ratio had left 1 ± `update.clip`",
    ),
    Metric(
        "update/kl", "KL to the untrained model", "nats",
        "mean KL of a transition to the reference policy's, averaged over the latent's numbers; "
        "only with `update.kl`. With `update.kl_form velocity` the squared distance of velocities",
    ),
    Metric(
        "update/kl_weight", "KL weight", "",
        "what the KL weighed in the loss of this iteration; only with `update.kl_target`",
    ),
    Metric(
        "update/grad_norm", "Gradient norm", "",
        "mean over the optimizer steps of the gradient's norm, before it is scaled down to "
        "`update.max_grad_norm`",
    ),
    Metric(
        "update/evaluations_per_image", "Evaluations for the update", "per picture",
        "model evaluations with a gradient, a picture's share",
    ),
    Metric(
        "rollout/evaluations_per_image", "Evaluations for the rollout", "per picture",
        "model evaluations of the sampling, a picture's share; shared steps count once",
    ),
    Metric(
        "window/start", "Window", "step",
        "first denoising step that is sampled by the SDE and trained",
    ),
    Metric("window/stop", "Window, end", "step", "the step before which the window ends"),
    Metric("seconds/text", "Text encoding", "s", "encoding the prompts, or reading embeddings"),
    Metric("seconds/rollout", "Rollout", "s", "sampling the pictures, without decoding"),
    Metric("seconds/decode", "Decoding", "s", "latents to pixels"),
    Metric("seconds/reward", "Rewards, waited for", "s", "scoring that the run had to wait for"),
    Metric(
        "seconds/reward_hidden", "Rewards, hidden", "s",
        "scoring that went on while other pictures were sampled; not a part of the run's time",
    ),
    Metric("seconds/update", "Update", "s", "forward and backward passes and optimizer steps"),
    Metric(
        "seconds/save", "Saving", "s",
        "what a checkpoint took from the loop, at its begin and its end; logged with the iteration "
        "or validation that follows",
    ),
    Metric("seconds/validation", "Validation", "s", "a validation, that of the average included"),
)  # fmt: skip


def describe(key: str) -> Metric:
    """What is known of a logged name, with the reward's for ``NAME``.

    A name that is not in the table describes itself.
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
