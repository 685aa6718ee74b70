"""Scores the images of manifests, each image once by each reward, distributed over all processes.

Batches are formed before they are distributed, so scores do not depend on the number of processes.
"""

from __future__ import annotations

import json
import logging
import math
import reprlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mixgrpo.assembly import make_rewards
from mixgrpo.config import Config
from mixgrpo.engines.distributed import Process, gather_objects, spread
from mixgrpo.evaluation.comparison import Values, pairwise_distance
from mixgrpo.evaluation.manifests import Manifest, Picture
from mixgrpo.evaluation.pictures import Seen, look, read_picture
from mixgrpo.evaluation.score_store import Store, column, digest, identity
from mixgrpo.rewards import Reward, RewardError, depends_on_metadata, find_reward, score
from mixgrpo.types import Metadata

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
THREADS = 8  # images decoded at once, of up to 0.3 GB each
BATCH_PIXELS = 48 * 2**20  # of a batch of large images: 0.6 GB as float32


@dataclass(frozen=True)
class Job:
    """An image to be scored; its key is that of others with the same contents, prompt, metadata."""

    key: str
    file: Path
    digest: str
    prompt: str
    size: tuple[int, int]
    metadata: Metadata = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Evaluation:
    """All scores of all images.

    Attributes:
        manifests: the manifests that were scored.
        faults: manifest's name -> image -> why it could not be read.
        scores: reward's name -> manifest's name -> scores.
        features: name of the reward whose image features measure diversity; None if there is none.
        diversity: manifest's name -> mean distance between the images of a prompt, stored under
            sample 0, for prompts with at least two readable images.
    """

    manifests: Sequence[Manifest]
    faults: Mapping[str, Mapping[Path, str]]
    scores: Mapping[str, Mapping[str, Values]]
    features: str | None
    diversity: Mapping[str, Values]

    @property
    def silent(self) -> list[str]:
        """The rewards that could not score any image."""
        return [
            name
            for name, manifests in self.scores.items()
            if all(math.isnan(value) for values in manifests.values() for value in values.values())
        ]


def evaluate(
    config: Config, manifests: Sequence[Manifest], store: Store, process: Process
) -> Evaluation:
    """Computes and saves the scores by the rewards of ``config`` that are missing in ``store``.

    Raises:
        ValueError: if no image can be read, or a reward cannot be built.
        FileNotFoundError: if a reward's model is missing.
        RewardError: if no reward could score any image.
    """
    features = features_by(config)
    _check_same_metadata(config, manifests)
    # Of rank 0 alone, because reading all weights takes a while.
    mine = config.rewards if process.rank == 0 else {}
    identities = {name: identity(knobs) for name, knobs in mine.items()}
    store, identities = gather_objects(process, (store, identities))[0]
    columns = {name: column(each) for name, each in identities.items()}
    named = {name: {"column": columns[name], **identities[name]} for name in identities}
    seen = _look_at_all(config, manifests, process)
    work = _work(manifests, seen, columns, features)
    for found in _missing(config, work, store, process):
        store.add(found)
        if process.rank == 0:
            store.save(named, [])
    if not any(store.columns.get(each) for each in columns.values()):
        raise RewardError("no reward could score any image; see the warnings above for the causes")
    evaluation = _collected(manifests, seen, work, store)
    if process.rank == 0:
        store.save(named, _rows(evaluation))
    return evaluation


def features_by(config: Config) -> str | None:
    """Name of the reward whose image features are used: a clip_score, else the first with any."""
    kinds = {}
    for name, knobs in config.rewards.items():
        try:
            kinds[name] = find_reward(knobs.kind)
        except ValueError as error:
            raise ValueError(f"rewards.{name}: {error}") from error
    able = [name for name, kind in kinds.items() if hasattr(kind, "image_features")]
    plain = [name for name in able if config.rewards[name].kind == "clip_score"]
    return next(iter([*plain, *able]), None)


def _check_same_metadata(config: Config, manifests: Sequence[Manifest]) -> None:
    """Raises ValueError if a reward would be told different things about the same prompt."""
    told = [
        name
        for name, knobs in config.rewards.items()
        if depends_on_metadata(find_reward(knobs.kind), knobs.options)
    ]
    first: dict[int, tuple[str, Metadata]] = {}
    for manifest in manifests if told else []:
        for picture in manifest.pictures:
            name, metadata = first.setdefault(picture.index, (manifest.name, picture.metadata))
            if metadata != picture.metadata:
                raise ValueError(
                    f"prompt {picture.index} has the metadata {reprlib.repr(metadata)} in {name} "
                    f"and {reprlib.repr(picture.metadata)} in {manifest.name}, so the scores by "
                    f"{told[0]} cannot be compared: run `python -m mixgrpo sample` with the same "
                    "prompts file for both (images that exist are kept)"
                )


