"""Growth of the loss when one layer is narrowed: measured, estimated, interpolated, and spent."""

import copy
import dataclasses
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pyprune import InputError, KeepIndex
from pyprune.base import statistics
from pyprune.evaluation import perplexity
from pyprune.model import families, surgery
from pyprune.model.described import Described
from pyprune.model.families import find_ffns
from pyprune.model.narrowing import narrowed
from pyprune.pruning import importance
from pyprune.pruning.allocation.by_sensitivity import choose_widths
from pyprune.pruning.calibration import LayerStream
from pyprune.pruning.repair.least_squares import least_squares
from pyprune.pruning.sensitivity import SensitivityCurves, curves, output_gradients, second_order

WANDA = importance.get("wanda")


def score(ffn, stats):
    return WANDA(ffn.weights(), stats)


def make_curves(sizes, widths, losses, kind="loss"):
    rows = {"widths": tuple(map(tuple, widths)), "losses": tuple(map(tuple, losses))}
    return SensitivityCurves(kind=kind, sizes=tuple(sizes), tokens=10, fingerprint="f" * 64, **rows)


@pytest.mark.parametrize(
    ("name", "repair"),
    [
        *((name, False) for name in ("gpt2", "gpt_neo", "opt", "falcon", "gemma3_text", "phi3", "lfm2", "biogpt")),
        ("llama", True),
        ("gpt2", True),
    ],
)
def test_a_measured_loss_is_that_of_the_model_cut_in_one_layer(name, repair, tiny, ids):
    model = tiny(name)
    ffns = find_ffns(model)
    found = curves(
        Described(model), ids, score, shares=(0.25, 0.75), multiple=8, damping=1e-2 if repair else None, windows=9
    )
    assert found.sizes == (96, 96, 96)
    assert found.widths == ((24, 72),) * 3
    assert found.tokens == 4 * 15
    assert found.fingerprint == families.fingerprint(model, ffns)
    dense = math.log(perplexity(model, ids).perplexity)
    stream = LayerStream(model, ffns, ids)
    for layer, ffn in enumerate(ffns):
        stats = stream.statistics(ffn, gram=True)
        for width, loss in zip(found.widths[layer], found.losses[layer], strict=True):
            keep = KeepIndex.from_scores(score(ffn, stats), width)
            down = least_squares(ffn.weights().down, stats, keep.neurons.long(), 1e-2).down if repair else None
            cut, own = copy.deepcopy((model, ffns))
            surgery.cut(own[layer], keep, down)
            assert loss == pytest.approx(math.log(perplexity(cut, ids).perplexity) - dense, abs=2e-6)
        stream.advance()


def test_the_loss_is_taken_over_windows_spread_over_the_text(tiny, ids):
    model = tiny("llama")
    ffns = find_ffns(model)
    seen = []

    def first_layer(ffn, stats):
        seen.append(stats.tokens)
        return torch.arange(96.0)

    found = curves(Described(model), ids, first_layer, shares=(0.5,), windows=2)
    assert seen == [64] * 3  # statistics see all of it
    assert found.tokens == 2 * 15
    with narrowed(ffns[0], torch.arange(48, 96)):
        cut = perplexity(model, ids[[0, 3]]).perplexity
    expected = math.log(cut / perplexity(model, ids[[0, 3]]).perplexity)
    assert found.losses[0][0] == pytest.approx(expected, abs=2e-6)


