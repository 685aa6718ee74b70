"""``python -m mixgrpo plan --recipe NAME [--gpus N] [--section.knob VALUE ...]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial

from mixgrpo.commands.command_line import carry_out, complain, take_option
from mixgrpo.commands.train import parse as parse_recipe
from mixgrpo.config import Config
from mixgrpo.files.messages import shortened
from mixgrpo.planning.plan import Question, report

_USAGE = """\
usage: python -m mixgrpo plan --recipe NAME [--gpus N] [--section.knob VALUE ...]
Estimates the memory per GPU for full training and LoRA on 1, 8, 32 and N GPUs with every engine,
and the time of an iteration. Loads nothing and needs no GPU; without the model's folder, it uses
the sizes of the family's published model, and those of FLUX.1-dev if model.family is auto. The
knobs are those of `python -m mixgrpo train --help`.
  --gpus N           number of GPUs of the run (32)
  --gpus-per-node N  GPUs per machine (8)
  --gpu-memory GIB   memory of each GPU in GiB (80)
  --share S          fraction of the peak throughput that is reached, an assumption until it is
                     measured (0.4)
  --peak TFLOPS      peak dense bfloat16 TFLOP/s of a GPU (989: H100, H200)"""


# The most that an option may be; those that are whole numbers here take whole numbers.
_MOST: dict[str, float] = {
    "gpus": 1_000_000,
    "gpus_per_node": 1_000,
    "gpu_memory": 1e6,
    "share": 1.0,
    "peak": 1e6,
}


def run(arguments: Sequence[str]) -> int:
    """Prints the plan; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(_USAGE)
        return 0
    try:
        question, config = parse(arguments)
    except (ValueError, OSError) as error:
        return complain(error)
    return carry_out(partial(_show, config, question), (ValueError, OSError), "nothing was changed")


def parse(arguments: Sequence[str]) -> tuple[Question, Config]:
    """The question to answer, and the recipe.

    Raises:
        OSError: the recipe does not exist or cannot be read.
        ValueError: an option or a knob is unknown or has a wrong value.
    """
    given: dict[str, float] = {}
    words = list(arguments)
    for field in fields(Question):
        option = f"--{field.name.replace('_', '-')}"
        text, words = take_option(words, option)
        if text is not None:
            given[field.name] = _number(option, text, field.name)
    return Question(**given), parse_recipe(words)  # type: ignore[arg-type]


def _number(option: str, text: str, name: str) -> float:
    most = _MOST[name]
    is_whole = isinstance(most, int)
    try:
        value = int(text) if is_whole else float(text)
    except ValueError:
        value = 0
    if not value > 0:
        kind = "whole number" if is_whole else "number"
        raise ValueError(f"{option} is {shortened(text)!r}; it must be a positive {kind}")
    if value > most:
        raise ValueError(f"{option} is {shortened(text)}; it must be at most {most:.0f}")
    return value


def _show(config: Config, question: Question) -> None:
    from mixgrpo.assembly import make_negative
    from mixgrpo.checks import check
    from mixgrpo.planning.coverage_report import Coverage

    check(config, None)
    make_negative(config)  # says what is wrong with the guidance
    mean, samples = Coverage(config).mean, config.batch.samples
    print(report(config, question, mean.rollout / samples, mean.update / samples))
