import math
from functools import partial

import pytest
import torch

from mixgrpo.maths import transitions
from mixgrpo.maths.schedule import Step, make_sigmas, step_at
from mixgrpo.maths.transitions import (
    Normal,
    cps,
    dance_sde,
    euler,
    flow_sde,
    guarded_log_ratio,
    log_prob,
    log_ratio,
    make_log_ratio,
    make_transition,
    precise,
    predict_data,
    predict_noise,
    sample,
    unscaled_log_prob,
    unscaled_log_ratio,
)

from .gaussian_flow import integrate, marginal, ode_solution, propagate

KINDS = ["flow_sde", "dance_sde", "cps", "precise"]


def _step(sigma: float, after: float, after_one: float = 0.9) -> Step:
    return Step(*(torch.tensor(value, dtype=torch.float64) for value in (sigma, after, after_one)))


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------ one step, by hand


def test_predictions_and_euler_by_hand():
    x, v = torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 3.0)
    step = _step(0.75, 0.5)
    assert float(predict_data(x, v, step)) == 2 - 0.75 * 3
    assert float(predict_noise(x, v, step)) == 2 + 0.25 * 3
    assert float(euler(x, v, step)) == 2 - 0.25 * 3


def test_flow_sde_by_hand():
    normal = flow_sde(torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 3.0), _step(0.8, 0.6), 0.5)
    # g^2 = .25 * .8/.2 = 1; x1_hat = 2.6; mean = 2 - .2 * (3 + 2.6/1.6); std = sqrt(.2)
    assert float(normal.mean) == pytest.approx(2 - 0.2 * (3 + 2.6 / 1.6))
    assert float(normal.std) == pytest.approx(math.sqrt(0.2))


def test_flow_sde_at_sigma_one_uses_the_sigma_after_it():
    x, v = torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 3.0)
    normal = flow_sde(x, v, _step(1.0, 0.8, after_one=0.8), 0.5)
    # g^2 = .25 * 1/(1 - .8) = 1.25; x1_hat = x = 2
    assert float(normal.mean) == pytest.approx(2 - 0.2 * (3 + 1.25 / 2 * 2))
    assert float(normal.std) == pytest.approx(math.sqrt(1.25 * 0.2))


def test_dance_sde_by_hand():
    normal = dance_sde(torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 3.0), _step(0.8, 0.6), 0.5)
    assert float(normal.mean) == pytest.approx(2 - 0.2 * (3 + 0.25 / 1.6 * 2.6))
    assert float(normal.std) == pytest.approx(0.5 * math.sqrt(0.2))


def test_cps_by_hand():
    normal = cps(torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 3.0), _step(0.8, 0.6), 1 / 3)
    # sin 30 = 1/2, cos 30 = sqrt(3)/2; x0_hat = -.4, x1_hat = 2.6
    assert float(normal.std) == pytest.approx(0.3)
    assert float(normal.mean) == pytest.approx(0.4 * -0.4 + 0.3 * math.sqrt(3) * 2.6)


def test_precise_by_hand():
    normal = precise(torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 3.0), _step(0.8, 0.6), 1.0)
    # rho = .6*.2/(.8*.4) = .375
    assert float(normal.std) == pytest.approx(0.6 * math.sqrt(0.625))
    assert float(normal.mean) == pytest.approx(0.4 * -0.4 + 0.6 * math.sqrt(0.375) * 2.6)