def state_of(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    own = ["forward" in vars(m) for m in model.modules()]
    return hooks, own, [(p.data_ptr(), p.clone(), p.requires_grad, p.grad) for p in model.parameters()]


def same(a, b):
    weights = zip(a[2], b[2], strict=True)
    return a[:2] == b[:2] and all(
        x[0] == y[0] and torch.equal(x[1], y[1]) and x[2] == y[2] and y[3] is None for x, y in weights
    )


@pytest.mark.parametrize("kind", ["loss", "error", "fisher"])
@pytest.mark.parametrize("stage", [None, "score", "measure"])
def test_the_model_is_as_before_also_after_an_error(kind, stage, tiny, ids, monkeypatch):
    model = tiny("gpt2")
    model.transformer.wpe.weight.requires_grad_(False)
    before = state_of(model)

    def failing(ffn, stats):
        if ffn.layer == 2 and stage == "score":
            raise InputError("no")
        if ffn.layer == 1 and stage == "measure":
            # The loss is next: it fails in the middle of a forward pass, inside the narrowed layer.
            monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: 1 / 0)
            monkeypatch.setattr(torch.Tensor, "cumsum", lambda *_: 1 / 0)
        return score(ffn, stats)

    if stage is None:
        curves(Described(model), ids, failing, kind=kind, damping=1e-2)
    else:
        with pytest.raises((InputError, ZeroDivisionError)):
            curves(Described(model), ids, failing, kind=kind, damping=1e-2)
    monkeypatch.undo()
    assert same(before, state_of(model))
    assert model.training is False


def test_gradients_are_those_of_labels_that_the_model_draws(tiny, ids):
    model = tiny("llama").double()
    ffns = find_ffns(model)
    gradients = output_gradients(model, ffns, ids, seed=7)
    generator = torch.Generator().manual_seed(7)
    direction = torch.randn(16, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for i in range(2):
        labels = torch.multinomial(model(ids[i][None]).logits[0, :-1].float().softmax(-1), 1, generator=generator)[:, 0]

        def loss(step, i=i, labels=labels):
            handle = ffns[1].down.register_forward_hook(lambda m, a, out: out + step * direction)
            with torch.no_grad():
                logits = model(ids[i][None]).logits[0, :-1]
            handle.remove()
            return float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))

        slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
        assert float((gradients[1][16 * i : 16 * i + 16].double() * direction).sum()) == pytest.approx(slope, rel=1e-3)
    assert [g.shape for g in gradients] == [(64, 32)] * 3


@pytest.mark.parametrize("repaired", [False, True])
def test_second_order_against_every_width_by_itself(repaired):
    T, F, D = 40, 12, 5
    generator = torch.Generator().manual_seed(0)
    a, g, v = (torch.randn(n, m, generator=generator).double() for n, m in ((T, F), (T, D), (F, D)))
    order = torch.randperm(F, generator=generator)
    gram = a.t() @ a
    totals = {
        kind: second_order(kind, a, g, v, order, gram / T if repaired else None, 0.1) for kind in ("error", "fisher")
    }
    for k in range(F + 1):
        keep = order[:k]
        change = v.clone()
        if k and repaired:
            stats = statistics.ActivationStats(T, a.mean(0), a.abs().mean(0), a.square().sum(0), gram)
            change[keep] -= least_squares(v, stats, keep, 0.1).down
        elif k:
            change[keep] = 0.0
        e = a @ change
        assert_close(float(totals["fisher"][k]), float(0.5 * (e * g).sum(1).square().sum()), rtol=1e-8, atol=1e-9)
        error = 0.5 * (e.square().sum(1) * g.square().sum(1)).sum() / D
        assert_close(float(totals["error"][k]), float(error), rtol=1e-8, atol=1e-9)


def test_second_order_is_exact_for_a_quadratic_loss():
    # L_t = |y_t - z_t|^2 / 2 with labels z_t drawn from the model, N(y_t, I): g_t = y_t - z_t, and the Hessian is I.
    T, F, D = 20_000, 6, 4
    generator = torch.Generator().manual_seed(0)
    a, g = torch.randn(T, F, generator=generator), torch.randn(T, D, generator=generator)
    v = torch.randn(F, D, generator=generator)
    for kind in ("error", "fisher"):
        total = second_order(kind, a, g, v, torch.arange(F))
        for k in range(F):
            truth = 0.5 * float((a[:, k:].double() @ v[k:].double()).square().sum())
            assert float(total[k]) == pytest.approx(truth, rel=0.03)


