"""How many neurons each layer keeps."""

import itertools
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune import InputError
from pyprune.pruning.allocation.bounds import candidate_widths, round_width, standardise
from pyprune.pruning.allocation.knapsack import exact
from pyprune.pruning.allocation.ranked import global_top
from pyprune.pruning.allocation.uniform import uniform


@pytest.mark.parametrize(
    ("width", "multiple", "full", "expected"),
    [
        (67.2, 64, 96, 64),
        (96, 64, 96, 96),  # the full width is allowed where it is no multiple
        (95.9, 64, 96, 64),
        (97, 64, 256, 128),
        (96, 64, 256, 128),  # half-way goes up
        (1, 64, 256, 64),  # at least one multiple
        (3, 8, 5, 5),  # never above F
        (28.999999999999996, 1, 100, 29),
        (0.2, 1, 10, 1),
    ],
)
def test_round_width(width, multiple, full, expected):
    assert round_width(width, multiple, full) == expected


@given(st.floats(0.001, 1), st.integers(1, 130), st.integers(1, 600))
@settings(max_examples=100, deadline=None)
def test_round_width_invariants(keep, multiple, full):
    width = round_width(keep * full, multiple, full)
    assert 1 <= width <= full
    assert width == full or width % multiple == 0
    if multiple <= keep * full <= full - multiple:
        assert abs(width - keep * full) <= multiple / 2


@pytest.mark.parametrize(
    ("keep", "multiple", "nearest"), [(0.7, 1000, "20 alone"), (0.7, 20, "20 alone"), (0.95, 12, "12 or 20")]
)
def test_a_multiple_that_leaves_no_narrower_width_is_refused(keep, multiple, nearest):
    scores = [torch.rand(20) for _ in range(3)]
    message = rf"multiple must leave a width near keep {keep} of 20 neurons \(nearest possible: {nearest}\), or nothing"
    for allocate in (uniform, global_top):
        with pytest.raises(InputError, match=message):
            allocate(scores, keep, multiple)
        assert [len(k) for k in allocate(scores, 1.0, multiple)] == [20] * 3


def test_uniform_keeps_the_share_of_each_layer():
    scores = [torch.arange(10.0), torch.arange(20.0).flip(0)]
    keeps = uniform(scores, 0.3)
    assert keeps[0].neurons.tolist() == [7, 8, 9]
    assert keeps[1].neurons.tolist() == [0, 1, 2, 3, 4, 5]
    assert [len(k) for k in uniform(scores, 0.3, multiple=4)] == [4, 8]


def test_uniform_names_the_layer_whose_scores_are_bad():
    with pytest.raises(InputError, match="scores of layer 1 must be finite; 1 of 4"):
        uniform([torch.rand(4), torch.tensor([1.0, 2.0, float("nan"), 0.0])], 0.5)


def test_standardise_by_hand():
    z = standardise(torch.tensor([1.0, 3.0], dtype=torch.float64))  # mean 2, population deviation 1
    assert z.tolist() == [-1.0, 1.0]
    assert standardise(torch.full((4,), 7.0)).tolist() == [0.0] * 4


def test_global_by_hand():
    # z-scores of [0, 0, 0, 4] are (-0.577 x3, 1.732); of [0, 0, 4, 4] (-1, -1, 1, 1): the best three of eight.
    scores = [torch.tensor([0.0, 0.0, 0.0, 4.0]), torch.tensor([0.0, 0.0, 4.0, 4.0])]
    first, second = global_top(scores, 3 / 8)
    assert first.neurons.tolist() == [3]
    assert second.neurons.tolist() == [2, 3]


