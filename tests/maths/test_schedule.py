import inspect
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from mixgrpo.maths.schedule import (
    compressed_steps,
    dynamic_shift,
    flash_sigmas,
    make_sigmas,
    shift_time,
    step_at,
    uniform_times,
)
from mixgrpo.types import Window


def test_uniform_times_by_hand():
    u = uniform_times(4)
    assert u.dtype == torch.float64
    assert u.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_shift_by_hand():
    u = torch.tensor([1.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    assert shift_time(u, 3.0).tolist() == pytest.approx([1.0, 0.75, 0.5, 0.0], abs=1e-15)
    assert torch.equal(shift_time(u, 1.0), u)


def test_published_schedule_of_25_steps_at_shift_3():
    sigmas = make_sigmas(25, 3.0)
    expected = [1.0, 72 / 73, 69 / 71, 66 / 69, 63 / 67]  # 3u/(1+2u) at u = 1, .96, .92, ...
    assert sigmas.dtype == torch.float32
    assert sigmas.shape == (26,)
    assert sigmas[:5].tolist() == pytest.approx(expected, abs=1e-7)
    assert float(sigmas[-2]) == pytest.approx(3 / 27, abs=1e-7)


@pytest.mark.parametrize("shift", [0.3, 1.0, 1.1, 3.0, math.exp(1.15), 12.7])
@pytest.mark.parametrize("steps", [2, 3, 7, 25, 50])
def test_ends_are_exact_and_the_rest_falls(steps, shift):
    sigmas = make_sigmas(steps, shift)
    assert float(sigmas[0]) == 1.0
    assert float(sigmas[-1]) == 0.0
    assert bool((sigmas.diff() < 0).all())


@pytest.mark.parametrize("tokens", [64, 256, 1024, 2025, 4096, 6400])
def test_dynamic_shift_is_the_flux_pipelines(tokens):
    assert dynamic_shift(tokens) == pytest.approx(math.exp(calculate_shift(tokens)), rel=1e-12)
    defaults = inspect.signature(calculate_shift).parameters
    assert [defaults[name].default for name in ("base_seq_len", "max_seq_len")] == [256, 4096]


@pytest.mark.parametrize("steps", [4, 28, 50])
def test_sigmas_are_the_flux_schedulers(steps):
    uniform = np.linspace(1.0, 1 / steps, steps)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    dynamic.set_timesteps(sigmas=uniform, mu=calculate_shift(2025))
    torch.testing.assert_close(
        make_sigmas(steps, dynamic_shift(2025)), dynamic.sigmas, rtol=1e-6, atol=0
    )
    static = FlowMatchEulerDiscreteScheduler(shift=3.0)
    static.set_timesteps(sigmas=uniform)
    torch.testing.assert_close(make_sigmas(steps, 3.0), static.sigmas, rtol=1e-6, atol=0)


def _flash_evaluations(start: int, ratio: float) -> int:
    return len(flash_sigmas(25, 3.0, Window(start, start + 4), ratio)) - 1


def test_flash_keeps_the_base_up_to_the_window_and_spaces_the_tail_evenly():
    sigmas = flash_sigmas(25, 3.0, Window(3, 7), 0.4)
    base = make_sigmas(25, 3.0)
    assert torch.equal(sigmas[:8], base[:8])
    tail_u = torch.linspace(18 / 25, 0, 8, dtype=torch.float64)  # 18 steps left become 7
    torch.testing.assert_close(sigmas[7:], shift_time(tail_u, 3.0).float(), rtol=1e-6, atol=1e-12)
    assert float(sigmas[-1]) == 0.0


def test_flash_evaluations_are_the_published_ones():
    evaluations = [_flash_evaluations(start, 0.4) for start in range(21)]
    assert evaluations[:4] == [12, 13, 14, 14]  # 4 + l + round(0.4 * (21 - l))
    # The paper's "16 on average": windows at 0..12. The released 300 iterations at 25 per window
    # reach start 11 and average 15.7; at 20 per window they reach 14 and average 16.6.
    assert sum(evaluations[:13]) / 13 == 16
    assert sum(evaluations[:12]) / 12 == pytest.approx(15.67, abs=0.005)
    assert sum(evaluations[:15]) / 15 == pytest.approx(16.6)
    assert _flash_evaluations(0, 0.2) == 8  # Flash*


@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.4, 0.5, 0.99, 1.0])
def test_flash_always_ends_at_zero_and_never_lengthens(ratio):
    for start in range(21):
        window = Window(start, start + 4)
        sigmas = flash_sigmas(25, 3.0, window, ratio)
        left = 25 - window.stop
        assert len(sigmas) == window.stop + max(1, round(left * ratio)) + 1 <= 26
        assert float(sigmas[-1]) == 0.0
        assert bool((sigmas.diff() < 0).all())