def test_a_layer_of_dead_neurons_costs_nothing():
    zeros = torch.zeros(9, 6)
    total = second_order("error", zeros, torch.ones(9, 4), torch.ones(6, 4), torch.arange(6), zeros.t() @ zeros, 0.01)
    assert total.tolist() == [0.0] * 7


@torch.no_grad()
def test_estimates_are_the_expected_growth_in_nats_a_token(tiny):
    # Labels drawn from the dense model make the expected growth the KL divergence, dense || narrowed.
    model = tiny("llama")
    ffns = find_ffns(model)
    ids = torch.randint(3, 128, (6, 16), generator=torch.Generator().manual_seed(3))
    ffns[1].weights().down[:48].mul_(0.1)  # the second order must be enough
    with narrowed(ffns[1], torch.arange(48, 96)):
        changed = model(ids).logits[:, :-1].double().log_softmax(-1)
    dense = model(ids).logits[:, :-1].double().log_softmax(-1)
    truth = float((dense.exp() * (dense - changed)).sum(-1).mean())

    def estimate(kind, seed):
        def last_first(ffn, stats):
            return torch.arange(96.0)

        return curves(Described(model), ids, last_first, kind=kind, shares=(0.5,), windows=6, seed=seed).losses[1][0]

    assert truth > 1e-4
    mean = {kind: sum(estimate(kind, seed) for seed in range(12)) / 12 for kind in ("fisher", "error")}
    assert mean["fisher"] == pytest.approx(truth, rel=0.2)
    assert mean["error"] == pytest.approx(truth, rel=0.5)


def test_a_power_law_is_found_again():
    found = make_curves([100], [[20, 40, 60, 80]], [[r**3 for r in (0.8, 0.6, 0.4, 0.2)]])
    widths = [1, 10, 33, 50, 80, 95, 100]
    assert found.at(0, widths) == pytest.approx([(1 - w / 100) ** 3 for w in widths])


def test_interpolation_by_hand():
    assert make_curves([10], [[5]], [[1.0]]).at(0, [10, 9, 5]) == pytest.approx([0.0, 0.04, 1.0])  # quadratic
    # Noise: a wider layer that seems worse, and one that seems to help.
    found = make_curves([10], [[2, 4, 6, 8]], [[3.0, 0.5, 1.0, -0.2]])
    assert found.at(0, [10, 9, 8, 7, 6, 5, 4, 2]) == pytest.approx([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 3.0])
    assert make_curves([10], [[2, 5]], [[-1.0, 0.0]]).at(0, [1, 3, 10]) == [0.0, 0.0, 0.0]


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_interpolation_falls_with_the_width(data):
    size = data.draw(st.integers(3, 200))
    widths = sorted(data.draw(st.sets(st.integers(1, size - 1), min_size=1, max_size=6)))
    losses = data.draw(st.lists(st.floats(-0.1, 5), min_size=len(widths), max_size=len(widths)))
    found = make_curves([size], [widths], [losses])
    values = found.at(0, range(1, size + 1))
    assert values[-1] == 0
    assert all(math.isfinite(v) for v in values)
    assert all(b <= a + 1e-9 * abs(a) for a, b in itertools.pairwise(values))
    assert values[widths[0] - 1] == pytest.approx(max(0.0, *losses))


def test_widths_go_where_they_are_worth_most():
    found = make_curves([16, 16], [[8], [8]], [[0.1], [10.0]])
    # 20 of 32 neurons in fours: the second layer is worth 100 times the first.
    assert choose_widths(found, 20 / 32, multiple=4) == [4, 16]
    assert choose_widths(found, 20 / 32, multiple=4, floor=0.5) == [8, 12]
    assert choose_widths(found, 0.75, multiple=4, protect=(1, 0)) == [16, 8]
    assert choose_widths(found, 1.0, multiple=4) == [16, 16]


