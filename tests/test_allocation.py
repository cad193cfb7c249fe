"""How many neurons each layer keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune import InputError
from pyprune.allocation import global_top, round_width, standardise, uniform


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
    keeps = global_top(scores, keep, multiple, floor)
    widths = [len(k) for k in keeps]
    least = [min(s, max(1, -(-(floor * s - 1e-9) // multiple)) * multiple) for s in sizes]
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