# ---- pictures


def _look_at_all(
    config: Config, manifests: Sequence[Manifest], process: Process
) -> dict[Path, Seen]:
    files = list(dict.fromkeys(p.file for manifest in manifests for p in manifest.pictures))
    parts = chunks(files, config.scoring.micro_batch)
    seen: dict[Path, Seen] = {}
    for found in spread(process, parts, _look_at, _label("reading", config)):
        seen |= found
    if all(each.fault for each in seen.values()):
        raise ValueError(
            f"none of the {len(seen)} images in the manifests can be read; the first is "
            f"{files[0]}: {seen[files[0]].fault}; sample the images again"
        )
    return seen


def _look_at(files: Sequence[Path]) -> dict[Path, Seen]:
    with ThreadPoolExecutor(THREADS) as pool:  # decoding releases the GIL
        return dict(zip(files, pool.map(look, files), strict=True))


# ---- work


@dataclass(frozen=True)
class _Work:
    """Everything that an evaluation needs scores for.

    Attributes:
        columns: reward's name -> its column in the store.
        features: name of the reward whose image features measure diversity.
        jobs: (manifest's name, index, sample) -> readable image.
        groups: (manifest's name, index) -> the readable images of a prompt with at least two.
    """

    columns: Mapping[str, str]
    features: str | None
    jobs: Mapping[tuple[str, int, int], Job]
    groups: Mapping[tuple[str, int], Sequence[Job]]

    @property
    def distances(self) -> str:
        """The column of the distances within groups."""
        return f"{self.columns[self.features]} distances" if self.features else ""


def _work(
    manifests: Sequence[Manifest],
    seen: Mapping[Path, Seen],
    columns: Mapping[str, str],
    features: str | None,
) -> _Work:
    jobs = {
        (manifest.name, *picture.key): _job(picture, seen[picture.file])
        for manifest in manifests
        for picture in manifest.pictures
        if not seen[picture.file].fault
    }
    groups: dict[tuple[str, int], list[Job]] = defaultdict(list)
    for (name, index, _), job in jobs.items():
        groups[name, index].append(job)
    whole = {key: group for key, group in groups.items() if len(group) > 1 and features}
    return _Work(columns, features, jobs, whole)


def _job(picture: Picture, seen: Seen) -> Job:
    parts = [seen.digest, picture.prompt]
    if picture.metadata:
        parts.append(json.dumps(picture.metadata, sort_keys=True))
    return Job(
        digest(*parts), picture.file, seen.digest, picture.prompt, seen.size, picture.metadata
    )


def _group_key(group: Sequence[Job]) -> str:
    return digest(*sorted(job.key for job in group))


def _missing(
    config: Config, work: _Work, store: Store, process: Process
) -> Iterator[dict[tuple[str, str], float]]:
    """Yields (column, key) -> score for everything missing in the store, one round at a time."""
    lacking = {
        job.key: job
        for job in work.jobs.values()
        if not all(store.knows(each, job.key) for each in work.columns.values())
    }
    groups = {
        key: group
        for key, group in ((_group_key(group), group) for group in work.groups.values())
        if not store.knows(work.distances, key)
    }
    needed = {
        name: knobs
        for name, knobs in config.rewards.items()
        if not all(store.knows(work.columns[name], job.key) for job in work.jobs.values())
        or (groups and name == work.features)
    }
    rewards = make_rewards(replace(config, rewards=needed), process.device)

    def scores(jobs: Sequence[Job]) -> dict[tuple[str, str], float]:
        return _scores(jobs, rewards, work.columns, store, process.device)

    def distances(part: Sequence[Sequence[Job]]) -> dict[tuple[str, str], float]:
        reward = rewards[str(work.features)]
        keys = [(work.distances, _group_key(group)) for group in part]
        return {
            key: _distance(group, reward, process.device)
            for key, group in zip(keys, part, strict=True)
        }

    size = config.scoring.micro_batch
    parts = batches(list(lacking.values()), size)
    yield from spread(process, parts, scores, _label("scoring", config))
    yield from spread(
        process, chunks(list(groups.values()), size), distances, _label("diversity", config)
    )


