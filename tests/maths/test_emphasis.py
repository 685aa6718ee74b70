import math

import pytest
import torch
from torch import Tensor

from mixgrpo.maths.emphasis import (
    balanced,
    best_and_worst,
    step_weights,
    trained_steps,
    without_equal_groups,
)
from mixgrpo.maths.schedule import make_sigmas
from mixgrpo.maths.transitions import make_transition
from mixgrpo.types import Window

NAN = math.nan


def _doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------ best of a group


def test_best_and_worst_by_hand():
    advantages = _doubles(0.1, 2.0, -1.0, -0.2, 0.5, -1.4, 3.0, -3.0, 0.0, 1.0, 2.0, -2.0)
    assert best_and_worst(advantages, 6, 2).tolist() == [1, 5, 6, 7]
    assert best_and_worst(advantages, 6, 4).tolist() == [1, 2, 4, 5, 6, 7, 10, 11]
    assert best_and_worst(advantages, 6, 6).tolist() == list(range(12))


def test_among_equals_every_group_still_keeps_as_many():
    assert len(best_and_worst(torch.zeros(12), 6, 4).unique()) == 8


@pytest.mark.parametrize(
    ("values", "count", "kept"),
    [
        ((NAN, 1.0, -1.0, 0.2, 0.1, NAN), 2, {1, 2}),
        ((NAN, 1.0, -1.0, 0.2, 0.1, NAN), 4, {1, 2, 3, 4}),
        ((NAN, 5.0, 4.0, 3.0, NAN, NAN), 4, {1, 2, 3}),  # and one that failed
        ((NAN,) * 6, 2, set()),
    ],
)
def test_failed_samples_are_kept_only_where_valid_ones_do_not_suffice(values, count, kept):
    found = best_and_worst(_doubles(*values), 6, count).tolist()
    assert len(set(found)) == count
    assert {row for row in found if not math.isnan(values[row])} == kept


# ------------------------------------------------------------------ groups and signs


def test_equal_groups_leave_the_average_to_the_others():
    advantages = _doubles(1, -1, 0, 0, NAN, 0, 2, NAN)
    weights = without_equal_groups(advantages, 2)
    assert weights.tolist() == [2, 2, 0, 0, 0, 0, 2, 2]
    # The sum over all, divided by all, is the mean over the groups that count.
    loss = _doubles(1, 2, 50, 60, 70, 80, 3, 4)
    assert float((weights * loss).mean()) == (1 + 2 + 3 + 4) / 4


def test_where_all_groups_are_equal_none_counts():
    assert without_equal_groups(torch.zeros(6), 3).tolist() == [0] * 6


def test_balanced_by_hand():
    found = balanced(_doubles(4, 2, 0, -1, -1, NAN))
    # 6 up and 2 down become 4 and 4
    assert found[:5].tolist() == pytest.approx([4 * 4 / 6, 2 * 4 / 6, 0, -2, -2])
    assert found[5].isnan()


@pytest.mark.parametrize("values", [(1.0, 2.0, 0.0), (-1.0, 0.0, -3.0), (0.0, 0.0, 0.0)])
def test_one_sign_alone_stays(values):
    assert balanced(_doubles(*values)).tolist() == list(values)


# ------------------------------------------------------------------ steps


def test_step_weights_by_hand():
    sigmas, window = make_sigmas(4, 1.0), Window(1, 3)  # 1, .75, .5, .25, 0
    transition = make_transition("dance_sde", 0.3)
    assert step_weights("equal", sigmas, window, transition).tolist() == [1, 1]
    assert step_weights("inverse_dt", sigmas, window, transition).tolist() == [4, 4]
    assert step_weights([2.0, 0.5], sigmas, window, transition).tolist() == [2, 0.5]


def test_inverse_dt_follows_the_shift():
    sigmas = make_sigmas(10, 3.0)
    found = step_weights("inverse_dt", sigmas, Window(0, 2), make_transition("cps", 0.5))
    # sigma = 3u / (1 + 2u): 1, 2.7/2.8, 2.4/2.6
    assert found.tolist() == pytest.approx([1 / (1 - 2.7 / 2.8), 1 / (2.7 / 2.8 - 2.4 / 2.6)])


@pytest.mark.parametrize("kind", ["flow_sde", "cps", "precise"])
def test_noise_weights_are_the_steps_own_noise(kind):
    sigmas = make_sigmas(10, 3.0)
    found = step_weights("noise", sigmas, Window(0, 9), make_transition(kind, 0.7))
    assert float(found.mean()) == pytest.approx(1)
    if kind == "cps":  # std = s' sin(0.35 pi)
        assert found.tolist() == pytest.approx((sigmas[1:10] / sigmas[1:10].mean()).tolist())


def test_an_unknown_step_weight_is_an_error():
    with pytest.raises(ValueError, match="'sometimes'; known: equal, inverse_dt, noise"):
        step_weights("sometimes", make_sigmas(4, 1.0), Window(0, 1), make_transition("cps", 0.5))


@pytest.mark.parametrize(
    ("steps", "fraction", "trained"),
    [(24, 0.6, 14), (15, 0.6, 9), (4, 1.0, 4), (100, 0.29, 29), (3, 0.1, 1), (1, 0.5, 1)],
)
def test_trained_steps_are_the_whole_part_of_the_share(steps, fraction, trained):
    """DanceGRPO's 14 of 24 and 9 of 15 among them."""
    assert trained_steps(steps, fraction) == trained
