import math

import pytest
import torch
from torch import Tensor

from mixgrpo.maths.advantages import group_advantages

KINDS = ["advantage_sum", "reward_sum", "gdpo", "global_std"]
TWO_GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])


def _double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _random_scores(prompts: int, samples: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, prompts * samples, generator=generator, dtype=torch.float64)
    group = torch.arange(prompts).repeat_interleave(samples)
    return {"hps": 0.28 + 0.02 * draw[0], "pick": 22 + draw[1]}, group


def test_advantage_sum_by_hand():
    scores = {"a": _double(1, 2, 3, 0, 0, 6), "b": _double(30, 20, 10, 1, 1, 4)}
    found = group_advantages(scores, TWO_GROUPS, {"a": 3.0, "b": 1.0}, "advantage_sum", 5.0)
    # group 0: z(a) = -1 0 1, z(b) = 1 0 -1; group 1: both z-score (-2, -2, 4)/sqrt(12)
    second = [value / math.sqrt(12) for value in (-2, -2, 4)]
    assert found.tolist() == pytest.approx([-0.5, 0, 0.5, *second], abs=1e-7)


def test_reward_sum_by_hand():
    scores = {"a": _double(1, 2, 3, 0, 0, 6), "b": _double(30, 20, 10, 1, 1, 4)}
    found = group_advantages(scores, TWO_GROUPS, {"a": 1.0, "b": 1.0}, "reward_sum", 5.0)
    # sums 31 22 13 and 1 1 10: the reward with the larger scale decides
    second = [value / math.sqrt(12) for value in (-2, -2, 4)]
    assert found.tolist() == pytest.approx([1, 0, -1, *second], abs=1e-7)


def test_gdpo_by_hand():
    scores = {"a": _double(1, 2, 3, 0, 0, 6), "b": _double(30, 20, 10, 1, 1, 4)}
    found = group_advantages(scores, TWO_GROUPS, {"a": 3.0, "b": 1.0}, "gdpo", 5.0)
    summed = [-0.5, 0, 0.5] + [value / math.sqrt(12) for value in (-2, -2, 4)]
    std = math.sqrt((0.25 + 0.25 + 2) / 5)  # the mean is 0
    assert found.tolist() == pytest.approx([value / std for value in summed], abs=1e-7)
    assert float(found.std()) == pytest.approx(1, abs=1e-7)


def test_global_std_by_hand():
    scores = {"a": _double(1, 2, 3, 0, 0, 6)}
    found = group_advantages(scores, TWO_GROUPS, {"a": 7.0}, "global_std", 5.0)
    std = math.sqrt((1 + 0 + 1 + 4 + 4 + 16) / 6) + 1e-4  # both means are 2
    expected = [value / std for value in (-1, 0, 1, -2, -2, 4)]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_global_std_includes_what_lies_between_groups():
    scores = {"a": _double(0, 1, 10, 11)}
    found = group_advantages(scores, torch.tensor([0, 0, 1, 1]), {"a": 1.0}, "global_std", 5.0)
    std = math.sqrt(25 + 0.25) + 1e-4
    assert found.tolist() == pytest.approx([-0.5 / std, 0.5 / std] * 2, abs=1e-12)


def test_trimmed_statistics_by_hand():
    """A fifth of five at each end: the outlier moves neither mean (3) nor deviation (1)."""
    scores = {"a": _double(1, 2, 3, 4, 100, 7, 7, 7, 7, 9)}
    group = torch.tensor([0] * 5 + [1] * 5)
    found = group_advantages(scores, group, {"a": 1.0}, "advantage_sum", 5.0, trim=0.2)
    # 97 is clamped; the second group is equal but for its outlier, and has nothing to say
    assert found.tolist() == pytest.approx([-2, -1, 0, 1, 5, 0, 0, 0, 0, 0], abs=1e-6)


def test_trimming_ranks_the_valid_rewards_alone():
    scores = {"a": _double(math.nan, 1, 2, 3, 4, 100)}
    group = torch.zeros(6, dtype=torch.int64)
    found = group_advantages(scores, group, {"a": 1.0}, "advantage_sum", 5.0, trim=0.2)
    assert found[0].isnan()
    assert found[1:].tolist() == pytest.approx([-2, -1, 0, 1, 5], abs=1e-6)


