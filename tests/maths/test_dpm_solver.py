import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from mixgrpo.maths.dpm_solver import DPMSolver, Euler, Prediction, dpm_step, make_solver
from mixgrpo.maths.schedule import flash_sigmas, make_sigmas, step_at
from mixgrpo.maths.transitions import euler, predict_data
from mixgrpo.types import Window

from .gaussian_flow import integrate, ode_solution, velocity


def _latent(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _curved(x: Tensor, sigma: Tensor) -> Tensor:
    """A nonlinear velocity, so that an error in any coefficient shows."""
    return torch.sin(2 * x) + sigma**2 * x.roll(1, -1) - 0.5 * sigma


def _ours(sigmas: Tensor, x: Tensor, order: int, variant: str) -> Tensor:
    solver = DPMSolver(sigmas, order, variant)
    for index in range(len(sigmas) - 1):
        step = step_at(sigmas, index)
        x = solver.step(x, _curved(x, step.sigma), step)
    return x


def _theirs(sigmas: Tensor, x: Tensor, order: int, variant: str) -> Tensor:
    """diffusers on the very same sigmas, which its own schedule, starting at 0.999, is replaced by.

    At sigma 1 its infinite lambda gives the same limits as ours, and its last step, to sigma 0, is
    of first order too: no step is left out. It rounds each step's sample to float32, which bounds
    the agreement.
    """
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        algorithm_type="dpmsolver++",
        solver_order=order,
        solver_type=variant,
    )
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    for index, sigma in enumerate(sigmas[:-1]):
        x = scheduler.step(_curved(x, sigma), scheduler.timesteps[index], x).prev_sample
    return x


@pytest.mark.parametrize("variant", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
# 6 and 14 steps lower the order at the end, 15 and 25 do not.
@pytest.mark.parametrize("steps", [2, 3, 6, 14, 15, 25])
def test_agrees_with_diffusers(steps, order, variant):
    sigmas, x = make_sigmas(steps, 3.0).double(), _latent()
    expected = _theirs(sigmas, x, order, variant)
    torch.testing.assert_close(_ours(sigmas, x, order, variant), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [2, 3])
def test_agrees_with_diffusers_from_below_sigma_one(order):
    sigmas, x = torch.linspace(0.9, 0, 9, dtype=torch.float64), _latent()
    expected = _theirs(sigmas, x, order, "midpoint")
    found = _ours(sigmas, x, order, "midpoint")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_float32_agrees_with_diffusers_on_a_flash_schedule(order):
    sigmas, x = flash_sigmas(25, 3.0, Window(2, 6), 0.4), _latent().float()
    found = _ours(sigmas, x, order, "midpoint")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, _theirs(sigmas, x, order, "midpoint"), rtol=1e-5, atol=1e-5)


def test_first_order_is_euler():
    sigmas, x = make_sigmas(12, 3.0).double(), _latent()
    for index in range(12):
        step = step_at(sigmas, index)
        v = _curved(x, step.sigma)
        found = DPMSolver(sigmas, order=1).step(x, v, step)
        torch.testing.assert_close(found, euler(x, v, step), rtol=1e-12, atol=1e-12)


def test_second_order_by_hand():
    """sigma 3/4, 1/2, 1/4 have lambda -log 3, 0, log 3: h = h0 = log 3, e^-h = 1/3."""
    x, m1, m0 = (torch.full((1, 1, 1), value, dtype=torch.float64) for value in (1.0, 2.0, 5.0))
    step = step_at(torch.tensor([0.75, 0.5, 0.25], dtype=torch.float64), 1)
    history = [Prediction(m1, 0.75), Prediction(m0, 0.5)]
    first = 0.5 * 1 + 0.75 * (2 / 3) * 5
    assert float(dpm_step(history, x, step, 1)) == pytest.approx(first)
    midpoint = first + 0.5 * 0.75 * (2 / 3) * 3
    assert float(dpm_step(history, x, step, 2, "midpoint")) == pytest.approx(midpoint)
    heun = first + 0.75 * (1 - (2 / 3) / math.log(3)) * 3
    assert float(dpm_step(history, x, step, 2, "heun")) == pytest.approx(heun)


def test_order_is_lowered_to_the_history():
    x, step = _latent(), step_at(torch.tensor([0.9, 0.7, 0.5, 0.3], dtype=torch.float64), 2)
    history = [Prediction(_latent(seed), sigma) for seed, sigma in ((1, 0.9), (2, 0.7), (3, 0.5))]
    assert torch.equal(dpm_step(history[2:], x, step, 3), dpm_step(history, x, step, 1))
    assert torch.equal(dpm_step(history[1:], x, step, 3), dpm_step(history, x, step, 2))
    assert not torch.equal(dpm_step(history, x, step, 3), dpm_step(history, x, step, 2))


