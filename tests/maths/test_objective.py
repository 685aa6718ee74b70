import math

import pytest
import torch
from torch import Tensor

from mixgrpo.maths.objective import (
    Prediction,
    adapted_kl_weight,
    clipped_loss,
    is_clipped,
    kl_to_reference,
    make_kl,
)
from mixgrpo.maths.transitions import log_ratio

RATIOS = torch.tensor([1.0, 1.1, 1.5, 0.9, 0.5], dtype=torch.float64)


def _gradient(log_ratio: Tensor, advantages: Tensor, clip: float) -> list[float]:
    log_ratio = log_ratio.clone().requires_grad_()
    clipped_loss(log_ratio, advantages, clip).sum().backward()
    assert log_ratio.grad is not None
    return log_ratio.grad.tolist()


def test_positive_advantage_by_hand():
    """Gains are capped at 1.2, losses are not: max(-2 rho, -2 clamp(rho, .8, 1.2))."""
    found = clipped_loss(RATIOS.log(), torch.full_like(RATIOS, 2.0), 0.2)
    assert found.tolist() == pytest.approx([-2, -2.2, -2.4, -1.8, -1.0])


def test_negative_advantage_by_hand():
    found = clipped_loss(RATIOS.log(), torch.full_like(RATIOS, -2.0), 0.2)
    assert found.tolist() == pytest.approx([2, 2.2, 3.0, 1.8, 1.6])


def test_clipped_where_the_clip_bites():
    log_ratio = RATIOS.log()
    assert is_clipped(log_ratio, torch.ones(5), 0.2).tolist() == [0, 0, 1, 0, 0]
    assert is_clipped(log_ratio, -torch.ones(5), 0.2).tolist() == [0, 0, 0, 0, 1]
    assert is_clipped(log_ratio, torch.zeros(5), 0.2).tolist() == [0] * 5
    assert is_clipped(log_ratio, torch.full((5,), math.nan), 0.2).tolist() == [0] * 5


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_gradient_is_minus_a_times_rho_except_where_clipped(advantage):
    advantages = torch.full_like(RATIOS, advantage)
    clipped = is_clipped(RATIOS.log(), advantages, 0.2)
    expected = torch.where(clipped, 0, -advantages * RATIOS)
    assert bool(clipped.any())
    assert _gradient(RATIOS.log(), advantages, 0.2) == pytest.approx(expected.tolist())


def test_on_policy_gradient_is_minus_the_advantage():
    advantages = torch.tensor([1.5, -0.3, 0.0])
    assert _gradient(torch.zeros(3), advantages, 1e-4) == pytest.approx(advantages.neg().tolist())


def test_descent_makes_good_samples_likelier():
    """Through the means: a step against the gradient moves the mean towards a good sample."""
    x = torch.ones(2, 3, 1)
    mean = torch.zeros(2, 3, 1, requires_grad=True)
    ratio = log_ratio(x, mean, torch.zeros(2, 3, 1), torch.tensor(0.5))
    clipped_loss(ratio, torch.tensor([1.0, -1.0]), 1e-4).sum().backward()
    assert mean.grad is not None
    assert bool((mean.grad[0] < 0).all())
    assert bool((mean.grad[1] > 0).all())


@pytest.mark.parametrize("clip", [1e-6, 1e-4])
def test_tiny_clip_ranges_are_sharp_in_float32(clip):
    """A float32 ratio has steps of 1.2e-7, a tenth of the smallest clip; its logarithm has not."""
    inside, outside = math.log1p(clip) * 0.99, math.log1p(clip) * 1.01
    log_ratios = torch.tensor([inside, outside, -inside, -outside])
    assert is_clipped(log_ratios, torch.ones(4), clip).tolist() == [0, 1, 0, 0]
    assert is_clipped(log_ratios, -torch.ones(4), clip).tolist() == [0, 0, 0, 1]
    zero = [value == 0 for value in _gradient(log_ratios, torch.ones(4), clip)]
    assert zero == [False, True, False, False]


@pytest.mark.parametrize("clip", [0.0, -1e-4, 1.0, math.nan])
@pytest.mark.parametrize("function", [clipped_loss, is_clipped])
def test_clip_range_outside_zero_to_one_is_an_error(function, clip):
    with pytest.raises(ValueError, match=rf"\(0, 1\), got {clip}"):
        function(torch.zeros(1), torch.ones(1), clip)


@pytest.mark.parametrize("std_shape", [(), (2, 1, 1)])
def test_kl_is_that_of_two_normals(std_shape):
    generator = torch.Generator().manual_seed(0)
    mean, reference = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    std = 0.2 + torch.rand(std_shape, generator=generator, dtype=torch.float64)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(reference, std))
    torch.testing.assert_close(kl_to_reference(mean, reference, std), expected.mean((1, 2)))


def test_kl_of_equal_means_is_zero_and_pulls_back_otherwise():
    reference = torch.zeros(1, 2, 1)
    assert kl_to_reference(reference, reference, torch.tensor(0.5)).tolist() == [0]
    mean = torch.full((1, 2, 1), 0.3, requires_grad=True)
    kl_to_reference(mean, reference, torch.tensor(0.5)).sum().backward()
    assert mean.grad is not None
    assert mean.grad.flatten().tolist() == pytest.approx([0.3 / 0.25 / 2] * 2)


def _prediction(v: float, mean: float) -> Prediction:
    return Prediction(torch.full((2, 3, 1), v), torch.full((2, 3, 1), mean), torch.tensor(0.5))


def test_forms_of_the_kl_by_hand():
    policy, reference = _prediction(2.0, 1.0), _prediction(1.7, 0.6)
    assert make_kl("mean")(policy, reference).tolist() == pytest.approx([0.4**2 / (2 * 0.25)] * 2)
    assert make_kl("velocity")(policy, reference).tolist() == pytest.approx([0.3**2] * 2)
    with pytest.raises(ValueError, match="'reverse'; known: mean, velocity"):
        make_kl("reverse")


def test_the_kl_weight_follows_ppos_rule():
    """Doubled above 1.5 times the target, halved below its 1.5th part, else kept."""
    found = [
        adapted_kl_weight(0.4, kl, target=0.03, first=0.4)
        for kl in (0.046, 0.044, 0.021, 0.019, 0.0)
    ]
    assert found == [0.8, 0.4, 0.4, 0.2, 0.4]


def test_the_kl_weight_can_come_back():
    """A target that is never reached must not drive it to 0, or beyond every number."""
    low = high = 0.5
    for _ in range(2000):
        low, high = (adapted_kl_weight(w, kl, 1.0, 0.5) for w, kl in ((low, 1e-9), (high, 1e9)))
    assert (low, high) == (0.5 / 1024, 512.0)