def test_precise_at_sigma_one_draws_all_noise_anew():
    x, v = _random(2, 3, 4), _random(2, 3, 4, seed=1)
    step = _step(1.0, 0.8, after_one=0.8)
    normal = precise(x, v, step, 0.7)
    assert float(normal.std) == pytest.approx(0.8)
    torch.testing.assert_close(normal.mean, 0.2 * (x - v))


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_has_the_stated_mean_and_std(kind):
    sigmas = make_sigmas(10, 3.0).double()
    for index in (0, 4):
        x, v = torch.full((1, 1, 1), 0.8), torch.full((1, 1, 1), -0.3)
        normal = make_transition(kind, 0.7)(x, v, step_at(sigmas, index))
        drawn = sample(normal, _random(1, 400_000, 1, seed=index))
        assert float(drawn.mean()) == pytest.approx(float(normal.mean), abs=5e-3)
        assert float(drawn.std()) == pytest.approx(float(normal.std), rel=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_small_eta_is_the_euler_step(kind):
    x, v = _random(2, 3, 4), _random(2, 3, 4, seed=1)
    step = step_at(make_sigmas(10, 3.0).double(), 4)
    normal = make_transition(kind, 1e-6)(x, v, step)
    torch.testing.assert_close(normal.mean, euler(x, v, step), rtol=0, atol=1e-10)
    assert 0 < float(normal.std) < 1e-5


@pytest.mark.parametrize("kind", ["cps", "precise"])
@pytest.mark.parametrize("eta", [0.1, 0.7, 1.0])
def test_coefficients_are_preserved(kind, eta):
    """mean = (1-s')*x0_hat + k*x1_hat with k^2 + std^2 = s'^2, at every step but the last."""
    sigmas = make_sigmas(10, 3.0).double()
    for index in range(9):
        step = step_at(sigmas, index)
        x, v = torch.ones(1, 1, 1).double(), torch.zeros(1, 1, 1).double()  # x0_hat = x1_hat = 1
        normal = make_transition(kind, eta)(x, v, step)
        kept = float(normal.mean) - float(1 - step.sigma_next)
        assert kept**2 + float(normal.std) ** 2 == pytest.approx(float(step.sigma_next) ** 2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_stochastic_step_is_finite_with_positive_std_in_float32(kind):
    for steps in (2, 10, 50):
        sigmas = make_sigmas(steps, 3.0)
        x, v = _random(2, 3, 4).float(), _random(2, 3, 4, seed=1).float()
        for index in range(steps - 1):
            normal = make_transition(kind, 0.7)(x, v, step_at(sigmas, index))
            assert bool(normal.mean.isfinite().all())
            assert 0 < float(normal.std) < 2


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_velocity_finitely_also_at_sigma_one(kind):
    v = _random(3, 2, 2).float().requires_grad_()
    steps = step_at(make_sigmas(8, 3.0), torch.tensor([0, 3, 6]))
    make_transition(kind, 0.7)(torch.ones(3, 2, 2), v, steps).mean.sum().backward()
    assert v.grad is not None
    assert bool(v.grad.isfinite().all())
    assert bool((v.grad != 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_steps_per_sample_equal_the_steps_one_by_one(kind):
    sigmas, index = make_sigmas(8, 3.0), torch.tensor([5, 0, 6])
    x, v = _random(3, 2, 4).float(), _random(3, 2, 4, seed=1).float()
    together = make_transition(kind, 0.7)(x, v, step_at(sigmas, index))
    for row, i in enumerate(index.tolist()):
        alone = make_transition(kind, 0.7)(x[row : row + 1], v[row : row + 1], step_at(sigmas, i))
        torch.testing.assert_close(together.mean[row], alone.mean[0])
        torch.testing.assert_close(together.std[row].squeeze(), alone.std)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_inputs_are_computed_in_float32(kind):
    x, v = _random(2, 3, 4).bfloat16(), _random(2, 3, 4, seed=1).bfloat16()
    step = step_at(make_sigmas(10, 3.0), 4)
    low = make_transition(kind, 0.7)(x, v, step)
    high = make_transition(kind, 0.7)(x.float(), v.float(), step)
    assert low.mean.dtype == torch.float32
    assert torch.equal(low.mean, high.mean)
    assert euler(x, v, step).dtype == sample(low, x).dtype == torch.float32
    assert log_prob(x, low).dtype == log_ratio(x, x, v, low.std).dtype == torch.float32


# ------------------------------------------------------------------ many steps, closed form


def _times(steps: int, front: float = 0.95, end: float = 0.0) -> torch.Tensor:
    return torch.linspace(front, end, steps + 1, dtype=torch.float64)


def test_euler_converges_to_the_exact_ode():
    x = torch.tensor([-1.0, 0.4, 2.0], dtype=torch.float64).reshape(3, 1, 1)
    errors = []
    for steps in (500, 1000):
        sigmas = _times(steps, front=1.0)
        found = integrate(x, sigmas, euler)
        errors.append(float((found - ode_solution(x, sigmas[0], sigmas[-1])).abs().max()))
    assert errors[1] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("end", [0.6, 0.3, 0.05])
@pytest.mark.parametrize(
    ("kind", "eta"), [("flow_sde", 0.7), ("dance_sde", 0.3), ("dance_sde", 1.0), ("precise", 0.7)]
)
def test_sdes_keep_the_flows_marginals(kind, eta, end):
    """Started on the marginal at sigma .95 they end on the marginal, to first order in dt."""
    errors = []
    for steps in (400, 800):
        sigmas = _times(steps, end=end)
        mean, var = propagate(marginal(sigmas[0]), sigmas, make_transition(kind, eta))
        true_mean, true_var = marginal(sigmas[-1])
        assert mean == pytest.approx(true_mean, abs=2e-3)
        errors.append(abs(var - true_var))
        assert errors[-1] < 1e-2 * true_var
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.15)


def test_precise_starts_from_pure_noise():
    sigmas = _times(800, front=1.0, end=0.05)
    mean, var = propagate((0.0, 1.0), sigmas, make_transition("precise", 0.7))
    assert (mean, var) == pytest.approx(marginal(sigmas[-1]), rel=1e-2)


def test_mixed_sampling_ends_on_the_data():
    """ODE, then a window of SDE steps, then ODE to sigma 0: MixGRPO's rollout in the limit."""
    sigmas = _times(2000, front=1.0)

    def ode(x: torch.Tensor, v: torch.Tensor, step: Step) -> Normal:
        return Normal(euler(x, v, step), torch.zeros(()))

    moments = propagate((0.0, 1.0), sigmas[:501], ode)
    moments = propagate(moments, sigmas[500:1501], make_transition("flow_sde", 0.7))
    mean, var = propagate(moments, sigmas[1500:], ode)
    assert mean == pytest.approx(0.5, abs=2e-3)
    assert math.sqrt(var) == pytest.approx(0.3, rel=1e-2)


@pytest.mark.parametrize(("kind", "eta"), [("cps", 0.5), ("cps", 1.0), ("precise", 0.7)])
def test_coefficient_preserving_steps_are_exact_for_perfect_predictions(kind, eta):
    """One data point (std 0): x0_hat and x1_hat are the truth, so 5 coarse steps stay exact."""
    sigmas = make_sigmas(6, 3.0)[:-1].double()
    for stop in range(2, 7):
        found = propagate((0.0, 1.0), sigmas[:stop], make_transition(kind, eta), std=0.0)
        assert found == pytest.approx(marginal(sigmas[stop - 1], std=0.0), abs=1e-12)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde"])
def test_euler_maruyama_adds_variance_at_coarse_steps_where_the_others_do_not(kind):
    sigmas = make_sigmas(6, 3.0)[:-1].double()
    _, var = propagate((0.0, 1.0), sigmas, make_transition(kind, 0.7), std=0.0)
    assert var > 1.02 * marginal(sigmas[-1], std=0.0)[1]


def test_precise_is_flow_sde_to_first_order():
    x, v = torch.full((1, 1, 1), 0.8).double(), torch.full((1, 1, 1), -0.3).double()
    gaps = []
    for dt in (1e-3, 1e-4):
        step = _step(0.6, 0.6 - dt)
        one, other = precise(x, v, step, 0.7), flow_sde(x, v, step, 0.7)
        assert float(one.std / other.std) == pytest.approx(1, abs=3 * dt)
        gaps.append(abs(float(one.mean - other.mean)))
    assert gaps[0] / gaps[1] == pytest.approx(100, rel=0.05)


def test_monte_carlo_agrees_with_the_propagated_moments():
    """Sampled paths of the sharp helper above, so that it cannot be wrong in silence."""
    sigmas, transition = _times(20, end=0.2), make_transition("flow_sde", 0.7)
    generator = torch.Generator().manual_seed(3)
    mean, var = marginal(sigmas[0])
    noise = partial(torch.randn, 1, 100_000, 1, generator=generator, dtype=torch.float64)
    x = mean + math.sqrt(var) * noise()
    x = integrate(x, sigmas, lambda x, v, step: sample(transition(x, v, step), noise()))
    mean, var = propagate(marginal(sigmas[0]), sigmas, transition)
    assert float(x.mean()) == pytest.approx(mean, abs=5e-3)
    assert float(x.var()) == pytest.approx(var, rel=2e-2)


# ------------------------------------------------------------------ densities and ratios


@pytest.mark.parametrize("std_shape", [(), (4, 1, 1)])
def test_log_prob_is_the_normal_density_averaged(std_shape):
    x, mean = _random(4, 5, 6), _random(4, 5, 6, seed=1)
    std = 0.1 + _random(*std_shape, seed=2).abs()
    expected = torch.distributions.Normal(mean, std).log_prob(x).mean((1, 2))
    torch.testing.assert_close(log_prob(x, Normal(mean, std)), expected)


@pytest.mark.parametrize("std_shape", [(), (4, 1, 1)])
def test_log_ratio_is_the_difference_of_log_probs(std_shape):
    x, new, old = (_random(4, 5, 6, seed=seed) for seed in range(3))
    std = 0.1 + _random(*std_shape, seed=3).abs()
    expected = log_prob(x, Normal(new, std)) - log_prob(x, Normal(old, std))
    torch.testing.assert_close(log_ratio(x, new, old, std), expected, rtol=1e-10, atol=0)
    unscaled = unscaled_log_prob(x, Normal(new, std)) - unscaled_log_prob(x, Normal(old, std))
    found = unscaled_log_ratio(x, new, old, std)
    torch.testing.assert_close(found, unscaled, rtol=1e-10, atol=0)


def test_unscaled_log_prob_by_hand():
    normal = Normal(torch.tensor([[[1.0, 2.0]]]), torch.tensor(9.0))
    assert unscaled_log_prob(torch.tensor([[[2.0, 4.0]]]), normal).tolist() == [-2.5]


def test_log_ratio_keeps_its_digits_where_the_difference_cancels():
    old, noise = _random(2, 64, 16).float(), _random(2, 64, 16, seed=1).float()
    # Steps of 2^-12 added to values on a 2^-8 grid: the means' difference is exact in float32.
    old = (old * 256).round() / 256
    new = old + 2.0**-12 * torch.sign(_random(2, 64, 16, seed=2)).float()
    std = torch.tensor(0.5)
    x = old + std * noise
    truth = log_ratio(x.double(), new.double(), old.double(), std.double())
    from_means = log_ratio(x, new, old, std).double()
    from_densities = (log_prob(x, Normal(new, std)) - log_prob(x, Normal(old, std))).double()
    error = (from_means - truth).abs().max()
    assert float(error) < 1e-9  # clip ranges are 1e-6 and up
    assert float((from_densities - truth).abs().max()) > 10 * float(error)


def test_log_ratio_of_equal_means_is_exactly_zero():
    x, mean = _random(3, 4, 5).float(), _random(3, 4, 5, seed=1).float()
    assert log_ratio(x, mean, mean.clone(), torch.tensor(1e-3)).tolist() == [0, 0, 0]


def test_expected_log_ratio_is_minus_the_kl():
    """E_old[log ratio] = -KL = -(difference)^2/(2 std^2)."""
    old = torch.zeros(1, 400_000, 1)
    x = 0.5 * _random(1, 400_000, 1).float()
    found = log_ratio(x, old + 0.1, old, torch.tensor(0.5))
    assert float(found) == pytest.approx(-(0.1**2) / (2 * 0.5**2), abs=2e-3)


@pytest.mark.parametrize("std_shape", [(), (4, 1, 1)])
def test_guarded_log_ratio_is_the_papers(std_shape):
    """exp((log rho + mean_D[(new - old)^2] / (2 std^2)) * std), GRPO-Guard's equation."""
    x, new, old = (_random(4, 5, 6, seed=seed) for seed in range(3))
    std = 0.1 + _random(*std_shape, seed=3).abs()
    square = ((new - old) ** 2 / (2 * std**2)).mean((1, 2))
    expected = (log_ratio(x, new, old, std) + square) * std.flatten()
    found = guarded_log_ratio(x, new, old, std)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_guarded_log_ratio_by_hand():
    """x' = old + std*noise: mean_D[(new - old) * noise], whatever std is."""
    old, noise = torch.zeros(1, 1, 2), torch.tensor([[[1.0, -3.0]]])
    new = torch.tensor([[[0.5, 0.25]]])
    for std in (torch.tensor(0.25), torch.tensor(2.0)):
        found = guarded_log_ratio(old + std * noise, new, old, std)
        assert found.tolist() == pytest.approx([(0.5 * 1 - 0.25 * 3) / 2])


def test_guarded_log_ratio_has_no_bias():
    """Over the old policy's samples, where log rho lies below zero."""
    old, std = torch.zeros(1, 400_000, 1), torch.tensor(0.5)
    x = 0.5 * _random(1, 400_000, 1).float()
    assert float(guarded_log_ratio(x, old + 0.1, old, std)) == pytest.approx(0, abs=1e-3)
    assert float(log_ratio(x, old + 0.1, old, std)) < -0.01


# ------------------------------------------------------------------ choice by name


@pytest.mark.parametrize("kind", KINDS)
def test_make_transition_is_the_named_function(kind):
    x, v = _random(2, 3, 4), _random(2, 3, 4, seed=1)
    step = step_at(make_sigmas(10, 3.0).double(), 4)
    found, expected = (
        make_transition(kind, 0.7)(x, v, step),
        getattr(transitions, kind)(x, v, step, 0.7),
    )
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.std, expected.std)


def test_make_log_ratio_by_name():
    assert make_log_ratio("normal") is log_ratio
    assert make_log_ratio("unscaled") is unscaled_log_ratio


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_transition("sde", 0.7), "'sde'; known: flow_sde, dance_sde, cps, precise"),
        (lambda: make_transition("flow_sde", 0.0), "got 0.0.*no log-probability"),
        (lambda: make_transition("dance_sde", -0.3), "got -0.3"),
        (lambda: make_transition("flow_sde", math.nan), "got nan"),
        (lambda: make_transition("cps", 1.2), r"\(0, 1\], got 1.2"),
        (lambda: make_log_ratio("scaled"), "'scaled'; known: normal, unscaled"),
    ],
)
def test_errors_name_what_is_known(call, message):
    with pytest.raises(ValueError, match=message):
        call()