def _label(text: str, config: Config) -> str | None:
    return text if config.log.progress else None


def batches(jobs: Sequence[Job], size: int) -> list[Sequence[Job]]:
    """Batches of at most ``size`` images, all of the same width and height within a batch.

    A batch of several images has at most ``BATCH_PIXELS`` pixels.
    """
    by_size: dict[tuple[int, int], list[Job]] = defaultdict(list)
    for job in jobs:
        by_size[job.size].append(job)
    return [
        part
        for (width, height), same in by_size.items()
        for part in chunks(same, max(1, min(size, BATCH_PIXELS // (width * height))))
    ]


def chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Consecutive parts of at most ``size``."""
    return [items[start : start + size] for start in range(0, len(items), size)]


# ---- scores


def _read_all(jobs: Sequence[Job], device: torch.device) -> Tensor:
    """[B, 3, H, W] in [0, 1]; all images must have the same size."""
    with ThreadPoolExecutor(THREADS) as pool:
        read = pool.map(read_picture, [job.file for job in jobs], [job.digest for job in jobs])
        return torch.stack(list(read)).to(device)


def _scores(
    jobs: Sequence[Job],
    rewards: Mapping[str, Reward],
    columns: Mapping[str, str],
    store: Store,
    device: torch.device,
) -> dict[tuple[str, str], float]:
    images = _read_all(jobs, device)
    found: dict[tuple[str, str], float] = {}
    for name, reward in rewards.items():
        places = [i for i, job in enumerate(jobs) if not store.knows(columns[name], job.key)]
        if places:
            chosen = [jobs[place] for place in places]
            values = _score_each(name, reward, images[places], chosen).tolist()
            keys = [(columns[name], jobs[place].key) for place in places]
            found |= dict(zip(keys, values, strict=True))
    return found


def _score_each(name: str, reward: Reward, images: Tensor, jobs: Sequence[Job]) -> Tensor:
    """[B] scores; if the reward fails on the batch, only the images that it fails on are NaN."""
    texts, metadata = [job.prompt for job in jobs], [job.metadata for job in jobs]
    try:
        values = score({name: reward}, images, texts, len(texts), metadata)[name]
        if not values.isnan().all():
            return values
    except RewardError:
        pass  # if the images are not the cause, scoring them one by one will fail again
    try:
        return score({name: reward}, images, texts, 1, metadata)[name]
    except RewardError as error:
        logger.warning("%s", error)
        return torch.full([len(texts)], torch.nan)


def _distance(group: Sequence[Job], reward: Any, device: torch.device) -> float:
    """Mean distance between the group's images; NaN, with a warning, if their features fail."""
    try:
        with torch.no_grad():
            parts = [
                reward.image_features(_read_all(same, device))
                for same in batches(group, len(group))
            ]
    except Exception as error:
        logger.warning("the image features of %s could not be computed: %s", group[0].file, error)
        return torch.nan
    return pairwise_distance(torch.cat(parts))


# ---- results


def _collected(
    manifests: Sequence[Manifest], seen: Mapping[Path, Seen], work: _Work, store: Store
) -> Evaluation:
    def values(manifest: Manifest, column: str) -> Values:
        jobs = {p.key: work.jobs.get((manifest.name, *p.key)) for p in manifest.pictures}
        return {key: store.get(column, job.key) if job else torch.nan for key, job in jobs.items()}

    return Evaluation(
        manifests=manifests,
        faults={
            manifest.name: {
                p.file: fault for p in manifest.pictures if (fault := seen[p.file].fault)
            }
            for manifest in manifests
        },
        scores={
            name: {manifest.name: values(manifest, column) for manifest in manifests}
            for name, column in work.columns.items()
        },
        features=work.features,
        diversity={
            manifest.name: {
                (index, 0): store.get(work.distances, _group_key(group))
                for (name, index), group in work.groups.items()
                if name == manifest.name
            }
            for manifest in manifests
        },
    )


def _rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """A row for every image of every manifest; null where a score is missing."""
    return [
        {
            "manifest": manifest.name,
            "index": picture.index,
            "sample": picture.sample,
            "prompt": picture.prompt,
            "file": str(picture.file),
            "fault": evaluation.faults[manifest.name].get(picture.file),
            "scores": {
                name: None if math.isnan(value := values[manifest.name][picture.key]) else value
                for name, values in evaluation.scores.items()
            },
        }
        for manifest in evaluation.manifests
        for picture in manifest.pictures
    ]
