"""Criteria against small examples by hand, and the registry."""

import pkgutil

import pytest
import torch
from torch.testing import assert_close

from pyprune import InputError
from pyprune.base.statistics import ActivationStats, GradientStats
from pyprune.model.patterns import FFNWeights
from pyprune.pruning import importance
from pyprune.pruning.importance import criterion
from pyprune.pruning.importance.magnitude import _norms

# Two neurons, D = 2.
GATE = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
UP = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
DOWN = torch.tensor([[1.0, -2.0], [0.0, 2.0]])
PLAIN, GATED = FFNWeights(UP, DOWN), FFNWeights(UP, DOWN, GATE)
# Three tokens: a = [[1, 0], [-2, 3], [4, 3]].
TOKENS = torch.tensor([[1.0, 0.0], [-2.0, 3.0], [4.0, 3.0]], dtype=torch.float64)
# Gradients of gate, up and down, and mean squares of them over samples.
GRADIENTS = GradientStats(
    samples=2,
    tokens=6,
    neuron_taylor=torch.tensor([0.5, 2.0]),
    mask_square=torch.tensor([3.0, 1.0]),
    sample_taylor=torch.tensor([7.0, 9.0]),
    parts=tuple(torch.tensor([[[1.0, 2.0], [0.5, -1.0]], [[-1.0, 2.0], [3.0, 1.0]], [[2.0, 1.0], [4.0, -1.0]]])),
    parts_square=tuple(torch.tensor([[[2.0, 4.0], [1.0, 1.0]], [[1.0, 4.0], [10.0, 1.0]], [[4.0, 2.0], [16.0, 3.0]]])),
)


def stats_of(a):
    return ActivationStats(len(a), a.mean(0), a.abs().mean(0), a.square().sum(0), a.t() @ a, GRADIENTS)


EXPECTED = {
    "wanda": [3 * 21**0.5, 2 * 18**0.5],  # sum abs V (3, 2) times norms over tokens (sqrt 21, sqrt 18)
    "flap": [(21 / 3 - 1) * 5, (18 / 3 - 4) * 4],  # Var (6, 2) times squared norm of V (5, 4)
    "activation": [7 / 3, 2.0],
    "wanda-unique": [3 * 21**0.5, 2 * 18**0.5 * 19 / 21],  # squared cosine 6^2 / (21 * 18) = 2/21, on the lower one
    # H = [[7, 2], [2, 6]] + 0.065 I, det 38.849225: neuron 1 goes first, then all of V^T H V is lost
    "obs": [7.065 * 5 + 6.065 * 4 - 16, 4 * 38.849225 / 7.065],
    # w * g of gate, up, down: (1, 0), (-3, 8), (2, -2) and (0, 2), (3, 0), (0, -2)
    "taylor-vector": [1 + 5 + 0, 2 + 3 + 2],
    "taylor-element": [1 + 11 + 4, 2 + 3 + 2],
    # w^2 * f / 2 of gate, up, down: (1, 0), (4.5, 32), (2, 4) and (0, 2), (5, 0), (0, 6)
    "taylor-element2": [0 + 7.5 + 24 + 0 + 6, 0 + 2 + 8],
    "obd": [1 + 36.5 + 6, 2 + 5 + 6],
    "taylor-neuron": [0.5, 2.0],
    "fisher": [3.0, 1.0],
    "sensitivity": [7.0, 9.0],
    "magnitude-l2-fan-in": [26**0.5, 5**0.5],  # (1, 0, 3, 4) and (0, -2, 1, 0)
    "magnitude-l2-fan-out": [5**0.5, 2.0],
    "magnitude-l2-both": [31**0.5, 3.0],
    "magnitude-l2-product": [1 * 5 * 5**0.5, 2 * 1 * 2],
    "magnitude-l1-fan-in": [8.0, 3.0],
    "magnitude-l1-fan-out": [3.0, 2.0],
    "magnitude-l1-both": [11.0, 5.0],
    "magnitude-l1-product": [1 * 7 * 3, 2 * 1 * 2],
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_criterion_by_hand(name):
    scores = importance.get(name)(GATED, stats_of(TOKENS))
    assert_close(scores, torch.tensor(EXPECTED[name], dtype=torch.float64))


def test_plain_magnitude_has_no_gate():
    assert_close(
        importance.get("magnitude-l1-both")(PLAIN), torch.tensor([10.0, 3.0], dtype=torch.float64), rtol=0, atol=0
    )


def test_random_is_seeded():
    score = importance.get("random")
    first, again, other = (score(GATED, None, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert ((first >= 0) & (first < 1)).all()


def test_every_criterion_is_tested_by_hand():
    assert set(importance.names()) == {*EXPECTED, "random"}


@pytest.mark.parametrize("name", importance.names())
def test_registry_entry_is_complete(name):
    entry = importance.get(name)
    assert entry.name == name
    assert len(entry.summary) > 10
    assert any(mark in entry.source for mark in ("arXiv", "doi", "http"))
    scores = entry(GATED, stats_of(TOKENS) if entry.needs_activations else None)
    assert scores.shape == (2,)
    assert scores.dtype == torch.float64
    if entry.needs_activations:
        with pytest.raises(InputError, match=f"stats must be given for method '{name}'; got None"):
            entry(GATED)


def test_every_file_registers_something():
    files = {module.name for module in pkgutil.iter_modules(importance.__path__)} - {"base"}
    owners = {getattr(c.score, "func", c.score).__module__.rpartition(".")[2] for c in importance.CRITERIA.values()}
    assert owners == files


def test_unknown_method_names_the_nearest():
    with pytest.raises(InputError, match=r"method must be one of .*got 'flop' \(nearest: flap"):
        importance.get("flop")


def test_two_criteria_of_one_name_are_a_mistake():
    with pytest.raises(RuntimeError, match="two criteria are called 'wanda'"):
        criterion("wanda", summary="", source="")(lambda w, s, g: w.up[:, 0])


def test_variance_survives_a_large_mean():
    a = 1000 + torch.tensor([[0.01], [-0.01]], dtype=torch.float64)
    assert_close(stats_of(a).variance, torch.tensor([1e-4], dtype=torch.float64), rtol=1e-4, atol=0)
    assert (stats_of(torch.full((7, 3), 0.1, dtype=torch.float64)).variance >= 0).all()


@pytest.mark.parametrize("order", [1, 2])
def test_norms_of_more_rows_than_are_widened_at_once_in_either_order_of_memory(order):
    weights = torch.randn(300, 500).bfloat16()
    wanted = torch.linalg.vector_norm(weights.double(), ord=order, dim=1)
    for part in (weights, weights.t().contiguous().t()):
        torch.testing.assert_close(_norms(part, order), wanted)
