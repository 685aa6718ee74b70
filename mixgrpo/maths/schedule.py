"""Noise schedules: the sigmas that a rollout visits, from 1 (pure noise) to exactly 0 (data)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mixgrpo.types import Window


@dataclass(frozen=True)
class Spacing:
    """How the steps of a schedule are spaced.

    Attributes:
        shift: the time shift, see `shift_time`; 1 spaces the steps evenly.
        terminal: if given, the smallest sigma above 0, to which the schedule is stretched:
            1 - sigma is multiplied by the factor that puts the base schedule's last sigma there.
        smallest: if given, the smallest u above 0, before the shift; else it is 1/T.
    """

    shift: float = 1.0
    terminal: float | None = None
    smallest: float | None = None

    def times(self, steps: int) -> Tensor:
        """Return u_0 = 1 > ... > u_T = 0, evenly spaced but for the last: [T+1] float64.

        Raises:
            ValueError: if ``steps`` is below 2. The last step is never stochastic, so a single step
                would leave nothing to train.
        """
        u = uniform_times(steps)
        if self.smallest is not None:
            u[:-1] = torch.linspace(1, self.smallest, steps, dtype=u.dtype)
        return u

    def sigmas(self, u: Tensor, steps: int) -> Tensor:
        """Return the sigmas at the times ``u`` of a schedule whose base has ``steps`` steps."""
        sigmas = shift_time(u, self.shift)
        if self.terminal is None:
            return sigmas
        last = shift_time(self.times(steps)[-2], self.shift)
        stretched = 1 - (1 - sigmas) * (1 - self.terminal) / (1 - last)
        return torch.where(u > 0, stretched, sigmas)


def uniform_times(steps: int) -> Tensor:
    """Return u_i = 1 - i/T for i = 0..T: [T+1] float64, exactly 1 first and exactly 0 last.

    Raises:
        ValueError: if ``steps`` is below 2.
    """
    if steps < 2:
        raise ValueError(f"a schedule needs at least 2 steps, got {steps}")
    return 1 - torch.arange(steps + 1, dtype=torch.float64) / steps


def shift_time(u: Tensor, shift: float) -> Tensor:
    """Return sigma = shift*u / (1 + (shift-1)*u), the time shift of Esser et al., arXiv 2403.03206.

    A shift above 1 spends more of the steps at high noise. Same shape and dtype as ``u``.

    Raises:
        ValueError: if ``shift`` is not a positive finite number.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be a positive number (1 means no shift), got {shift}")
    # The denominator is 1 + (shift-1)*u, in a form that maps u = 1 to exactly 1 for every shift.
    return shift * u / (shift * u + (1 - u))


def dynamic_shift(
    image_tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_mu: float = 0.5,
    max_mu: float = 1.15,
) -> float:
    """Return a resolution-dependent shift, exp(mu) with mu linear in the number of tokens.

    mu is ``base_mu`` at ``base_tokens`` (256x256 pixels) and ``max_mu`` at ``max_tokens``, and is
    extrapolated linearly outside. The defaults are those of the FLUX pipeline, where 4096 tokens
    (1024x1024) give a shift of 3.16.

    Raises:
        ValueError: if ``image_tokens`` is not positive or the two token counts are equal.
    """
    if image_tokens < 1:
        raise ValueError(f"image_tokens must be at least 1, got {image_tokens}")
    if base_tokens == max_tokens:
        raise ValueError(f"base_tokens and max_tokens must differ, but both are {base_tokens}")
    slope = (max_mu - base_mu) / (max_tokens - base_tokens)
    return math.exp(base_mu + slope * (image_tokens - base_tokens))


def make_sigmas(steps: int, spacing: Spacing | float) -> Tensor:
    """Return the base schedule, sigmas [T+1] float32, from exactly 1 down to exactly 0.

    Args:
        spacing: a number is a `Spacing` with this shift.

    Raises:
        ValueError: if ``steps`` < 2, the shift is not positive, or the spacing is so extreme that
            two neighbouring sigmas are the same float32.
    """
    spacing = _as_spacing(spacing)
    return _spaced(spacing.times(steps), steps, spacing)