@pytest.mark.parametrize("variant", ["midpoint", "heun"])
def test_prediction_at_sigma_one_falls_back_to_the_lower_order(variant):
    sigmas, x = torch.tensor([1.0, 0.9, 0.7, 0.5], dtype=torch.float64), _latent()
    history = [Prediction(_latent(seed), sigma) for seed, sigma in ((1, 1.0), (2, 0.9), (3, 0.7))]
    second = dpm_step(history[:2], x, step_at(sigmas, 1), 2, variant)
    assert torch.equal(second, dpm_step(history[:2], x, step_at(sigmas, 1), 1))
    third = dpm_step(history, x, step_at(sigmas, 2), 3, variant)
    torch.testing.assert_close(third, dpm_step(history, x, step_at(sigmas, 2), 2, "heun"))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_step_to_sigma_zero_returns_the_data_prediction(order):
    sigmas, x, v = make_sigmas(20, 3.0).double(), _latent(), _latent(1)
    solver = DPMSolver(sigmas, order)
    solver.observe(_latent(2), sigmas[17])
    solver.observe(_latent(3), sigmas[18])
    step = step_at(sigmas, 19)
    assert torch.equal(solver.step(x, v, step), predict_data(x, v, step))


def test_observed_predictions_count_like_the_solvers_own():
    """A solver that is told of another sampler's step goes on as if it had made the step."""
    sigmas, x = make_sigmas(20, 3.0).double(), _latent()
    alone, told = DPMSolver(sigmas, 3), DPMSolver(sigmas, 3)
    for index in range(6):
        step = step_at(sigmas, index)
        v = _curved(x, step.sigma)
        x_next = alone.step(x, v, step)
        if index in (2, 3):
            told.observe(predict_data(x, v, step), step.sigma)
        else:
            assert torch.equal(told.step(x, v, step), x_next)
        x = x_next


def test_solver_remembers_no_more_than_its_order():
    solver = DPMSolver(make_sigmas(20, 3.0), 2)
    for sigma in (0.9, 0.8, 0.7):
        solver.observe(_latent(), sigma)
    assert [prediction.sigma for prediction in solver.history] == [0.8, 0.7]


def _global_error(steps: int, order: int, variant: str) -> float:
    """On the Gaussian flow from sigma .95 to .05, with an exact past so that start-up is no issue.

    That past is the exact trajectory at earlier sigmas of like spacing.
    """
    sigmas = torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)
    solver = DPMSolver(sigmas, order, variant)
    x = torch.full((1, 1, 1), 1.3, dtype=torch.float64)
    for back in range(order - 1, 0, -1):
        sigma = sigmas[0] + back * 0.9 / steps
        past = ode_solution(x, sigmas[0], sigma)
        solver.observe(past - sigma * velocity(past, sigma), sigma)
    found = integrate(x, sigmas, solver.step)
    return abs(float(found - ode_solution(x, sigmas[0], sigmas[-1])))


@pytest.mark.parametrize(
    ("order", "variant", "low", "high"),
    # Order 3's D2 is half of what third order needs (see its docstring): it converges with order 2.
    [
        (1, "midpoint", 0.9, 1.1),
        (2, "midpoint", 1.9, 2.1),
        (2, "heun", 1.9, 2.1),
        (3, "heun", 1.7, 2.1),
    ],
)
def test_order_of_convergence(order, variant, low, high):
    coarse, fine = _global_error(200, order, variant), _global_error(400, order, variant)
    assert low < math.log2(coarse / fine) < high


def test_each_order_is_more_accurate_than_the_one_before():
    errors = [_global_error(100, order, "midpoint") for order in (1, 2, 3)]
    assert errors[0] > 10 * errors[1] > 40 * errors[2]


def test_euler_solver_is_the_euler_step_and_has_no_memory():
    sigmas, x, v = make_sigmas(5, 3.0), _latent(), _latent(1)
    solver, step = Euler(), step_at(make_sigmas(5, 3.0), 2)
    solver.observe(_latent(2), sigmas[1])
    assert torch.equal(solver.step(x, v, step), euler(x, v, step))


def test_make_solver_by_name():
    sigmas = make_sigmas(5, 3.0)
    assert isinstance(make_solver("euler", sigmas), Euler)
    solver = make_solver("dpm", sigmas, 3, "heun")
    assert isinstance(solver, DPMSolver)
    assert (solver.order, solver.variant) == (3, "heun")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ddim",), "'ddim'; known: euler, dpm"),
        (("dpm", 4), "must be 1, 2 or 3, got 4"),
        (("dpm", 0), "got 0"),
        (("dpm", 2, "bh2"), "'bh2'; known: midpoint, heun"),
    ],
)
def test_errors_name_what_is_known(arguments, message):
    kind, *rest = arguments
    with pytest.raises(ValueError, match=message):
        make_solver(kind, make_sigmas(5, 3.0), *rest)