def test_flash_at_ratio_one_is_the_base():
    for start in range(21):
        flash = flash_sigmas(25, 3.0, Window(start, start + 4), 1.0)
        torch.testing.assert_close(flash, make_sigmas(25, 3.0), rtol=1e-6, atol=0)


def test_a_prefix_of_fewer_steps_is_even_in_u():
    """Five steps before the window become round(5 * 0.4) = 2; window and tail stay."""
    window = Window(5, 7)
    found = flash_sigmas(10, 3.0, window, 0.4, before=0.4)
    u = torch.tensor([1, 0.75, 0.5, 0.4, 0.3, 0], dtype=torch.float64)
    torch.testing.assert_close(found, shift_time(u, 3.0).float(), rtol=1e-6, atol=0)
    assert torch.equal(found[2:], flash_sigmas(10, 3.0, window, 0.4)[5:])


@pytest.mark.parametrize("start", range(7))
def test_a_whole_prefix_is_the_base(start):
    window = Window(start, start + 2)
    found = flash_sigmas(10, 3.0, window, 0.4, before=1.0)
    assert torch.equal(found[: start + 3], make_sigmas(10, 3.0)[: start + 3])


def test_compressed_steps_are_none_only_for_none():
    found = [compressed_steps(count, 0.4) for count in range(6)]
    assert found == [0, 1, 1, 1, 2, 2]


def test_step_at_an_int_gives_scalars():
    sigmas = make_sigmas(4, 1.0)
    assert [float(part) for part in step_at(sigmas, 2)] == [0.5, 0.25, 0.75]
    assert all(part.shape == () for part in step_at(sigmas, 0))


def test_step_at_a_tensor_gives_each_sample_its_own_step():
    sigmas = make_sigmas(4, 1.0)
    step = step_at(sigmas, torch.tensor([0, 3, 1]))
    assert step.sigma.shape == step.sigma_next.shape == (3, 1, 1)
    assert step.sigma.flatten().tolist() == [1.0, 0.25, 0.75]
    assert step.sigma_next.flatten().tolist() == [0.75, 0.0, 0.5]
    latents = torch.zeros(3, 5, 2)
    assert all((latents * part).shape == (3, 5, 2) for part in step)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_sigmas(1, 3.0), "at least 2 steps, got 1"),
        (lambda: make_sigmas(25, 0.0), "shift must be a positive number.*got 0.0"),
        (lambda: make_sigmas(25, -1.0), "got -1.0"),
        (lambda: make_sigmas(25, math.nan), "got nan"),
        (lambda: make_sigmas(25, 1e12), "equal in float32"),
        (lambda: flash_sigmas(25, 3.0, Window(21, 25), 0.4), r"\[21, 25\).*stop at 24"),
        (lambda: flash_sigmas(25, 3.0, Window(0, 4), 0.0), r"\(0, 1\], got 0.0"),
        (lambda: flash_sigmas(25, 3.0, Window(0, 4), 1.5), "got 1.5"),
        (lambda: flash_sigmas(25, 3.0, Window(5, 9), 1.0, 0.0), "prefix ratio .*got 0.0"),
        (lambda: dynamic_shift(0), "image_tokens.*got 0"),
        (lambda: dynamic_shift(10, 256, 256), "both are 256"),
    ],
)
def test_errors_name_the_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()
