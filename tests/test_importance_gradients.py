"""Criteria from gradients on a real model, redundancy by hand, and what they refuse."""

import dataclasses

import pytest
import torch
from conftest import make_model
from torch.testing import assert_close

from pyprune import InputError
from pyprune.base.statistics import ActivationStats, GradientStats
from pyprune.model import families
from pyprune.model.patterns import FFNWeights
from pyprune.pruning import gradients, importance
from pyprune.pruning.importance.uniqueness import similarity, uniqueness

BY_GRADIENT = [n for n in importance.names() if importance.get(n).needs & {"gradients", "gradients2"}]

# Four neurons over three tokens: 1 is 0 doubled, 2 mirrors 0, 3 is dead.
ALIKE = torch.tensor([[1.0, 2.0, -1.0, 0.0], [3.0, 6.0, -3.0, 0.0], [2.0, 4.0, -2.0, 0.0]], dtype=torch.float64)


def stats_of(a, found=None):
    return ActivationStats(len(a), a.mean(0), a.abs().mean(0), a.square().sum(0), a.t() @ a, found)


@pytest.fixture(scope="module")
def layer():
    """Weights and statistics of one layer of a tiny model."""
    model = make_model("llama").double()
    ffns = families.find_ffns(model)
    ids = torch.randint(3, 128, (3, 24), generator=torch.Generator().manual_seed(2))
    found = gradients.collect(model, ffns, ids, parts_square=True)[1]
    a = torch.randn(50, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return ffns[1].weights(), stats_of(a, found)


def test_which_criteria_need_gradients():
    taylor = ["taylor-element", "taylor-element2", "taylor-neuron", "taylor-vector"]
    assert ["fisher", "obd", "sensitivity", *taylor] == BY_GRADIENT
    assert importance.get("obd").needs == {"gradients2"}
    assert importance.get("wanda-unique").needs == {"activations", "gram"}
    assert not importance.get("magnitude-l2-both").needs_activations
    assert all(importance.get(n).needs_activations for n in BY_GRADIENT)


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_plain_ffns_have_no_gate(name):
    """Scores of a plain FFN are those of a gated one whose gate has no weights."""
    g = torch.Generator().manual_seed(4)
    up, down, *parts = torch.randn(6, 5, 3, generator=g, dtype=torch.float64)
    vectors = torch.rand(3, 5, generator=g, dtype=torch.float64)
    zeros = torch.zeros(5, 3, dtype=torch.float64)
    plain = GradientStats(2, 8, *vectors, tuple(parts[:2]), tuple(p.square() for p in parts[2:]))
    gated = dataclasses.replace(plain, parts=(zeros + 1, *plain.parts), parts_square=(zeros + 1, *plain.parts_square))
    a = torch.ones(4, 5, dtype=torch.float64)
    score = importance.get(name)
    assert_close(
        score(FFNWeights(up, down), stats_of(a, plain)), score(FFNWeights(up, down, zeros), stats_of(a, gated))
    )


def test_bounds_between_criteria(layer):
    """Products that cancel can only lower a score: in a row, over rows and over samples."""
    scores = {name: importance.get(name)(*layer) for name in BY_GRADIENT}
    tolerance = 1e-12
    assert (scores["taylor-vector"] <= scores["taylor-element"] + tolerance).all()
    assert (scores["taylor-element"] - scores["obd"] <= scores["taylor-element2"] + tolerance).all()
    assert (scores["taylor-element2"] <= scores["taylor-element"] + scores["obd"] + tolerance).all()
    assert (scores["taylor-element2"] - scores["taylor-element"]).abs().max() > 1e-6
    weights, stats = layer
    mean = sum((w * g).sum(1) for w, g in zip(weights.parts, stats.gradients.parts, strict=True)).abs()
    assert (mean <= scores["sensitivity"] + tolerance).all()
    assert (scores["sensitivity"] > mean * 1.01).any()  # three samples do not agree


@pytest.mark.parametrize(
    ("name", "changes", "missing"),
    [
        *((name, {"gradients": None}, "stats.gradients") for name in BY_GRADIENT),
        ("taylor-element", {"parts": ()}, "stats.gradients.parts"),
        ("obd", {"parts_square": ()}, "stats.gradients.parts_square"),
        ("taylor-element2", {"parts_square": ()}, "stats.gradients.parts_square"),
        ("wanda-unique", {"gram": None}, "stats.gram"),
    ],
)
def test_what_is_missing_is_named(layer, name, changes, missing):
    weights, stats = layer
    inner = {k: v for k, v in changes.items() if k.startswith("parts")}
    if inner:
        changes = {"gradients": dataclasses.replace(stats.gradients, **inner)}
    with pytest.raises(InputError, match=rf"^{missing} must be given for method '{name}'; got None$"):
        importance.get(name)(weights, dataclasses.replace(stats, **changes))


def test_unknown_need_is_a_mistake():
    with pytest.raises(RuntimeError, match=r"'new' needs \['hessian'\]"):
        importance.criterion("new", summary="", source="", needs=("hessian",))
    assert "new" not in importance.CRITERIA


def test_similarity_by_hand():
    a = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, -1.0]], dtype=torch.float64)
    half = 0.5**0.5
    expected = torch.tensor([[0, 0, half], [0, 0, half], [half, half, 0]], dtype=torch.float64)
    assert_close(similarity(a.t() @ a), expected)
    assert_close(similarity(a.t() @ a, signed=True), -expected)


