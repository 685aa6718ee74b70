"""``python -m mixgrpo evaluate MANIFEST ... --recipe NAME --output FOLDER``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixgrpo.commands.command_line import OptionParser, carry_out, complain, home_path, whole_number
from mixgrpo.commands.train import parse as parse_recipe
from mixgrpo.config import Config, RewardConfig

if TYPE_CHECKING:
    from mixgrpo.evaluation.comparison import Bootstrap
    from mixgrpo.evaluation.gallery import Choice
    from mixgrpo.evaluation.manifests import Manifest
    from mixgrpo.evaluation.score_store import Store


# The parts of a recipe that are used; the rest concerns training.
OF_THE_RECIPE = ("recipe", "rewards", "scoring.", "run.threads", "log.progress")

OPTIONS: dict[str, dict[str, Any]] = {
    "output": {
        "type": home_path,
        "required": True,
        "metavar": "FOLDER",
        "help": "folder for table.md, summary.json, gallery.html and scores.json, whose scores are "
        "reused",
    },
    "baseline": {
        "metavar": "NAME",
        "help": "name of the manifest that the others are compared with (default: the first)",
    },
    "resamples": {
        "type": whole_number(1, 1_000_000),
        "default": 2000,
        "help": "number of bootstrap resamples (default: %(default)s)",
    },
    "seed": {
        "type": whole_number(0, 2**63 - 1),
        "default": 0,
        "help": "seed of the bootstrap (default: %(default)s)",
    },
    "gallery_prompts": {
        "type": whole_number(0, 1_000_000),
        "default": 60,
        "help": "maximum number of prompts in the gallery; 0 writes no gallery (default: "
        "%(default)s)",
    },
    "gallery_samples": {
        "type": whole_number(1, 10_000),
        "default": 4,
        "help": "maximum number of images per prompt and manifest in the gallery (default: "
        "%(default)s)",
    },
    "gallery_by": {
        "default": "all",
        "metavar": "REWARD",
        "help": "reward by which the best, worst and most changed prompts are chosen "
        "(default: %(default)s, the mean of all rewards' z-scores)",
    },
}


@dataclass(frozen=True)
class Request:
    """The images to evaluate, the rewards to score them with, and where the results are written."""

    manifests: list[Manifest]
    baseline: str
    config: Config
    output: Path
    store: Store
    bootstrap: Bootstrap
    gallery: Choice


def run(arguments: Sequence[str]) -> int:
    """Evaluates; returns the exit code."""
    try:
        request = parse(arguments)
    except (ValueError, OSError) as error:
        return complain(error)
    from transformers.utils.logging import disable_progress_bar

    from mixgrpo.rewards import RewardError

    disable_progress_bar()
    expected = (ValueError, OSError, RewardError)
    kept = f"scores computed so far are kept in {request.store.path}, if it exists"
    return carry_out(partial(_evaluate, request), expected, kept, request.config.run.grace)


def _evaluate(request: Request) -> None:
    from mixgrpo.engines.distributed import process_group
    from mixgrpo.evaluation.evaluate import evaluate
    from mixgrpo.evaluation.report import write_report
    from mixgrpo.files.disk import own_folder
    from mixgrpo.rewards import RewardError

    with (
        process_group(request.config.run.threads) as process,
        process.first(own_folder(str(request.output), "output")),
    ):
        evaluation = evaluate(request.config, request.manifests, request.store, process)
        if process.rank == 0:
            print(
                write_report(
                    evaluation,
                    request.baseline,
                    request.output,
                    request.bootstrap,
                    request.gallery,
                )
            )
            if evaluation.silent:
                raise RewardError(
                    f"{', '.join(evaluation.silent)} could not score any image (see the warnings "
                    "above); fix the cause and run the same command again to compute the missing "
                    "scores"
                )


def parse(arguments: Sequence[str]) -> Request:
    """Parses a command line into a request; reads the manifests and the scores computed so far.

    Raises:
        FileNotFoundError: a manifest or recipe does not exist.
        ValueError: an option is unknown or has a wrong value, or a file has the wrong content.
    """
    own, of_recipe = _divided(arguments)
    parser = _parser()
    given = parser.parse_args(own)
    config = _in_own_scale(parse_recipe(of_recipe))
    _check(config)
    # Imported here so that a mistyped option is reported without waiting for torch.
    from mixgrpo.evaluation.comparison import Bootstrap
    from mixgrpo.evaluation.gallery import ALL, Choice
    from mixgrpo.evaluation.manifests import read_manifests
    from mixgrpo.evaluation.report import FILES
    from mixgrpo.evaluation.score_store import Store
    from mixgrpo.files.disk import check_replaceable

    for name in FILES:
        check_replaceable(given.output / name)
    manifests = read_manifests(given.manifests)
    names = [manifest.name for manifest in manifests]
    return Request(
        manifests=manifests,
        baseline=_one_of("--baseline", given.baseline or names[0], names),
        config=config,
        output=given.output,
        store=Store.load(given.output / "scores.json"),
        bootstrap=Bootstrap(given.resamples, given.seed),
        gallery=Choice(
            prompts=given.gallery_prompts,
            samples=given.gallery_samples,
            by=_one_of("--gallery_by", given.gallery_by, [ALL, *config.rewards]),
        ),
    )


def _parser() -> OptionParser:
    parser = OptionParser(
        "evaluate",
        "Scores images with a recipe's rewards and compares them prompt by prompt.",
        epilog="The rewards are those of --recipe NAME, without their weights, and can be "
        "overridden with --rewards.NAME.KNOB as in training; --scoring.micro_batch, --run.threads "
        "and --log.progress also work as in training.",
    )
    parser.add_argument(
        "manifests",
        nargs="+",
        metavar="MANIFEST",
        help="folder that the sample command wrote, or its manifest.json; NAME=PATH names it",
    )
    for name, knobs in OPTIONS.items():
        parser.add_argument(f"--{name}", **knobs)
    return parser


def _divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits the words into those for this command and those for the recipe.

    Every option takes one value.
    """
    own: list[str] = []
    of_recipe: list[str] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("--") or not word[2:].startswith(OF_THE_RECIPE):
            own.append(word)
            continue
        of_recipe.append(word)
        if "=" not in word:
            of_recipe += [value for value in [next(words, None)] if value is not None]
    return own, of_recipe


def _in_own_scale(config: Config) -> Config:
    """Removes the shift and scale that recipes apply to PickScore when they combine rewards."""
    rewards = {name: _unscaled(knobs) for name, knobs in config.rewards.items()}
    return replace(config, rewards=rewards)


def _unscaled(knobs: RewardConfig) -> RewardConfig:
    if knobs.kind != "pickscore":
        return knobs
    kept = {name: value for name, value in knobs.options.items() if name not in ("shift", "scale")}
    return replace(knobs, options=kept)


def _check(config: Config) -> None:
    if not config.rewards:
        raise ValueError("no reward is configured; use those of a recipe with --recipe NAME")


def _one_of(option: str, name: str, known: Sequence[str]) -> str:
    if name in known:
        return name
    raise ValueError(
        f"{option} is {name!r}; it must be one of {', '.join(known)}{_nearest(name, known)}"
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""
