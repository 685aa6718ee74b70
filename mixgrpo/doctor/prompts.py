"""Checks of the prompt files, their lengths in tokens, and stored embeddings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mixgrpo.assembly import make_stored_text
from mixgrpo.config import Config
from mixgrpo.doctor.lines import Line, error, fetching, ok, warning
from mixgrpo.models.flux_text import quiet
from mixgrpo.text.prompts import read_prompts
from mixgrpo.text.stored import preprocess_command


def check_prompts(config: Config, processes: int) -> Iterator[Line]:
    found: dict[str, list[str]] = {}
    for knob, path in _files(config).items():
        try:
            found[knob] = read_prompts(path, knob)
        except (ValueError, OSError) as caught:
            remedy = fetching(path, f"set --{knob} to a UTF-8 text file with one prompt per line")
            yield error("prompts", str(caught), remedy)
    for knob, prompts in found.items():
        yield _told(config, knob, prompts)
    if len(found) == 2:
        yield from _overlap(*found.values())


def _files(config: Config) -> dict[str, str]:
    return {
        "batch.prompts_file": config.batch.prompts_file,
        "validation.prompts_file": config.validation.prompts_file,
    }


def _told(config: Config, knob: str, prompts: list[str]) -> Line:
    distinct, length = len(set(prompts)), config.model.text_length
    again = f" ({distinct:,} distinct)" if distinct < len(prompts) else ""
    text = f"{knob}: {len(prompts):,} prompts{again}"
    truncated = _count_truncated(config, prompts)
    if truncated is None:
        text = f"{text}; their lengths are unknown without a tokenizer"
        return warning("prompts", text, "fix the errors of the model first")
    if truncated:
        return warning(
            "prompts",
            f"{text}, of which {truncated:,} exceed the text encoder's {length} tokens and are "
            "truncated",
            "shorten them, or raise --model.text_length",
        )
    return ok("prompts", f"{text}, none longer than {length} tokens")


def _count_truncated(config: Config, prompts: Sequence[str]) -> int | None:
    from transformers import AutoTokenizer

    folder = Path(config.model.path) / "tokenizer_2"
    if not folder.is_dir():
        return None
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError):  # the model's check reports it
            return None
        times = Counter(prompts)
        ids = tokenizer(list(times), verbose=False).input_ids
    lengths = zip(times.values(), ids, strict=True)
    return sum(count for count, row in lengths if len(row) > config.model.text_length)


def _overlap(training: Sequence[str], validation: Sequence[str]) -> Iterator[Line]:
    both = set(training) & set(validation)
    if both:
        yield warning(
            "prompts",
            f"{len(both):,} of {len(set(validation)):,} validation prompts are also trained on",
            "use other prompts for --validation.prompts_file",
        )


def check_text(config: Config, processes: int) -> Iterator[Line]:
    """Checks that stored embeddings come from the run's encoders and cover every prompt."""
    if config.text.mode == "online":
        placement = config.text.placement
        yield ok("text", f"prompts are encoded during the run (text.placement {placement})")
        return
    try:
        limit = {"validation.prompts_file": config.validation.prompts or None}
        prompts = [
            prompt
            for knob, path in _files(config).items()
            for prompt in read_prompts(path, knob)[: limit.get(knob)]
        ]
        make_stored_text(config, prompts, torch.device("cpu"))
    except (ValueError, OSError) as caught:
        yield error("text", str(caught), preprocess_command(config))
        return
    yield ok("text", f"{config.text.embeddings} holds all {len(set(prompts)):,} prompts, encoded "
             "by this model's encoders")  # fmt: skip