def test_global_does_not_depend_on_the_scale_of_a_layer():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(50, generator=generator, dtype=torch.float64) ** p for p in (1, 2, 8)]
    scaled = [scores[0] * 1e6, scores[1] + 3, scores[2] * 1e-6]
    assert global_top(scores, 0.5) == global_top(scaled, 0.5)
    assert len({len(k) for k in global_top(scores, 0.5)}) > 1


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_global_budget_floor_and_multiples(data):
    sizes = data.draw(st.lists(st.integers(4, 60), min_size=1, max_size=5))
    keep = data.draw(st.floats(0.05, 1))
    floor = data.draw(st.floats(0, 1)) * keep
    multiple = data.draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    scores = [torch.rand(s, generator=generator) * 10 ** (i - 2) for i, s in enumerate(sizes)]
    least = [min(s, max(1, -(-(floor * s - 1e-9) // multiple)) * multiple) for s in sizes]
    try:
        keeps = global_top(scores, keep, multiple, floor)
    except InputError:  # nothing would have been removed
        assert keep < 1
        assert least == sizes or round(keep * sum(sizes)) >= sum(sizes) - multiple / 2
        return
    widths = [len(k) for k in keeps]
    for width, size, low in zip(widths, sizes, least, strict=True):
        assert width == size or width % multiple == 0
        assert low <= width <= size
        assert width >= floor * size - 1e-6
    budget = keep * sum(sizes)
    assert sum(widths) <= max(sum(least), budget + multiple / 2 + 0.5)
    if multiple == 1 and floor == 0:
        assert abs(sum(widths) - max(budget, len(sizes))) <= 1
    for k, s in zip(keeps, scores, strict=True):
        assert k.neurons.tolist() == sorted(s.double().argsort(descending=True, stable=True)[: len(k)].tolist())


def test_floor_rounds_up():
    scores = [torch.zeros(5), torch.arange(100.0)]
    assert len(global_top(scores, 0.5, floor=0.5)[0]) == 3  # 2.5 neurons is more than two


def test_floor_above_keep_is_refused():
    with pytest.raises(InputError, match=r"floor must be at most keep \(0\.3\); got 0\.5"):
        global_top([torch.rand(8)], 0.3, floor=0.5)


def test_global_names_the_layer_whose_scores_are_bad():
    with pytest.raises(InputError, match="scores of layer 1 must be finite"):
        global_top([torch.rand(4), torch.tensor([1.0, float("inf")])], 0.5)


def test_uniform_protects_layers_within_the_budget():
    scores = [torch.arange(20.0)] * 4
    # 0.7 * 80 = 56 neurons, 20 of them protected: 36 of 60 for the others.
    assert [len(k) for k in uniform(scores, 0.7, protect=(1, 0))] == [20, 12, 12, 12]
    assert [len(k) for k in uniform(scores, 0.7, protect=(1, 1))] == [20, 8, 8, 20]
    assert [len(k) for k in uniform(scores, 1.0, protect=(2, 1))] == [20] * 4
    assert uniform(scores, 0.7, protect=(0, 0)) == uniform(scores, 0.7)


def test_global_protects_layers_within_the_budget():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(20, generator=generator) for _ in range(4)]
    widths = [len(k) for k in global_top(scores, 0.7, protect=(1, 1))]
    assert widths[0] == widths[3] == 20
    assert sum(widths) == 56
    assert max(widths[1:3]) < 20
    assert [len(k) for k in global_top(scores, 0.7, multiple=4, protect=(0, 2))][2:] == [20, 20]


@pytest.mark.parametrize("allocate", [uniform, global_top])
def test_protected_layers_that_leave_too_little_are_refused(allocate):
    scores = [torch.rand(20)] * 4
    with pytest.raises(InputError, match=r"protect must leave others enough: at keep 0\.5 all layers share 40 neurons"):
        allocate(scores, 0.5, protect=(1, 1))
    with pytest.raises(InputError, match="and need 48 at least"):
        allocate(scores, 0.55, multiple=4, protect=(1, 1))
    with pytest.raises(InputError, match="protect must leave others enough"):
        allocate(scores, 0.9, protect=(3, 2))
    with pytest.raises(InputError, match="protect must be two counts"):
        allocate(scores, 0.9, protect=(-1, 0))
    assert [len(k) for k in allocate(scores, 1.0, protect=(3, 2))] == [20] * 4


def test_candidate_widths():
    assert candidate_widths([10, 8], 4) == [[4, 8, 10], [4, 8]]
    assert candidate_widths([10, 8], 4, floor=0.5, protect=(0, 1)) == [[8, 10], [8]]
    assert candidate_widths([3], 4) == [[3]]


def total(rows, chosen):
    return sum(row[i] for row, i in zip(rows, chosen, strict=True))


def brute_force(losses, costs, budget):
    every = itertools.product(*(range(len(row)) for row in losses))
    return min(total(losses, c) for c in every if total(costs, c) <= budget)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_exact_with_whole_costs_is_the_optimum(data):
    numbers = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    unit = data.draw(st.sampled_from([1, 1, 3, 16]))
    losses = [[data.draw(st.integers(-20, 50)) for _ in range(n)] for n in numbers]
    costs = [[unit * data.draw(st.integers(-3, 12)) for _ in range(n)] for n in numbers]
    least = sum(map(min, costs))
    budget = least + data.draw(st.integers(0, 40 * unit))
    chosen = exact(losses, costs, budget)
    assert total(costs, chosen) <= budget
    assert total(losses, chosen) == brute_force(losses, costs, budget)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_exact_with_other_costs_keeps_the_budget_and_its_bound(data):
    numbers = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    losses = [[data.draw(st.floats(0, 10)) for _ in range(n)] for n in numbers]
    costs = [[data.draw(st.floats(0, 1e-3)) for _ in range(n)] for n in numbers]
    least = math.fsum(map(min, costs))
    budget = least + data.draw(st.floats(0, 3e-3))
    resolution = data.draw(st.sampled_from([5, 100, 20_000]))
    chosen = exact(losses, costs, budget, resolution)
    assert total(costs, chosen) <= budget * (1 + 1e-12)
    smaller = (budget - len(numbers) * (budget - least) / resolution) * (1 - 1e-9)  # by one step a layer
    if smaller >= least:
        assert total(losses, chosen) <= brute_force(losses, costs, smaller) + 1e-9


def test_exact_takes_the_first_of_equals_and_spends_what_there_is():
    assert exact([[1, 1, 1]], [[5, 3, 4]], 5) == [0]
    assert exact([[0.0, 1.0], [0.0, 1.0]], [[8, 4], [8, 4]], 12) == [1, 0]
    assert exact([[0.0, 1.0]], [[8, 4]], 4) == [1]  # the budget is the least cost
    assert exact([[3.0]], [[0.25]], 0.25) == [0]
    assert exact([[1.0, 0.0]], [[0.1, 0.3]], math.inf) == [1]


def test_exact_is_quick():
    generator = torch.Generator().manual_seed(0)
    widths = list(range(64, 14401, 64))
    losses = [torch.rand(225, generator=generator).sort(descending=True).values.tolist() for _ in range(80)]
    started = time.process_time()
    chosen = exact(losses, [widths] * 80, 80 * 8000)
    assert time.process_time() - started < 3
    assert sum(widths[i] for i in chosen) <= 80 * 8000


@pytest.mark.parametrize(
    ("losses", "costs", "budget", "message"),
    [
        ([[1.0, float("nan")]], [[1, 2]], 2, "losses of layer 0 must be finite"),
        ([[1.0]], [[float("inf")]], 2, "costs of layer 0 must be finite"),
        ([[1.0], []], [[1], []], 2, "losses of layer 1 must hold at least one candidate"),
        ([[1.0, 2.0]], [[1]], 2, "costs of layer 0 must hold 2 candidates; got 1"),
        ([[1.0]], [[1], [2]], 2, "costs must be given for 1 layers; got 2"),
        ([], [], 2, "costs must be given for 0 layers"),
        ([[1.0], [1.0]], [[2], [4]], 5, "budget must be at least 6, the sum of the least costs; got 5"),
        ([[1.0]], [[1]], float("nan"), "budget must be at least 1"),
    ],
)
def test_exact_refuses(losses, costs, budget, message):
    with pytest.raises(InputError, match=message):
        exact(losses, costs, budget)
