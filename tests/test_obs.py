"""Greedy second-order removal against a search that solves every least-squares problem anew."""

import pytest
import torch
from torch.testing import assert_close

from pyprune.base.statistics import ActivationStats
from pyprune.model.patterns import FFNWeights
from pyprune.pruning import importance
from pyprune.pruning.importance.obs import DAMPING, removal_errors
from pyprune.pruning.repair.least_squares import least_squares


def problem(f, d, tokens, seed=0):
    """Activations that depend on each other, and down rows."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(f, f, generator=generator, dtype=torch.float64)
    a = torch.randn(tokens, f, generator=generator, dtype=torch.float64) @ mix
    return a, torch.randn(f, d, generator=generator, dtype=torch.float64)


def ridged(a):
    h = a.t() @ a / len(a)
    return h + DAMPING * h.diagonal().mean() * torch.eye(len(h))


def loss_without(h, v, gone):
    """min tr((V - V')^T H (V - V')) over V' whose rows `gone` are zero."""
    kept = [j for j in range(len(v)) if j not in gone]
    change = v.clone()
    if kept:
        change[kept] -= torch.linalg.solve(h[kept][:, kept], h[kept] @ v)
    return float((change * (h @ change)).sum())


@pytest.mark.parametrize(("f", "d"), [(1, 3), (2, 1), (7, 5), (13, 4)])
def test_each_step_removes_what_least_squares_misses_least(f, d):
    a, v = problem(f, d, 64)
    h, gone, expected = ridged(a), [], torch.zeros(f, dtype=torch.float64)
    for _ in range(f):
        costs = {j: loss_without(h, v, [*gone, j]) for j in range(f) if j not in gone}
        gone.append(min(costs, key=costs.get))
        expected[gone[-1]] = costs[gone[-1]]
    assert_close(removal_errors(v, a.t() @ a / len(a), steps=f), expected, rtol=1e-4, atol=1e-5)


def test_least_squares_with_the_same_damping_is_what_the_steps_leave():
    a, v = problem(24, 6, 200)
    stats = ActivationStats(len(a), a.mean(0), a.abs().mean(0), a.square().sum(0), a.t() @ a)
    errors = importance.get("obs")(FFNWeights(v, v), stats)
    keep = errors.argsort(descending=True)[:15].sort().values
    new = least_squares(v, stats, keep, DAMPING).down
    change = v.clone()
    change[keep] -= new
    left = float((change * (ridged(a) @ change)).sum())
    assert left == pytest.approx(float(errors.sort().values[24 - 15 - 1]), rel=1e-4)


def test_removing_some_at_once_stays_near_one_at_a_time():
    a, v = problem(192, 8, 1000)
    h = a.t() @ a / len(a)
    one, four = removal_errors(v, h, steps=192), removal_errors(v, h, steps=48)
    # After each group of four as much is lost as after as many single steps, or somewhat more.
    assert_close(four.sort().values[3:180:4], one.sort().values[3:180:4], rtol=0.2, atol=0)
    assert len(set(one.argsort()[:96].tolist()) & set(four.argsort()[:96].tolist())) > 80


def test_dead_neurons_go_first_and_cost_nothing():
    a, v = problem(6, 4, 50)
    a[:, [1, 4]] = 0.0
    errors = removal_errors(v, a.t() @ a / len(a))
    assert set(errors.argsort()[:2].tolist()) == {1, 4}
    assert float(errors[[1, 4]].max()) < 0.02 * float(errors.max())
    assert (removal_errors(v, torch.zeros(6, 6, dtype=torch.float64)) == 0).all()