def flash_sigmas(
    steps: int, spacing: Spacing | float, window: Window, ratio: float, before: float = 1.0
) -> Tensor:
    """Return MixGRPO-Flash's schedule: the base up to ``window.stop``, then a compressed tail.

    The T-l-w steps after the window become n = max(1, round((T-l-w)*ratio)), equally spaced in u
    and then shifted; a terminal sigma stretches them by the base schedule's factor. A ratio of 1
    gives the base schedule. By default the l steps before the window keep the base schedule, since
    accelerating them collapses quality (arXiv 2507.21802). With ``before`` below 1 they too become
    `compressed_steps` (l, before) steps equally spaced in u, and the window starts at an earlier
    index.

    Returns:
        [l+w+n+1] float32, ending at exactly 0. A rollout makes l + w + n model evaluations.

    Raises:
        ValueError: as in `make_sigmas`; if ``ratio`` or ``before`` is outside (0, 1]; or if the
            window contains the last step, which is never stochastic.
    """
    for name, share in (("tail", ratio), ("prefix", before)):
        if not 0 < share <= 1:
            raise ValueError(f"the {name} ratio must be in (0, 1], got {share}; 1 keeps every step")
    spacing = _as_spacing(spacing)
    u = spacing.times(steps)
    if window.stop > steps - 1:
        raise ValueError(
            f"window {window} does not fit {steps} steps: the last step is never stochastic, so "
            f"a window may stop at {steps - 1} at most"
        )
    tail = compressed_steps(steps - window.stop, ratio)
    tail_u = u[window.stop] * (1 - torch.arange(1, tail + 1, dtype=u.dtype) / tail)
    if spacing.smallest is not None and tail == steps - window.stop:
        # The base's last step is of another size than the others: its steps are not equally spaced.
        tail_u = u[window.stop + 1 :]
    prefix = compressed_steps(window.start, before)
    prefix_u = 1 - (1 - u[window.start]) * torch.arange(prefix, dtype=u.dtype) / max(1, prefix)
    times = torch.cat([prefix_u, u[window.start : window.stop + 1], tail_u])
    return _spaced(times, steps, spacing)


def compressed_steps(count: int, ratio: float) -> int:
    """Return how many steps replace ``count`` steps: max(1, round(count*ratio)), or 0 for 0."""
    return max(1, round(count * ratio)) if count else 0


def _as_spacing(spacing: Spacing | float) -> Spacing:
    return spacing if isinstance(spacing, Spacing) else Spacing(spacing)


def _spaced(u: Tensor, steps: int, spacing: Spacing) -> Tensor:
    """Space ``u`` and round to float32; raise ValueError if neighbouring sigmas become equal."""
    sigmas = spacing.sigmas(u, steps).float()
    if not bool((sigmas.diff() < 0).all()):
        raise ValueError(
            f"shift {spacing.shift} with {len(u) - 1} steps gives neighbouring sigmas that are "
            "equal in float32; bring the shift closer to 1"
        )
    return sigmas


class Step(NamedTuple):
    """One denoising step, as tensors that broadcast against a latent [N, S, C]."""

    sigma: Tensor
    sigma_next: Tensor
    # sigmas[1]: replaces sigma in the denominator of Flow-SDE's sqrt(sigma/(1-sigma)) at sigma = 1.
    sigma_after_one: Tensor


def step_at(sigmas: Tensor, index: int | Tensor) -> Step:
    """Return step ``index`` of the schedule ``sigmas`` [T+1], without host synchronisation.

    Args:
        sigmas: on the device of ``index`` if that is a tensor. For an int, keep them on the CPU:
            CPU scalars can be combined with latents on any device.
        index: an int if all samples take the same step (the results are scalars, shape []), or
            int64 [N] with the step of each sample (the sigmas have shape [N, 1, 1]).
    """
    if isinstance(index, Tensor):
        index = index.reshape(-1, 1, 1)
    return Step(sigmas[index], sigmas[index + 1], sigmas[1])
