"""Bootstrap intervals: pairs, and statistics of several means."""

from __future__ import annotations

import math

import pytest
import torch

from pyprune.evaluation.intervals import bootstrap, bootstrap_mean_of_means, bootstrap_of, paired_bootstrap, student_t


def test_pairs_are_drawn_together() -> None:
    a = torch.tensor([1.0, 0.0] * 50)
    assert paired_bootstrap(a, a) == (0.0, 0.0)
    shifted = paired_bootstrap(a, a - 0.25)
    assert shifted == pytest.approx((0.25, 0.25))
    low, high = paired_bootstrap(a, 1 - a)
    assert low < -0.15 < 0.15 < high
    # The same two means, 0.6 and 0.5: narrow where the two agree on most items, wide where they do not.
    dense = torch.tensor([1.0] * 60 + [0.0] * 40)
    low, high = paired_bootstrap(dense, torch.tensor([1.0] * 50 + [0.0] * 50))
    assert 0.03 < low < 0.1 < high < 0.18
    low, high = paired_bootstrap(dense, torch.tensor([0.0] * 40 + [1.0] * 50 + [0.0] * 10))
    assert low < -0.05 < 0.2 < high


def test_a_statistic_of_means() -> None:
    """A ratio that is the same for every item has no spread; of one column it is what `bootstrap` gives."""
    x = torch.arange(1.0, 41.0)
    low, high = bootstrap_of(torch.stack([x, 2 * x], 1), lambda m: m[:, 1] / m[:, 0])
    assert (low, high) == pytest.approx((2.0, 2.0))
    assert bootstrap_of(x[:, None], lambda m: m[:, 0], seed=3) == bootstrap(x, seed=3)
    spread = 2.0227 * float(x.std(correction=1)) / math.sqrt(40)  # Student's t of 39
    assert bootstrap(x) == pytest.approx((20.5 - spread, 20.5 + spread), abs=0.4)


def test_few_items_have_intervals_that_hold_the_mean() -> None:
    """Of 400 samples of 8, and of 6 groups of 4: 95 % and no fewer than chance explains; by bare percentiles 89 %."""
    drawn = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)).double()
    held = sum(low <= 0 <= high for low, high in (bootstrap(row, i) for i, row in enumerate(drawn)))
    assert 0.93 < held / 400 < 0.98
    groups = torch.randn(200, 6, 4, generator=torch.Generator().manual_seed(1)).double()
    found = [bootstrap_mean_of_means([*row], 10 * i) for i, row in enumerate(groups)]
    assert sum(low <= 0 <= high for low, high in found) > 0.93 * 200
    assert [student_t(n) for n in (3, 9, 30)] == pytest.approx([3.182, 2.262, 2.042], rel=2e-3)


def test_samples_without_a_value_do_not_count() -> None:
    x = torch.tensor([[0.0], [1.0]])
    low, high = bootstrap_of(x, lambda m: torch.where(m[:, 0] > 0.75, m[:, 0], torch.nan))
    assert (low, high) == (1.0, 1.0)
    assert all(math.isnan(v) for v in bootstrap_of(x, lambda m: m[:, 0] * torch.nan))
