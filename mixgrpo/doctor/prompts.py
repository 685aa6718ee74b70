"""Checks of the prompt files, their lengths in tokens, and stored embeddings."""

from __future__ import annotations

import contextlib
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mixgrpo.assembly import Prompts, make_negative, make_stored_text
from mixgrpo.config import Config
from mixgrpo.doctor.lines import Line, error, fetching, ok, warning
from mixgrpo.models.files import quiet
from mixgrpo.models.guidance import Guides
from mixgrpo.models.registry import family_of
from mixgrpo.run.scorable import VALIDATION, find_unscorable
from mixgrpo.text.prompt_files import NEGATIVE, PromptList
from mixgrpo.text.prompts import read_prompts
from mixgrpo.text.stored import preprocess_command

SHOWN = 8  # keys of metadata


def check_prompts(config: Config, processes: int) -> Iterator[Line]:
    found: dict[str, PromptList] = {}
    for knob, path in _files(config).items():
        try:
            found[knob] = read_prompts(path, knob)
        except (ValueError, OSError) as caught:
            remedy = fetching(
                path, f"set --{knob} to UTF-8 text with one prompt per line, or to JSONL"
            )
            yield error("prompts", str(caught), remedy)
    for knob, prompts in found.items():
        yield _told(config, knob, prompts)
        yield from _doubtful(knob, prompts)
        yield from _unused(config, knob, prompts)
    yield from _unscorable(config, found)
    if len(found) == 2:
        yield from _overlap(*(prompts.texts for prompts in found.values()))


def _files(config: Config) -> dict[str, str]:
    return {
        "batch.prompts_file": config.batch.prompts_file,
        "validation.prompts_file": config.validation.prompts_file,
    }


def _told(config: Config, knob: str, prompts: PromptList) -> Line:
    distinct, length = len(set(prompts.texts)), config.model.text_length
    again = f" ({distinct:,} distinct)" if distinct < len(prompts) else ""
    text = f"{knob}: {prompts.format}{_keys(prompts)}, {len(prompts):,} prompts{again}"
    truncated = _count_truncated(config, prompts.texts)
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


def _keys(prompts: PromptList) -> str:
    """The keys of the metadata, most frequent first, each with its prompts if it lacks any."""
    times = Counter(key for metadata in prompts.metadata for key in metadata)
    named = [
        (key if key.isidentifier() else reprlib.repr(key))
        + (f" ({count:,} prompts)" if count < len(prompts) else "")
        for key, count in times.most_common(SHOWN)
    ]
    more = f" and {len(times) - SHOWN:,} more" if len(times) > SHOWN else ""
    return f" with the metadata {', '.join(named)}{more}" if named else ""


def _unused(config: Config, knob: str, prompts: PromptList) -> Iterator[Line]:
    """Warns of negative prompts that no phase uses."""
    count = sum(NEGATIVE in metadata for metadata in prompts.metadata)
    if count and not Guides.of(config.guidance).are_used:
        yield warning(
            "prompts",
            f"{knob}: {count:,} prompts have a {NEGATIVE}, which is not used, since guidance.scale "
            f"is {config.guidance.scale:g}",
            "set --guidance.scale above 1 if the model has classifier-free guidance",
        )


def _doubtful(knob: str, prompts: PromptList) -> Iterator[Line]:
    """Warns of what every line of plain text begins or ends with, and which may be no prompt's."""
    if prompts.format != "plain text":
        return
    comments = [text for text in prompts.texts if text.startswith("# ")]
    if comments:
        yield warning(
            "prompts",
            f"{knob}: {len(comments):,} prompts begin with '# ', such as {comments[0][:60]!r}; "
            "a file of prompts has no comments",
            "remove these lines if they are not prompts",
        )
    for mark, ends in (("- ", ""), ('"', '"'), ("'", "'")):
        marked = all(text.startswith(mark) and text.endswith(ends) for text in prompts.texts)
        if marked and len(prompts) > 1:
            yield warning(
                "prompts",
                f"{knob}: every prompt begins with {mark!r}, such as {prompts.texts[0][:60]!r}, "
                "which is a part of the prompt",
                "remove it from each line if it is not meant to be",
            )


def _count_truncated(config: Config, prompts: Sequence[str]) -> int | None:
    from transformers import AutoTokenizer

    with quiet():
        try:
            family = family_of(config.model)
            folder = Path(config.model.path) / family.main_tokenizer
            if not folder.is_dir():
                return None
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError):  # the model's check reports it
            return None
        times = Counter(prompts)
        lengths = family.count_tokens(tokenizer, list(times))
    counted = zip(times.values(), lengths, strict=True)
    return sum(count for count, length in counted if length > config.model.text_length)


def _unscorable(config: Config, files: dict[str, PromptList]) -> Iterator[Line]:
    """Reports prompts that a reward cannot score; an error if they are too many for a run."""
    limit = {VALIDATION: config.validation.prompts}
    used = {knob: prompts.first(limit.get(knob, 0)) for knob, prompts in files.items()}
    most = config.scoring.max_failed
    for name, knobs in config.rewards.items():
        alone = replace(config, rewards={name: knobs})
        with contextlib.suppress(ValueError):  # the check of the rewards reports it
            for found in find_unscorable(alone, used):
                level = error if found.exceeds(most) else warning
                yield level("prompts", found.told(most), found.remedy)


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
        prompts = Prompts.read(config).all(make_negative(config))
        make_stored_text(config, prompts, torch.device("cpu"))
    except (ValueError, OSError) as caught:
        yield error("text", str(caught), preprocess_command(config))
        return
    yield ok("text", f"{config.text.embeddings} holds all {len(set(prompts)):,} prompts, encoded "
             "by this model's encoders")  # fmt: skip