def test_flat_curves_leave_no_neurons_unspent():
    assert sum(choose_widths(make_curves([16, 16], [[8], [8]], [[0.0], [0.0]]), 0.75, multiple=4)) == 24


@pytest.mark.parametrize("options", [{"floor": 0.6}, {"multiple": 16}, {"protect": (0, 1)}])
def test_a_share_below_the_least_widths_is_refused(options):
    found = make_curves([16, 16], [[8], [8]], [[1.0], [1.0]])
    with pytest.raises(InputError, match=r"keep must be at least .* with this multiple, floor and protect; got 0\.5"):
        choose_widths(found, 0.5, **{"multiple": 4, **options})


def test_curves_survive_json():
    found = make_curves([16, 12], [[4, 8], [6]], [[0.3, 0.1], [0.2]])
    again = SensitivityCurves.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": ((0.1, float("nan")), (0.2,))}, "losses of layer 0 must be finite"),
        ({"losses": ((0.1, 0.2), (float("inf"),))}, "losses of layer 1 must be finite"),
        ({"losses": ((0.1,), (0.2,))}, "losses of layer 0 must be 2 numbers; got 1"),
        ({"losses": ((0.1, 0.2),)}, "losses must be given for 2 layers; got 1"),
        ({"widths": ((4, 8),)}, "widths must be given for 2 layers; got 1"),
        ({"widths": ((8, 4), (6,))}, "widths of layer 0 must ascend between 1 and 15"),
        ({"widths": ((4, 16), (6,))}, "widths of layer 0 must ascend"),
        ({"widths": ((0, 8), (6,))}, "widths of layer 0 must ascend"),
        ({"kind": "taste"}, "kind must be one of loss, error, fisher"),
    ],
)
def test_curves_that_break_a_rule(change, message):
    found = make_curves([16, 12], [[4, 8], [6]], [[0.3, 0.1], [0.2]])
    with pytest.raises(InputError, match=message):
        dataclasses.replace(found, **change)


@pytest.mark.parametrize("change", [{"sizes": None}, {"widths": [1, 2]}, {"tokens": "many"}])
def test_json_that_is_something_else(change):
    values = make_curves([16], [[8]], [[1.0]]).to_json()
    with pytest.raises(InputError, match="curves must be as `to_json` gives them"):
        SensitivityCurves.from_json({**values, **change})
    del values["losses"]
    with pytest.raises(InputError, match="KeyError: 'losses'"):
        SensitivityCurves.from_json(values)


def test_curves_of_another_model_are_refused():
    found = make_curves([16, 12], [[8], [6]], [[1.0], [1.0]])
    found.check_fits([16, 12])
    with pytest.raises(InputError, match="curves must be of layers"):
        found.check_fits([16, 16])
    with pytest.raises(InputError, match="curves must belong to this model"):
        found.check_fits([16, 12], "a" * 64)
    with pytest.raises(InputError, match=r"widths must lie in \[1, 16\]; got \[17\]"):
        found.at(0, [17])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "taste"}, "kind must be one of"),
        ({"shares": ()}, "shares must be one or more"),
        ({"shares": (0.5, 1.0)}, "shares must be one or more"),
        ({"damping": 0.0}, "damping must be positive"),
        ({"windows": 0}, "windows must be at least 1"),
        ({"ids": torch.ones(3, 1, dtype=torch.long)}, r"ids must be \[N, W\] with at least 2 tokens"),
        ({"ids": torch.ones(1, 65, dtype=torch.long)}, "ids must have windows of at most 64"),
    ],
)
def test_bad_input(options, message, tiny, ids):
    model = tiny("llama")
    with pytest.raises(InputError, match=message):
        curves(Described(model), options.pop("ids", ids), score, **options)


@pytest.mark.parametrize("kind", ["loss", "error"])
def test_weights_that_are_not_finite_are_refused(kind, tiny, ids):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="finite"):
        curves(Described(model), ids, score, kind=kind)
