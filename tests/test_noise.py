"""Noise is a pure function of (seed, iteration, prompt, sample, step)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from small import SHAPE, small_noise
from torch import Tensor

from mixgrpo.noise import key_seed


def test_seeds_are_the_same_on_every_platform() -> None:
    assert key_seed(0) == 771032165
    assert key_seed(714, 3, 1, 11, -1) == 2500434851


def test_every_key_has_its_own_seed() -> None:
    keys = list(itertools.product(range(-1, 5), repeat=4))
    seeds = {key_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert key_seed(1) != key_seed(1, 0)


@pytest.mark.parametrize(("shared", "count"), [(True, 2), (False, 6)])
def test_initial_noise_is_shared_or_not(shared: bool, count: int) -> None:
    assert small_noise(shared=shared).initial().shape == (count, *SHAPE)


def test_shape_and_dtype() -> None:
    noise = small_noise()
    assert noise.at(4, range(1, 5)).shape == (4, *SHAPE)
    assert noise.at(4, range(1)).dtype == torch.float32


def test_is_standard_normal() -> None:
    values = small_noise(prompts=range(40), samples=10, shape=(8, 8)).at(0, range(400)).flatten()
    assert abs(float(values.mean())) < 0.02
    assert abs(float(values.std()) - 1) < 0.02
    assert abs(float((values**4).mean()) - 3) < 0.15


def test_twice_the_same() -> None:
    assert torch.equal(small_noise().initial(), small_noise().initial())
    assert torch.equal(small_noise().at(3, range(6)), small_noise().at(3, range(6)))


def test_order_of_drawing_does_not_matter() -> None:
    noise = small_noise()
    late = noise.at(7, range(6))
    noise.at(0, range(6))
    assert torch.equal(noise.at(7, range(6)), late)


def _all_distinct(parts: list[Tensor]) -> None:
    drawn = torch.cat(parts).flatten(1)
    distance = torch.cdist(drawn, drawn) + torch.eye(len(drawn)) * 9
    assert float(distance.min()) > 0.1


@pytest.mark.parametrize("shared", [True, False])
def test_never_the_same_noise_twice(shared: bool) -> None:
    """Over steps, samples, prompts, iterations and seeds, the initial noise included."""
    noise = small_noise(shared=shared)
    parts = [noise.initial(), *(noise.at(step, range(6)) for step in range(8))]
    parts += [
        replace(noise, prompts=(2, 3)).initial(),
        replace(noise, prompts=(2, 3)).at(0, range(6)),
    ]
    for other in (replace(noise, iteration=1), replace(noise, seed=6)):
        parts += [other.initial(), other.at(0, range(6))]
    _all_distinct(parts)


def test_rows_are_samples_in_prompt_major_order() -> None:
    whole = small_noise(prompts=(4, 7)).at(2, range(6))
    assert torch.equal(small_noise(prompts=(7,)).at(2, range(3)), whole[3:])
    assert torch.equal(small_noise(prompts=(4, 7)).at(2, range(2, 5)), whole[2:5])


@pytest.mark.parametrize("shared", [True, False])
def test_does_not_depend_on_the_split_over_processes(shared: bool) -> None:
    whole = small_noise(prompts=range(4), shared=shared)
    halves = [small_noise(prompts=part, shared=shared) for part in ((0, 1), (2, 3))]
    assert torch.equal(torch.cat([half.initial() for half in halves]), whole.initial())
    both = torch.cat([half.at(5, range(6)) for half in halves])
    assert torch.equal(both, whole.at(5, range(12)))


def test_step_noise_is_the_same_with_shared_and_with_independent_start() -> None:
    """So a comparison of the two differs by their starts alone."""
    assert torch.equal(
        small_noise(shared=True).at(1, range(6)), small_noise(shared=False).at(1, range(6))
    )
