"""Noise as a pure function of its purpose, independent of process count and resuming."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_INITIAL = -1  # the "step" of the initial noise
_STEPS = -2  # the "step" of the draw of trained steps
_SHARED = -1  # the "sample" of noise that all samples of a prompt share


def key_seed(*key: int) -> int:
    """A seed derived from integers, the same on every machine; 32 bits, as many as torch's
    generator uses."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 1) & 0xFFFFFFFF


def drawn_steps(
    seed: int, iteration: int, prompts: int, samples: int, steps: int, count: int
) -> Tensor:
    """[prompts*samples, steps] bool: ``count`` of the window's steps for each sample of the batch.

    Each sample's draw depends only on (seed, iteration, prompt, sample).
    """
    drawn = torch.zeros(prompts * samples, steps, dtype=torch.bool)
    for row, chosen in enumerate(drawn):
        key = (seed, iteration, row // samples, row % samples, _STEPS)
        generator = torch.Generator().manual_seed(key_seed(*key))
        chosen[torch.randperm(steps, generator=generator)[:count]] = True
    return drawn


@dataclass(frozen=True)
class Noise:
    """Standard normal latents for the samples of one rollout.

    Drawn on the CPU, with one generator per (seed, iteration, prompt, sample, step), so that a GPU
    run sees the same numbers as a CPU run, and any number of processes the same as one process.

    Attributes:
        seed: the run's seed.
        iteration: the iteration, counted from 0.
        prompts: position in the iteration's global batch of each of this process's prompts.
        samples: samples per prompt, G.
        shape: (S, C) of one latent.
        shared: whether a prompt's samples share their initial noise.
        device: device on which the noise is returned.
    """

    seed: int
    iteration: int
    prompts: Sequence[int]
    samples: int
    shape: tuple[int, int]
    shared: bool
    device: torch.device

    def initial(self) -> Tensor:
        """[P, S, C] if the samples of a prompt share it, otherwise [P*G, S, C]."""
        samples = [_SHARED] if self.shared else range(self.samples)
        return self._stack([(prompt, s, _INITIAL) for prompt in self.prompts for s in samples])

    def at(self, step: int, rows: range) -> Tensor:
        """[len(rows), S, C], the noise of an SDE step for the samples in these rows of P*G."""
        keys = [(self.prompts[r // self.samples], r % self.samples, step) for r in rows]
        return self._stack(keys)

    def _stack(self, keys: list[tuple[int, int, int]]) -> Tensor:
        drawn = [
            torch.randn(
                self.shape,
                generator=torch.Generator().manual_seed(key_seed(self.seed, self.iteration, *key)),
            )
            for key in keys
        ]
        noise = torch.stack(drawn)
        if self.device.type == "cuda":
            noise = noise.pin_memory()  # copies from unpinned memory would block the host
        return noise.to(self.device, non_blocking=True)