def test_a_trimmed_sum_is_centred_on_its_own_trimmed_mean():
    scores = {"a": _double(0, 0, 0, 10, 0), "b": _double(1, 2, 3, 4, 5)}
    group = torch.zeros(5, dtype=torch.int64)
    halves = {"a": 1.0, "b": 1.0}
    # a is equal without its outlier: 0; the sum has b's order
    found = group_advantages(scores, group, halves, "reward_sum", 5.0, trim=0.2)
    assert found.tolist() == pytest.approx([-2, -1, 0, 1, 2], abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trim_below_one_sample_changes_nothing(kind):
    scores, group = _random_scores(3, 8)
    weights = {"hps": 1.0, "pick": 2.0}
    whole = group_advantages(scores, group, weights, kind, 5.0)
    trimmed = group_advantages(scores, group, weights, kind, 5.0, trim=0.12)
    torch.testing.assert_close(trimmed, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trim", [-0.1, 0.5, math.nan])
def test_a_trim_that_leaves_nothing_is_an_error(trim):
    with pytest.raises(ValueError, match=r"trim fraction must be in \[0, 0.5\), got"):
        group_advantages({"a": _double(1, 2)}, torch.tensor([0, 0]), {"a": 1.0}, KINDS[0], 5, trim)


def _one_by_one(scores: dict[str, Tensor], group: Tensor, weights: dict[str, float]) -> Tensor:
    """advantage_sum written with a loop, as a second opinion."""
    found = torch.zeros(len(group), dtype=torch.float64)
    for prompt in group.unique():
        members = group == prompt
        for name, weight in weights.items():
            values = scores[name][members]
            z = (values - values.mean()) / (values.std() + 1e-8)
            found[members] += z * weight / sum(weights.values())
    return found


def test_vectorised_equals_the_loop_for_groups_of_any_size_and_order():
    scores, group = _random_scores(5, 12)
    shuffle = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:47]
    scores, group = {name: value[shuffle] for name, value in scores.items()}, group[shuffle]
    weights = {"hps": 1.0, "pick": 2.0}
    found = group_advantages(scores, group, weights, "advantage_sum", 5.0)
    torch.testing.assert_close(found, _one_by_one(scores, group, weights), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_samples_permutes_advantages(kind):
    scores, group = _random_scores(4, 6)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    weights = {"hps": 1.0, "pick": 1.0}
    straight = group_advantages(scores, group, weights, kind, 5.0)
    permuted = {name: value[order] for name, value in scores.items()}
    found = group_advantages(permuted, group[order], weights, kind, 5.0)
    torch.testing.assert_close(found, straight[order], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_groups_advantages_sum_to_zero(kind):
    scores, group = _random_scores(4, 6)
    found = group_advantages(scores, group, {"hps": 1.0, "pick": 1.0}, kind, 50.0)
    torch.testing.assert_close(found.reshape(4, 6).sum(1), torch.zeros(4).double())
    assert float(found.abs().min()) > 0


@pytest.mark.parametrize("kind", ["advantage_sum", "gdpo", "reward_sum"])
def test_shifting_and_scaling_all_rewards_changes_nothing(kind):
    scores, group = _random_scores(4, 6)
    moved = {name: (value - 18) / 8 for name, value in scores.items()}
    weights = {"hps": 1.0, "pick": 1.0}
    torch.testing.assert_close(
        group_advantages(moved, group, weights, kind, 5.0),
        group_advantages(scores, group, weights, kind, 5.0),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_relative(kind):
    scores, group = _random_scores(4, 6)
    one = group_advantages(scores, group, {"hps": 1.0, "pick": 3.0}, kind, 5.0)
    other = group_advantages(scores, group, {"hps": 10.0, "pick": 30.0}, kind, 5.0)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.1, 0.0, -3.7, 22.123])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_of_equal_rewards_gets_exactly_zero(kind, value, dtype):
    other = torch.linspace(0, 1, 12, dtype=dtype)
    scores = {"a": torch.cat([torch.full((12,), value, dtype=dtype), other])}
    found = group_advantages(scores, torch.arange(24) // 12, {"a": 1.0}, kind, 5.0)
    assert found[:12].tolist() == [0.0] * 12
    assert float(found[12:].abs().min()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_equal_up_to_float32_rounding_get_exactly_zero(kind):
    base = torch.full((12,), 0.1)
    nudged = torch.where(torch.arange(12) % 3 == 0, torch.nextafter(base, base + 1), base)
    assert float(nudged.std()) > 0
    found = group_advantages({"a": nudged}, torch.zeros(12).long(), {"a": 1.0}, kind, 5.0)
    assert found.tolist() == [0.0] * 12


@pytest.mark.parametrize("kind", KINDS)
def test_small_but_real_differences_count(kind):
    scores = 22 + 1e-3 * torch.arange(12)
    found = group_advantages({"a": scores}, torch.zeros(12).long(), {"a": 1.0}, kind, 5.0)
    assert float(found[-1]) > 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_failed_sample_leaves_every_statistic(kind, bad):
    scores, group = _random_scores(3, 5)
    weights = {"hps": 1.0, "pick": 2.0}
    keep = torch.ones(15, dtype=torch.bool)
    keep[[1, 8]] = False
    scores["hps"][1] = bad
    scores["pick"][8] = bad
    found = group_advantages(scores, group, weights, kind, 5.0)
    assert found.isnan().tolist() == (~keep).tolist()
    kept = {name: value[keep] for name, value in scores.items()}
    without = group_advantages(kept, group[keep], weights, kind, 5.0)
    torch.testing.assert_close(found[keep], without, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_with_fewer_than_two_valid_samples_gets_zero(kind):
    nan = math.nan
    scores = {"a": torch.tensor([nan, nan, 0.4, nan, nan, nan, 0.1, 0.2, 0.9])}
    found = group_advantages(scores, torch.arange(9) // 3, {"a": 1.0}, kind, 5.0)
    assert found[:6].isnan().tolist() == [True, True, False, True, True, True]
    assert float(found[2]) == 0
    assert float(found[8]) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_all_failed_is_all_nan(kind):
    scores = {"a": torch.full((4,), math.nan)}
    assert group_advantages(scores, torch.zeros(4).long(), {"a": 1.0}, kind, 5.0).isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_without_weight_are_ignored_even_if_they_failed(kind):
    scores, group = _random_scores(3, 5)
    expected = group_advantages({"hps": scores["hps"]}, group, {"hps": 1.0}, kind, 5.0)
    scores["pick"][:] = math.nan
    assert torch.equal(group_advantages(scores, group, {"hps": 2.0}, kind, 5.0), expected)
    weights = {"hps": 1.0, "pick": 0.0}
    assert torch.equal(group_advantages(scores, group, weights, kind, 5.0), expected)


def test_advantages_are_clamped():
    scores = {"a": torch.tensor([0.0] * 99 + [1.0])}
    group = torch.zeros(100).long()
    free = group_advantages(scores, group, {"a": 1.0}, "advantage_sum", 50.0)
    assert float(free[-1]) == pytest.approx(9.9, abs=1e-3)
    clamped = group_advantages(scores, group, {"a": 1.0}, "advantage_sum", 5.0)
    assert float(clamped[-1]) == 5.0
    assert torch.equal(clamped[:-1], free[:-1])
    assert float(group_advantages({"a": -scores["a"]}, group, {"a": 1.0}, "gdpo", 5.0).min()) == -5


def test_dtype_follows_the_scores():
    group = torch.zeros(3).long()
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        scores = {"a": torch.tensor([1.0, 2.0, 3.0], dtype=dtype)}
        found = group_advantages(scores, group, {"a": 1.0}, "advantage_sum", 5.0)
        assert found.dtype == expected
        assert found.tolist() == pytest.approx([-1, 0, 1], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "mean"}, "'mean'; known: advantage_sum, reward_sum, gdpo, global_std"),
        ({"weights": {"a": -1.0}}, "'a' has weight -1.0"),
        ({"weights": {"a": math.nan}}, "'a' has weight nan"),
        ({"weights": {"a": 0.0}}, "no reward has a positive weight"),
        ({"weights": {}}, "no reward has a positive weight"),
        (
            {"weights": {"hps": 1.0}},
            "'hps' has a positive weight but no scores; there are scores for a",
        ),
        ({"scores": {"a": torch.zeros(3)}}, r"shape \(3,\) for \(2,\) samples"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
    ],
)
def test_errors_name_the_numbers(changes, message):
    arguments = {
        "scores": {"a": torch.tensor([1.0, 2.0])},
        "group": torch.tensor([0, 0]),
        "weights": {"a": 1.0},
        "kind": "advantage_sum",
        "clip": 5.0,
    }
    with pytest.raises(ValueError, match=message):
        group_advantages(**(arguments | changes))
