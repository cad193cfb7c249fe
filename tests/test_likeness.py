"""Likeness of token sequences, counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyprune import InputError
from pyprune.evaluation import likeness

TOKENS = st.lists(st.integers(0, 4), max_size=9)


def test_overlap_by_hand() -> None:
    assert likeness.overlap([1, 2, 2, 3], [2, 2, 2, 4], 1) == pytest.approx(2 * 2 / 8)
    assert likeness.overlap([1, 2, 3], [1, 2, 4], 2) == pytest.approx(2 * 1 / 4)
    assert likeness.overlap([1], [2], 2) == 1.0 and likeness.overlap([1, 2], [1], 2) == 0.0


def test_edit_distance_by_hand() -> None:
    assert likeness.edit_distance([1, 2, 3, 4], [1, 3, 4]) == pytest.approx(1 / 4)
    assert likeness.edit_distance([1, 2], [3, 4]) == 1.0
    assert likeness.edit_distance([], []) == 0.0 and likeness.edit_distance([], [1]) == 1.0


@given(TOKENS, TOKENS)
def test_both_are_symmetric_and_know_equals(a: list[int], b: list[int]) -> None:
    for measure in (likeness.edit_distance, lambda x, y: likeness.overlap(x, y, 2)):
        assert measure(a, b) == measure(b, a) and 0 <= measure(a, b) <= 1
    assert likeness.edit_distance(a, a) == 0.0 and likeness.overlap(a, a, 1) == 1.0
    assert (likeness.edit_distance(a, b) == 0) == (a == b)


def test_divergence_by_hand() -> None:
    assert likeness.divergence([1, 2, 3], [1, 2, 4]) == 3
    assert likeness.divergence([1, 2], [1, 2, 4]) == 3 and likeness.divergence([1, 2, 4], [1, 2]) == 3
    assert likeness.divergence([1, 2], [1, 2]) is None and likeness.divergence([], []) is None


def test_distinct_and_habits_by_hand() -> None:
    assert likeness.distinct([[1, 1, 1], [1, 2]], 1) == pytest.approx(2 / 5)
    assert likeness.distinct([[1, 1, 1], [1, 2]], 2) == pytest.approx(2 / 3)
    assert likeness.distinct([[1]], 2) == 0.0
    found = likeness.habits([[7] * 8, [1, 2]])
    assert found == {
        "length": 5.0,
        "repetition": pytest.approx(0.4),
        "distinct1": 0.3,
        "distinct2": pytest.approx(2 / 8),
    }


def test_order_below_one() -> None:
    with pytest.raises(InputError, match="order must be at least 1; got 0"):
        likeness.grams([1], 0)
