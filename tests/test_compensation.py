"""Least squares and bias compensation against independent formulas, in float64."""

import pytest
import torch
from torch.testing import assert_close

from pyprune import InputError
from pyprune.base.statistics import ActivationStats
from pyprune.pruning.repair.least_squares import least_squares
from pyprune.pruning.repair.mean_bias import mean_bias


def stats_of(a):
    return ActivationStats(len(a), a.mean(0), a.abs().mean(0), a.square().sum(0), a.t() @ a)


def problem(tokens=60, neurons=12, hidden=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(tokens, neurons, generator=generator, dtype=torch.float64)
    a = a @ torch.randn(neurons, neurons, generator=generator, dtype=torch.float64)  # correlated
    return a, torch.randn(neurons, hidden, generator=generator, dtype=torch.float64)


def removed_of(keep, neurons):
    removed = torch.ones(neurons, dtype=torch.bool)
    removed[keep] = False
    return removed


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 10.0])
@pytest.mark.parametrize("tokens", [60, 7])  # more and fewer tokens than neurons
def test_least_squares_is_the_ridge_solution(tokens, damping):
    a, v = problem(tokens)
    keep = torch.tensor([0, 3, 4, 9])
    repair = least_squares(v, stats_of(a), keep, damping)
    # minimise |a V - a_S V'|^2 / T + r |V' - V_S|^2 as one augmented system
    ridge = damping * a.square().mean()
    top = a[:, keep] / tokens**0.5
    system = torch.cat([top, ridge.sqrt() * torch.eye(4, dtype=torch.float64)])
    target = torch.cat([a @ v / tokens**0.5, ridge.sqrt() * v[keep]])
    assert_close(repair.down, torch.linalg.lstsq(system, target).solution)


def test_reported_errors_are_those_of_the_output():
    a, v = problem()
    keep = torch.tensor([1, 2, 5, 7, 11])
    repair = least_squares(v, stats_of(a), keep, 1e-2)
    dense = a @ v
    for new, reported in ((v[keep], repair.error_before), (repair.down, repair.error_after)):
        error = (dense - a[:, keep] @ new).square().sum() / dense.square().sum()
        assert reported == pytest.approx(float(error), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("damping", [1e-8, 1e-2, 1e3])
def test_never_worse_than_the_bare_cut(seed, damping):
    a, v = problem(seed=seed)
    keep = torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:5].sort().values
    repair = least_squares(v, stats_of(a), keep, damping)
    assert repair.error_after <= repair.error_before * (1 + 1e-12)


def test_keeping_everything_changes_nothing():
    a, v = problem()
    repair = least_squares(v, stats_of(a), torch.arange(12), 1e-2)
    assert_close(repair.down, v)
    assert repair.error_before == 0


def test_twin_neuron_is_folded_exactly():
    a, v = problem()
    a[:, 1] = 2 * a[:, 0]
    repair = least_squares(v, stats_of(a), torch.tensor([i for i in range(12) if i != 1]), 1e-12)
    want = v[[0, *range(2, 12)]].clone()
    want[0] += 2 * v[1]
    assert_close(repair.down, want, rtol=1e-6, atol=1e-6)


def test_dead_neurons_make_no_trouble():
    a, v = problem()
    a[:, [2, 3, 8]] = 0
    repair = least_squares(v, stats_of(a), torch.tensor([2, 3, 5]), 1e-2)
    assert repair.down.isfinite().all()
    assert_close(repair.down[:2], v[[2, 3]])  # nothing is known of them, so they stay as they were


def test_wholly_dead_layer_is_cut_bare():
    _, v = problem()
    repair = least_squares(v, stats_of(torch.zeros(9, 12, dtype=torch.float64)), torch.tensor([4, 5]), 1e-2)
    assert torch.equal(repair.down, v[[4, 5]])
    assert (repair.error_before, repair.error_after) == (0, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(bad):
    a, v = problem()
    a[3, 4] = bad
    with pytest.raises(InputError, match="activations must be finite for least squares; their mean square is"):
        least_squares(v, stats_of(a), torch.tensor([0, 1]), 1e-2)


def test_damping_too_small_is_named():
    a, v = problem(tokens=3)
    with pytest.raises(InputError, match=r"damping must be large enough .*; got 1e-300"):
        least_squares(v, stats_of(a), torch.arange(11), 1e-300)


def test_mean_bias_by_hand():
    a = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, -4.0]], dtype=torch.float64)
    v = torch.tensor([[1.0, 10.0], [5.0, 5.0], [2.0, -1.0]])
    # means (2, 0, -1); neurons 0 and 2 removed: 2 * (1, 10) - 1 * (2, -1)
    assert mean_bias(v, stats_of(a), torch.tensor([True, False, True])).tolist() == [0.0, 21.0]


def test_mean_bias_makes_the_mean_output_exact():
    a, v = problem()
    keep = torch.tensor([0, 5, 6])
    bias = mean_bias(v, stats_of(a), removed_of(keep, 12))
    assert_close((a[:, keep] @ v[keep] + bias).mean(0), (a @ v).mean(0))
