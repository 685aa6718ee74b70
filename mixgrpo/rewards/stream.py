"""Scoring in a separate thread, which scores images while the next ones are being sampled."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from time import perf_counter

import torch
from torch import Tensor

from mixgrpo.rewards.protocol import Reward
from mixgrpo.rewards.scoring import Scoring, score_and_tell
from mixgrpo.types import Metadata


class ScoreStream:
    """Accepts images as they are finished, and returns all scores at the end.

    The batches on which a reward is called depend only on the order of submission and on
    ``micro_batch``, never on timing, so the scores equal those of ``score`` on all images at once.
    A single thread scores one micro-batch after another and does not communicate with other
    processes, so processes that share a device cannot deadlock here.

    Attributes:
        busy: seconds that scoring took, from ``__init__`` to ``result``.
        waited: seconds that ``result`` took.
    """

    def __init__(
        self, rewards: Mapping[str, Reward], micro_batch: int, device: torch.device
    ) -> None:
        """
        Args:
            micro_batch: images per call of a reward.
            device: where the rewards expect the images; on a GPU they run on a separate stream.
        """
        self.rewards = rewards
        self.micro_batch = micro_batch
        self.device = device
        self.busy = self.waited = 0.0
        self._images: list[Tensor] = []
        self._texts: list[str] = []
        self._metadata: list[Metadata] = []
        self._parts: list[Future[Scoring]] = []
        self._cuda = _stream_of(device) if device.type == "cuda" else None
        self._thread = _new_thread(device)

    def submit(
        self, images: Tensor, texts: Sequence[str], metadata: Sequence[Metadata] | None = None
    ) -> None:
        """Queues images [b, 3, H, W] to score as soon as a micro-batch is full; never waits.

        Args:
            texts: their b prompts.
            metadata: the metadata of the prompts; None if there is none.
        """
        self._images.append(images)
        self._texts += texts
        self._metadata += [{}] * len(texts) if metadata is None else metadata
        while len(self._texts) >= self.micro_batch:
            self._start(self.micro_batch)

    def result(self) -> Scoring:
        """Scores [B] on the CPU, in the order of submission; raises the errors of scoring."""
        before = perf_counter()
        try:
            if self._texts or not self._parts:
                self._start(len(self._texts))
            parts = [future.result() for future in self._parts]
        finally:
            self._thread.shutdown(cancel_futures=True)
        self.waited = perf_counter() - before
        return Scoring(
            {name: torch.cat([part.scores[name] for part in parts]) for name in self.rewards},
            {name: cause for part in reversed(parts) for name, cause in part.causes.items()},
        )

    @contextmanager
    def given_up_on_error(self) -> Iterator[None]:
        """On an error inside, cancels the scoring that has not started and waits for none of it."""
        try:
            yield
        except BaseException:
            self._thread.shutdown(wait=False, cancel_futures=True)
            raise

    @property
    def hidden(self) -> float:
        """Seconds of scoring during which the caller did something else."""
        return max(0.0, self.busy - self.waited)

    def _start(self, count: int) -> None:
        """Hands the oldest ``count`` images to the thread."""
        images = torch.cat(self._images) if self._images else torch.empty(0, 3, 1, 1)
        texts, metadata = self._texts[:count], self._metadata[:count]
        self._images, self._texts = [images[count:]], self._texts[count:]
        self._metadata = self._metadata[count:]
        sampled = None
        if self._cuda is not None and images.is_cuda:
            sampled = torch.cuda.Event()
            sampled.record(torch.cuda.current_stream(images.device))
        self._parts.append(
            self._thread.submit(self._score, images[:count], texts, metadata, sampled)
        )

    def _score(
        self,
        images: Tensor,
        texts: list[str],
        metadata: list[Metadata],
        sampled: torch.cuda.Event | None,
    ) -> Scoring:
        start = perf_counter()
        with torch.cuda.stream(self._cuda) if self._cuda is not None else nullcontext():
            if sampled is not None and self._cuda is not None:
                self._cuda.wait_event(sampled)
                images.record_stream(self._cuda)
            scored = score_and_tell(
                self.rewards, images.to(self.device), texts, len(texts) or 1, metadata
            )
            scores = {name: values.cpu() for name, values in scored.scores.items()}
        self.busy += perf_counter() - start
        return Scoring(scores, scored.causes)


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One stream per device, reused because memory and workspaces are cached per stream."""
    return torch.cuda.Stream(device)


def _new_thread(device: torch.device) -> ThreadPoolExecutor:
    """A thread on this device: a new thread would use the first GPU, whatever its process uses."""
    if device.type != "cuda":
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards")
    return ThreadPoolExecutor(1, "rewards", torch.cuda.set_device, (device,))


@contextmanager
def resident(rewards: Mapping[str, Reward], placement: str, device: torch.device) -> Iterator[None]:
    """With placement ``offload``, moves rewards to the device inside the context, else to the CPU.

    A reward without a method ``to``, such as a function or a remote service, stays where it is.
    """
    movable = [r for r in rewards.values() if hasattr(r, "to")] if placement == "offload" else []
    for reward in movable:
        reward.to(device)
    try:
        yield
    finally:
        for reward in movable:
            reward.to(torch.device("cpu"))
