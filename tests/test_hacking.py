"""The warning of reward hacking: when it is given, when not."""

from __future__ import annotations

import pytest

from mixgrpo.run.hacking import hacking_warning

WEIGHTS = {"a": 1.0, "b": 1.0, "c": 0.5, "held": 0.0, "judge": 0.0}


def history(**courses: list[float | None]) -> list[dict[str, float | None]]:
    """Validations, each behind a record of training, as metrics.jsonl holds them."""
    count = len(next(iter(courses.values())))
    steady = {name: [1.0] * count for name in WEIGHTS}
    records: list[dict[str, float | None]] = []
    for i in range(count):
        records.append({"iteration": i, "reward/a": 0.0})
        values = {name: course[i] for name, course in {**steady, **courses}.items()}
        records.append({f"validation/{name}": value for name, value in values.items()})
    return records


RISING, FALLING = [1.0, 1.1, 1.05, 1.2], [4.0, 3.0, 2.5, 2.0]


def test_trained_up_and_held_out_down_is_told_with_numbers_and_remedies():
    warning = hacking_warning(history(a=RISING, b=RISING, held=FALLING), WEIGHTS, 3)
    assert warning is not None
    assert "last 3 validations" in warning
    assert "(held 4 3 2.5 2)" in warning
    assert "judge" not in warning
    assert "hybrid inference" in warning
    assert "stop early" in warning


@pytest.mark.parametrize(
    ("courses", "patience"),
    [
        ({"a": RISING, "b": RISING}, 3),  # nothing held out falls
        ({"a": RISING, "held": FALLING}, 3),  # less than half of the weight rises
        ({"a": RISING, "b": RISING, "held": [4.0, 3.0, 3.0, 2.0]}, 3),  # not in each of them
        ({"a": RISING, "b": RISING, "held": [4.0, None, 3.0, 2.0]}, 3),  # one is not known
        ({"a": RISING, "b": RISING, "held": FALLING}, 4),  # too few validations
        ({"a": RISING, "b": RISING, "held": FALLING}, 0),  # off
        ({"a": RISING, "b": RISING, "c": FALLING}, 3),  # c is trained on
    ],
)
def test_no_warning(courses, patience):
    assert hacking_warning(history(**courses), WEIGHTS, patience) is None


def test_only_the_newest_validations_count():
    recovered = [*FALLING, 5.0]
    courses = {"a": [*RISING, 2.0], "b": [*RISING, 2.0], "held": recovered}
    assert hacking_warning(history(**courses), WEIGHTS, 3) is None
    fallen = {"a": [0.0, *RISING], "b": [0.0, *RISING], "held": [1.0, *FALLING]}
    assert hacking_warning(history(**fallen), WEIGHTS, 3) is not None
