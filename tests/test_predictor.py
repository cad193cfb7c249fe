"""The allocation `predictor`: samples within the budget, the regression, the search, and the whole on a model."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import make_mixture

from pyprune import InputError, Predicted, prune
from pyprune.model import surgery
from pyprune.model.described import Described
from pyprune.model.families import find_ffns
from pyprune.model.mask import KeepIndex, Mask
from pyprune.model.narrowing import Rest
from pyprune.model.units import groups, tied
from pyprune.pruning.allocation.bounds import candidate_widths
from pyprune.pruning.allocation.masked_loss import MaskedLoss, turns, windows_by_source
from pyprune.pruning.allocation.predictor import Predictor, fit, search
from pyprune.pruning.allocation.samples import draw, fill
from pyprune.pruning.mixture import Windows


def test_fill_by_hand():
    rows = candidate_widths([16, 16, 16], 4)
    assert fill([1, 1, 1], rows, 24) == (8, 8, 8)
    assert fill([2, 1, 1], rows, 32) == (16, 8, 8)
    assert fill([9, 1, 1], rows, 32) == (16, 8, 8)  # 16 at most, the rest is shared
    assert fill([1, 1, 1], rows, 12) == (4, 4, 4)  # the least
    assert fill([1, 1, 1], rows, 31) == (12, 8, 8)  # one step more fits
    assert fill([1, 1, 1], rows, 48) == (16, 16, 16)
    assert fill([1, 1, 1], candidate_widths([16, 16, 16], 4, protect=(1, 0)), 32) == (16, 8, 8)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_samples_spend_the_budget(data):
    sizes = data.draw(st.lists(st.integers(4, 60), min_size=1, max_size=6))
    multiple = data.draw(st.integers(1, 9))
    rows = candidate_widths(sizes, multiple, data.draw(st.floats(0, 0.5)))
    least = sum(row[0] for row in rows)
    budget = data.draw(st.integers(least, sum(sizes)))
    found = draw(rows, budget, 12, seed=3)
    assert found == draw(rows, budget, 12, seed=3)
    assert len(found) == len(set(found)) <= 12
    for widths in found:
        assert all(width in row for width, row in zip(widths, rows, strict=True))
        steps = [row[row.index(w) + 1] - w for w, row in zip(widths, rows, strict=True) if w < row[-1]]
        assert budget - min(steps, default=budget) < sum(widths) <= budget or not steps


def test_samples_lie_near_and_far():
    rows = candidate_widths([128] * 10, 4)
    found = np.array(draw(rows, 640, 100, seed=0))
    assert len(found) == 100 and (found.sum(1) == 640).all()
    assert found[0].tolist() == [64] * 10
    spread = np.abs(found - 64).mean(1)
    assert spread[1:].min() < 12 and spread.max() > 30
    assert not np.array_equal(found, draw(rows, 640, 100, seed=1))


def true_loss(widths, sizes, weights):
    x = 1 - np.array(widths) / np.array(sizes)
    return 3.0 + float((weights[:, 0] * x**2 + weights[:, 1] * x**4).sum())


def test_the_regression_finds_what_made_the_losses():
    """Of losses without noise, also where no sample was."""
    sizes, weights = [32, 32, 64, 64], np.random.default_rng(0).uniform(0.5, 3, (4, 2))
    # Of several budgets: at one alone the free parts are told apart badly.
    rows = candidate_widths(sizes, 2)
    samples = [widths for budget in (90, 120, 150) for widths in draw(rows, budget, 30, seed=budget)]
    predictor = fit(sizes, samples, [true_loss(widths, sizes, weights) for widths in samples])
    assert predictor.ridge == 1e-4 and predictor.error < 1e-3
    np.testing.assert_allclose(predictor.weights, weights, atol=0.02)
    assert predictor.constant == pytest.approx(3.0, abs=1e-3)
    for widths in draw(rows, 100, 10, seed=9):
        assert predictor(widths) == pytest.approx(true_loss(widths, sizes, weights), abs=1e-3)


def test_the_error_is_that_of_leaving_each_sample_out():
    """In closed form, against fits without the sample; and noise asks for a larger ridge."""
    sizes, generator = [32, 32, 32], np.random.default_rng(1)
    samples = draw(candidate_widths(sizes, 2), 60, 24, seed=0)
    losses = [true_loss(w, sizes, np.ones((3, 2))) + generator.normal() for w in samples]
    predictor = fit(sizes, samples, losses)
    assert predictor.ridge > 1e-2
    x = 1 - np.array(samples) / 32
    own = np.concatenate([x**2, x**4], 1)
    common = np.stack([(x**2).sum(1), (x**4).sum(1)], 1)
    columns = np.concatenate([np.ones((24, 1)), common, (own - own.mean(0)) / own.std(0)], 1)
    penalty = np.diag(np.r_[0, 0, 0, np.ones(6)] * predictor.ridge + 1e-9)
    residuals = []
    for i in range(24):
        rest, y = np.delete(columns, i, 0), np.delete(losses, i)
        residuals.append(losses[i] - columns[i] @ np.linalg.solve(rest.T @ rest + penalty, rest.T @ y))
    assert predictor.error == pytest.approx(np.sqrt(np.mean(np.square(residuals))), rel=1e-4)


def test_a_layer_that_all_samples_narrow_alike_says_nothing_of_its_own():
    """Its spread is rounding alone, which is no scale."""
    sizes, generator = [96, 96, 96], np.random.default_rng(0)
    samples = [(31, int(a), int(b)) for a, b in generator.integers(16, 96, (24, 2))]
    predictor = fit(sizes, samples, [true_loss(w, sizes, np.ones((3, 2))) for w in samples])
    near, far = (predictor((width, 50, 50)) for width in (31, 40))
    assert abs(near - far) < 1


def test_losses_that_say_nothing_of_single_layers_leave_the_even_spread():
    sizes = [32] * 4
    rows = candidate_widths(sizes, 4)
    samples = draw(rows, 64, 20, seed=0)
    predictor = fit(sizes, samples, [true_loss(w, sizes, np.full((4, 2), 2.0)) for w in samples])
    assert search(predictor, rows, samples, 64, 3) == [(16, 16, 16, 16)]


def test_the_search_is_the_optimum_of_its_surroundings():
    sizes, weights = [24, 24, 24], np.random.default_rng(4).uniform(0.5, 3, (3, 2))
    rows = candidate_widths(sizes, 4)
    samples = draw(rows, 36, 12, seed=0)
    predictor = fit(sizes, samples, [true_loss(w, sizes, weights) for w in samples])
    extremes = list(zip(np.min(samples, 0), np.max(samples, 0), strict=True))
    found = search(predictor, rows, samples, 36, 1)
    allowed = [
        widths
        for widths in itertools.product(*rows)
        if sum(widths) <= 36 and all(a <= w <= b for w, (a, b) in zip(widths, extremes, strict=True))
    ]
    assert predictor(found[0]) == pytest.approx(min(map(predictor, allowed)))
    many = search(predictor, rows, samples, 36, 4)
    assert many[-1] == found[0]
    distance = [sum(abs(a - b) for a, b in zip(w, samples[0], strict=True)) for w in many]
    assert distance == sorted(distance)


def test_the_search_spends_the_budget_where_noise_says_that_neurons_harm():
    sizes, weights = (24, 24, 24), np.array([[-1.0, -1.0], [2.0, 0.0], [-0.5, 0.0]])
    rows = candidate_widths(sizes, 4)
    samples = draw(rows, 36, 12, seed=0)
    found = search(Predictor(sizes, weights, 0.0, 1.0, 0.0), rows, samples, 36, 4)
    assert all(sum(widths) == 36 for widths in found)


def test_the_masked_loss_is_that_of_the_cut_model(tiny, ids):
    """And the mean over sources, whatever they hold."""
    model = tiny("gpt2")
    scores = [torch.rand(96, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    described, before = Described(model), copy.deepcopy(model.state_dict())
    windows = windows_by_source(ids, torch.tensor([0, 1, 1, 1][: len(ids)]), 2)
    assert [len(w) for w in windows] == [1, 2]
    found = MaskedLoss(described, scores, windows)((96, 40, 64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    cut = copy.deepcopy(model)
    for ffn, score, width in zip(find_ffns(cut), scores, (96, 40, 64), strict=True):
        surgery.cut(ffn, KeepIndex.from_scores(score, width))
    want = [Rest(cut, w).loss(0, None) for w in windows]
    assert found == pytest.approx(sum(want) / 2, rel=1e-6)
    assert found != pytest.approx(Rest(model, ids).loss(0, None), rel=1e-6)


def test_samples_take_turns_with_the_windows():
    ids = torch.arange(10)[:, None]
    own = windows_by_source(ids, torch.tensor([0, 1, 0, 1, 0, 1, 0, 0, 0, 0]), 4)
    assert [w.flatten().tolist() for w in own] == [[0, 4, 7, 9], [1, 3, 5]]
    groups = turns(own, 2, 3)
    assert [[w.flatten().tolist() for w in group] for group in groups] == [
        [[0, 4], [1, 3]],
        [[7, 9], [5, 1]],
        [[0, 4], [3, 5]],
    ]


@pytest.fixture
def lopsided(tiny):
    """A model whose first layer has 16 neurons that speak, and whose others have 96; and text of its own, two sources.

    Its own, for only then does the loss rise where a layer changes.
    """
    model = tiny("llama")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i, ffn in enumerate(find_ffns(model)):
            ffn.down.weight.mul_(20)
            if i == 0:
                ffn.down.weight[:, 16:] = 0.0
        model.lm_head.weight.mul_(20)
        ids = torch.randint(3, 128, (8, 1), generator=generator)
        while ids.shape[1] < 24:
            chances = model(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    return model, Windows(ids, torch.arange(8) % 2, ("one", "two"))


def test_the_layer_that_needs_least_keeps_least(lopsided):
    model, windows = lopsided
    dense = copy.deepcopy(model)
    stages = []
    report = prune(
        model,
        0.6,
        "wanda",
        allocation=Predicted(multiple=8, samples=24),
        repair=None,
        text=windows,
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    widths = report.mask.widths
    assert 160 < sum(widths) <= round(0.6 * 288)
    assert widths[0] <= 40 < min(widths[1:])
    assert ("measuring samples of widths", 23, 24) in stages
    even = copy.deepcopy(dense)
    prune(even, 0.6, "wanda", allocation="uniform:multiple=8", repair=None, text=windows)
    losses = [Rest(m, windows.ids).loss(0, None) for m in (dense, model, even)]
    assert losses[0] < losses[1] < losses[2]
    again = prune(copy.deepcopy(dense), 0.6, "wanda", allocation=Predicted(multiple=8, samples=24), repair=None,
                  text=windows)  # fmt: skip
    assert again.mask == report.mask


def test_a_budget_of_everything_needs_no_sample(lopsided):
    model, windows = lopsided
    report = prune(model, 1.0, "wanda", allocation="predictor:samples=1", repair=None, text=windows)
    assert report.mask.widths == (96, 96, 96)


@pytest.mark.parametrize(
    ("keep", "options", "message"),
    [
        (0.5, {"samples": 3}, r"samples must be more than the layers that may be narrowed \(3\), .*; got 3"),
        (0.5, {"samples": 2, "protect": (1, 0)}, r"that may be narrowed \(2\), .*; got 2"),
        (0.2, {"multiple": 32}, r"keep must be at least 0\.333 with this multiple.* or no sample meets it; got 0\.2"),
        (0.5, {"protect": (2, 0)}, r"keep must be at least 0\.694 .*or no sample meets it; got 0\.5"),
        (0.67, {"multiple": 64}, r"multiple must leave more than 3 ways .*; 1 were found; got 64"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(keep, options, message, lopsided):
    model, windows = lopsided
    before = copy.deepcopy(model.state_dict())
    stages = []
    allocation = Predicted(**{"multiple": 8, **options})
    with pytest.raises(InputError, match=message):
        prune(
            model,
            keep,
            "wanda",
            allocation=allocation,
            repair=None,
            text=windows,
            progress=lambda *facts: stages.append(facts),
        )
    assert not stages
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(InputError, match=r"text must be given for .*allocation 'predictor'"):
        prune(model, 0.5, "magnitude-l2-both", allocation="predictor", repair=None)


def test_losses_that_are_not_finite_are_refused():
    samples = [(8, 8), (4, 12)]
    with pytest.raises(InputError, match="losses must be finite"):
        fit([16, 16], samples, [1.0, float("nan")])
    with pytest.raises(InputError, match="losses must be given for 2 samples; got 1"):
        fit([16, 16], samples, [1.0])


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_the_loss_of_a_masked_mixture_is_that_of_the_pruned_one(kind, more_ids):
    """Banks, shared experts and plain layers; experts of a layer keep one width, not the same neurons."""
    model = make_mixture(kind)
    described = Described(model)
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(size, generator=generator) for size in described.sizes]
    widths = tied(described.ffns, [16 + 8 * (ffn.block % 2) for ffn in described.ffns])
    with torch.no_grad():
        before = Rest(model, more_ids[:2]).dense_loss()
        loss = MaskedLoss(described, scores, [more_ids[:2]])
        got = loss(widths)
        assert loss(described.sizes) == pytest.approx(before, rel=1e-6)
        keeps = tuple(KeepIndex.from_scores(s, w) for s, w in zip(scores, widths, strict=True))
        prune(model, repair=None, mask=Mask(keeps, described.fingerprint))
        assert got == pytest.approx(Rest(model, more_ids[:2]).dense_loss(), rel=1e-5) and abs(got - before) > 1e-3


@pytest.mark.filterwarnings("ignore:.* experts saw too few")
def test_mixtures_get_one_width_a_bank_within_the_budget(more_ids):
    model = make_mixture("deepseek_v3")
    whole = sum(Described(model).sizes)
    chosen = Predicted(samples=8, multiple=8, floor=0.2)
    report = prune(model, 0.5, "wanda", allocation=chosen, repair=None, text=more_ids)
    ffns = find_ffns(model)
    after = [ffn.intermediate_size for ffn in ffns]
    assert after == [layer.after for layer in report.layers] and 0.4 * whole < sum(after) <= 0.5 * whole
    assert {len({f.intermediate_size for f in group}) for group in groups(ffns)} == {1}
    assert all(f.intermediate_size % 8 == 0 for f in ffns)
