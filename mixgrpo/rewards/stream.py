"""Rewards on a thread of their own, which score pictures while the next ones are sampled."""

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


class ScoreStream:
    """Takes pictures as they are finished; gives all scores at the end.

    What a reward is called on depends on the order of submission and ``micro_batch`` alone, never
    on timing, so that the scores are those of ``score`` on all pictures at once. One thread scores
    one micro-batch after another, and speaks to no other process: processes that share a device
    cannot wait for each other here.

    Attributes:
        busy: seconds that scoring took, from ``__init__`` to ``result``.
        waited: seconds that ``result`` took.
    """

    def __init__(
        self, rewards: Mapping[str, Reward], micro_batch: int, device: torch.device
    ) -> None:
        """
        Args:
            micro_batch: pictures per call of a reward.
            device: where the rewards want the pictures; on a GPU they run on a stream of their own.
        """
        self.rewards = rewards
        self.micro_batch = micro_batch
        self.device = device
        self.busy = self.waited = 0.0
        self._images: list[Tensor] = []
        self._texts: list[str] = []
        self._parts: list[Future[Scoring]] = []
        self._cuda = _stream_of(device) if device.type == "cuda" else None
        self._thread = _new_thread(device)

    def submit(self, images: Tensor, texts: Sequence[str]) -> None:
        """Scores these pictures [b, 3, H, W] as soon as a micro-batch is full; never waits."""
        self._images.append(images)
        self._texts += texts
        while len(self._texts) >= self.micro_batch:
            self._start(self.micro_batch)

    def result(self) -> Scoring:
        """Scores [B] on the CPU, in the order of submission. Raises what scoring raised."""
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
        """After an error inside, what is not scored yet never will be: nobody waits for it."""
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
        """Hands the oldest ``count`` pictures to the thread."""
        images = torch.cat(self._images) if self._images else torch.empty(0, 3, 1, 1)
        texts = self._texts[:count]
        self._images, self._texts = [images[count:]], self._texts[count:]
        sampled = None
        if self._cuda is not None and images.is_cuda:
            sampled = torch.cuda.Event()
            sampled.record(torch.cuda.current_stream(images.device))
        self._parts.append(self._thread.submit(self._score, images[:count], texts, sampled))

    def _score(self, images: Tensor, texts: list[str], sampled: torch.cuda.Event | None) -> Scoring:
        start = perf_counter()
        with torch.cuda.stream(self._cuda) if self._cuda is not None else nullcontext():
            if sampled is not None and self._cuda is not None:
                self._cuda.wait_event(sampled)
                images.record_stream(self._cuda)
            scored = score_and_tell(self.rewards, images.to(self.device), texts, len(texts) or 1)
            scores = {name: values.cpu() for name, values in scored.scores.items()}
        self.busy += perf_counter() - start
        return Scoring(scores, scored.causes)


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One for good: memory is cached, and workspaces are kept, for each stream."""
    return torch.cuda.Stream(device)


def _new_thread(device: torch.device) -> ThreadPoolExecutor:
    """A new thread's GPU is the first one, whatever its process's."""
    if device.type != "cuda":
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards")
    return ThreadPoolExecutor(1, "rewards", torch.cuda.set_device, (device,))


@contextmanager
def resident(rewards: Mapping[str, Reward], placement: str, device: torch.device) -> Iterator[None]:
    """Inside, rewards with placement ``offload`` are on the device; outside, on the CPU.

    A reward without a method ``to`` stays where it is: a function, a remote service.
    """
    movable = [r for r in rewards.values() if hasattr(r, "to")] if placement == "offload" else []
    for reward in movable:
        reward.to(device)
    try:
        yield
    finally:
        for reward in movable:
            reward.to(torch.device("cpu"))