def test_similarity_is_not_centred():
    """Two neurons that both stay near 1 are alike, however they vary."""
    a = 1 + 0.01 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    assert similarity(a.t() @ a)[0, 1] > 0.999


def test_similarity_of_alike_mirrored_and_dead():
    got = similarity(ALIKE.t() @ ALIKE)
    expected = 1 - torch.eye(4, dtype=torch.float64)
    expected[3] = expected[:, 3] = 0
    assert_close(got, expected)
    assert (got <= 1).all()


def test_uniqueness_counts_each_pair_once():
    gram = ALIKE.t() @ ALIKE
    assert uniqueness(gram) == 0.5  # 0 and 1 have a later one alike; 2 and the dead 3 have none
    assert uniqueness(gram, signed=True) == 0.75  # the mirrored one is another
    assert uniqueness(torch.eye(5)) == 1.0


def test_uniqueness_threshold():
    a = torch.tensor([[3.0, 1.0], [0.0, 1.0], [4.0, 3.0]], dtype=torch.float64)  # cosine 15 / (5 * sqrt 11) = 0.9045
    gram = a.t() @ a
    assert [uniqueness(gram, t) for t in (0.8, 0.904, 0.905, 1.0)] == [0.5, 0.5, 1.0, 1.0]
    exact = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    assert uniqueness(exact, 0.8) == 0.5  # at the threshold is similar
    for bad in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(InputError, match=r"threshold must lie in \(0, 1\]; got"):
            uniqueness(gram, bad)


def test_of_alike_neurons_the_more_important_stays():
    """Down rows make the mirrored neuron 2 the most important, then 0, then 1."""
    down = torch.tensor([[3.0], [1.0], [4.0], [9.0]])
    scores = importance.get("wanda-unique")(FFNWeights(down, down), stats_of(ALIKE))
    assert_close(scores, torch.tensor([0.0, 0.0, 4 * 14**0.5, 0.0], dtype=torch.float64))
    wanda = importance.get("wanda")(FFNWeights(down, down), stats_of(ALIKE))
    assert wanda[0] > wanda[1] > wanda[3]


def test_unlike_neurons_keep_their_wanda_score():
    a = torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64))
    weights = FFNWeights(torch.ones(3, 2), torch.ones(3, 2))
    score, wanda = (importance.get(n)(weights, stats_of(a)) for n in ("wanda-unique", "wanda"))
    assert torch.equal(score, wanda)


def test_discount_against_one_by_one():
    g = torch.Generator().manual_seed(5)
    a = torch.randn(6, 20, dtype=torch.float64, generator=g)  # few tokens, so that cosines are large
    down = torch.randn(20, 3, dtype=torch.float64, generator=g)
    stats = stats_of(a)
    wanda = importance.get("wanda")(FFNWeights(down, down), stats)
    expected = []
    for j in range(20):
        above = [k for k in range(20) if wanda[k] > wanda[j]]
        squares = [float((a[:, j] @ a[:, k]) ** 2 / (a[:, j] @ a[:, j]) / (a[:, k] @ a[:, k])) for k in above]
        expected.append(float(wanda[j]) * (1 - max(squares, default=0.0)))
    got = importance.get("wanda-unique")(FFNWeights(down, down), stats)
    assert_close(got, torch.tensor(expected, dtype=torch.float64))
