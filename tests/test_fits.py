"""What `prune` fits: damping by held-out windows, the dense residual stream as target, rows by gradient, bad text."""

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from pyprune import InputError, UnsupportedModelError, prune
from pyprune.base.statistics import ActivationStats
from pyprune.model.families import find_ffns
from pyprune.pruning.calibration import LayerStream
from pyprune.pruning.repair.least_squares import DAMPINGS, least_squares
from pyprune.pruning.repair.refit import refit

SMALL = {"keep": 0.5, "allocation": "uniform:multiple=8"}


@pytest.fixture
def text():
    return torch.randint(3, 128, (16, 32), generator=torch.Generator().manual_seed(5))


def hidden_states(model, ids):
    with torch.no_grad():
        return model(ids, output_hidden_states=True, use_cache=False).hidden_states


def stats_of(a, e=None):
    gram = a.t() @ a
    return ActivationStats(
        len(a), a.mean(0), a.abs().mean(0), a.square().sum(0), gram, cross=None if e is None else a.t() @ e
    )


def test_least_squares_towards_more_than_the_own_output_by_hand():
    generator = torch.Generator().manual_seed(0)
    a, v, e = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((50, 6), (6, 3), (50, 3)))
    keep = torch.tensor([0, 2, 3])
    got = least_squares(v, stats_of(a, e), keep, 1e-9, target=0.25).down
    expected = torch.linalg.lstsq(a[:, keep], a @ v + 0.25 * e).solution
    assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_damping_is_chosen_by_the_windows_that_the_fit_has_not_seen():
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    keep = torch.arange(30)

    def chosen(tokens):
        seen, held = (torch.randn(n, 40, generator=generator, dtype=torch.float64) for n in (tokens, 400))
        whole = stats_of(torch.cat([seen, held]))
        return seen, held, least_squares(v, replace(whole, held_out=stats_of(held), seen=stats_of(seen)), keep, None)

    seen, held, repair = chosen(32)  # hardly more tokens than neurons: the least ridge overfits
    errors = {}
    for damping in DAMPINGS:
        new = least_squares(v, stats_of(seen), keep, damping).down
        errors[damping] = float((held @ v - held[:, keep] @ new).square().sum())
    assert repair.damping == min(errors, key=errors.get) > DAMPINGS[0]
    assert errors[DAMPINGS[0]] > 1.2 * min(errors.values())


def test_every_source_counts_alike_where_the_damping_is_chosen(tiny, text):
    model = tiny("llama")
    ffns = find_ffns(model)
    sources = torch.tensor([0, 1, 0, 0, 1, 0, 0, 0] * 2)
    stream = LayerStream(model, ffns, text, sources=sources)
    found = stream.statistics(ffns[0], gram=True, held_out=True)
    v = ffns[0].weights().down.double()
    alone = [LayerStream(model, ffns, text[w : w + 1]).statistics(ffns[0], gram=True) for w in range(len(text))]
    of = [[w for w in range(len(text)) if sources[w] == s] for s in (0, 1)]
    held = [windows[len(windows) - max(1, len(windows) // 4) :] for windows in of]
    seen = [w for w in range(len(text)) if w not in held[0] + held[1]]
    assert found.seen.tokens == sum(alone[w].tokens for w in seen) and found.tokens == text.numel()
    assert_close(found.seen.gram, sum(alone[w].gram for w in seen))
    assert_close(found.gram, sum(part.gram for part in alone))
    grams = [sum(alone[w].gram for w in windows) for windows in held]
    assert_close(found.held_out.gram, sum(g / (v * (g @ v)).sum() for g in grams))
    assert_close(float((v * (found.held_out.gram @ v)).sum()), 2.0), "each source has an error of 1 where all is cut"
    plain = LayerStream(model, ffns, text).statistics(ffns[0], gram=True, held_out=True)
    last = len(text) - max(1, len(text) // 4)
    assert_close(plain.seen.gram, sum(alone[w].gram for w in range(last)))


def test_chosen_damping_is_reported(tiny, text):
    report = prune(tiny("llama"), repair="least-squares:damping=auto", **SMALL, text=text)
    assert {r.damping for r in report.layers} <= set(DAMPINGS)
    assert {
        r.damping for r in prune(tiny("llama"), repair="least-squares:damping=0.05", **SMALL, text=text).layers
    } == {0.05}
    assert report.to_json()["layers"][0]["damping"] in DAMPINGS


@pytest.mark.parametrize("family_name", ["gpt2", "llama", "opt", "gpt_neox"])
def test_target_draws_the_stream_back_to_the_dense_one(family_name, tiny, text):
    dense = hidden_states(tiny(family_name).double(), text)
    left = {}
    for target in (0.0, 1.0):
        model = tiny(family_name).double()
        prune(model, method="random", repair=f"least-squares:damping=1e-6,target={target}", **SMALL, text=text)
        # The last entry has gone through the final norm; the one before it is what the last layer but one gives.
        left[target] = float((hidden_states(model, text)[-2] - dense[-2]).square().sum())
    assert left[1.0] < left[0.0]


def test_target_is_the_difference_of_the_streams_at_the_second_layer(tiny, text):
    dense, model = tiny("llama").double(), tiny("llama").double()
    keep = torch.arange(48)
    ffns = find_ffns(model)
    stream = LayerStream(model, ffns, text, twin=True)
    with torch.no_grad():
        stream.advance_twin()
        ffns[0].weights().down[48:] = 0.0
        stream.advance()
        stream.advance_twin()
        x, more = stream.inputs(ffns[1])
        stats = stream.statistics(ffns[1], gram=True)
    got = hidden_states(model, text)[2].reshape(-1, 32)
    wanted = hidden_states(dense, text)[2].reshape(-1, 32)
    assert_close(more.double(), wanted - got, rtol=1e-5, atol=1e-5)
    assert x.shape == more.shape == (512, 32)
    a = torch.nn.functional.silu(x.double() @ ffns[1].weights().gate.t()) * (x.double() @ ffns[1].weights().up.t())
    assert_close(stats.cross, a.detach().t() @ (wanted - got), rtol=1e-4, atol=1e-4)
    assert len(keep) == 48


def test_target_is_refused_where_something_stands_behind_the_ffn(tiny, text):
    model = tiny("gemma2")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="target above 0 needs FFNs whose output is added"):
        prune(model, repair="least-squares:target=0.5", **SMALL, text=text)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("family_name", ["gpt2", "llama", "phi3"])
def test_refit_lowers_the_error_that_least_squares_left(family_name, tiny, text):
    model = tiny(family_name)
    ffn = find_ffns(model)[1]
    keep = torch.arange(40)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8192, 32, generator=generator)
    fitted = refit(ffn, keep, ffn.weights().down[keep].detach(), x, None)
    start = refit(ffn, keep, ffn.weights().down[keep].detach(), x[:4], None)  # no whole step fits: nothing moves
    assert fitted.error_refit < 0.8 * start.error_refit
    assert [part.shape for part in fitted.inputs] == [(40, 32)] * (len(ffn.weights().parts) - 1)
    # The dense rows are its own fixed point.
    whole = refit(ffn, torch.arange(96), ffn.weights().down.detach(), x, None)
    assert whole.error_refit < 1e-9


@pytest.mark.parametrize("family_name", ["gpt2", "llama", "phi3", "opt"])
def test_refit_prunes_and_is_no_worse_than_least_squares(family_name, tiny, text):
    errors = {}
    for repair in ("least-squares", "refit"):
        model = tiny(family_name)
        dense = hidden_states(model, text)
        report = prune(model, method="obs", repair=repair, **SMALL, text=text)
        errors[repair] = float((hidden_states(model, text)[1] - dense[1]).square().sum())
    assert all(r.error_refit is not None for r in report.layers)
    assert errors["refit"] <= errors["least-squares"] * 1.2
    again = tiny(family_name)
    prune(again, method="obs", repair="refit", **SMALL, text=text)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_text_too_short_says_how_much_is_needed(tiny):
    ids = torch.randint(3, 128, (2, 16))
    for damping, needed in ((1e-2, 48), ("auto", 64)):
        model = tiny("llama")
        before = copy.deepcopy(model.state_dict())
        match = f"text must hold at least {needed} tokens to fit 48 neurons a layer .*; got '32 tokens'"
        with pytest.raises(InputError, match=match):
            prune(model, repair=f"least-squares:damping={damping}", **SMALL, text=ids)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    prune(tiny("llama"), repair=None, **SMALL, text=ids)


def test_dead_neurons_are_counted_and_survived(tiny, text):
    model = tiny("llama")
    with torch.no_grad():
        for layer, count in ((0, 5), (2, 60)):
            find_ffns(model)[layer].weights().up[:count] = 0.0
    for method in ("wanda", "obs", "wanda-unique", "taylor-element"):
        pruned = copy.deepcopy(model)
        with pytest.warns(UserWarning, match="65 of 288 neurons, in 2 layers, were never active"):
            report = prune(pruned, method=method, **SMALL, text=text)
        assert [r.dead for r in report.layers] == [5, 0, 60]
        assert math.isfinite(float(pruned(text).logits.abs().sum()))


def test_no_warning_without_dead_neurons(tiny, text):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        prune(tiny("llama"), **SMALL, text=text)


def test_dense_statistics_where_nothing_is_sequential(tiny, text):
    """Published FLAP: the last layer's bias is the mean over the dense stream, whatever earlier layers lost."""
    model = tiny("llama", mlp_bias=True)
    dense = copy.deepcopy(model)
    report = prune(model, method="flap", repair="bias", sequential=False, **SMALL, text=text)
    rows = []
    down = find_ffns(dense)[2].down
    handle = down.register_forward_pre_hook(lambda m, args: rows.append(args[0].reshape(-1, 96).detach()))
    hidden_states(dense, text)
    handle.remove()
    gone = [j for j in range(96) if j not in report.mask.layers[2].neurons.tolist()]
    shift = rows[0].mean(0)[gone] @ down.weight.detach().t()[gone]
    assert_close(find_ffns(model)[2].weights().down_bias - down.bias, shift, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("allocation", ["uniform", "global", "sensitivity"])
@pytest.mark.parametrize("method", ["obs", "taylor-element2", "fisher", "wanda-unique"])
def test_every_kind_of_criterion_goes_with_every_allocation(method, allocation, tiny, text):
    report = prune(tiny("llama"), keep=0.5, method=method, allocation=f"{allocation}:multiple=8", text=text)
    assert sum(report.mask.widths) == pytest.approx(144, abs=8)


def test_gradients_are_of_the_dense_model(tiny, text):
    """Layer 2 is scored after two layers were cut; its scores must not know."""
    model = tiny("llama")
    sequential = prune(copy.deepcopy(model), method="taylor-element", repair=None, **SMALL, text=text)
    config = {"method": "taylor-element", "repair": None, "sequential": False, **SMALL}
    assert sequential.mask == prune(copy.deepcopy(model), **config, text=text).mask


def test_protected_layers_stay_whole(tiny, text):
    report = prune(tiny("llama"), keep=0.75, allocation="uniform:multiple=1,protect=1,0", text=text)
    assert report.mask.widths == (96, 60, 60)


def test_latency_keeps_its_promise_on_the_table(tiny, text, monkeypatch):
    from pyprune.speed import latency

    widths = tuple(range(8, 97, 8))
    alone = tuple(width / 8 for width in widths)
    table = latency.LatencyTable({}, latency.Workload(), 32, (96,) * 3, widths, alone, {}, {}, 60.0, 70.0)
    monkeypatch.setattr(latency, "measure", lambda model, widths, workload, progress: table)
    config = {"allocation": "latency:multiple=8,target_speedup=1.25", "repair": "least-squares"}
    report = prune(tiny("llama"), **config, text=text)
    assert report.promise == pytest.approx(table.speedup(report.mask.widths))
    assert 1.25 <= report.promise < 1.3
    assert report.to_json()["promise"] == report.promise
    facts = report.mask.provenance["config"]
    assert facts["target_speedup"] == 1.25
    assert facts["workload"] == "decode:1"
    assert "keep" not in facts
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"target_speedup must be at most 2\.22.*; got 3"):
        prune(model, allocation="latency:multiple=8,target_speedup=3", text=text)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_hidden_states_that_are_not_finite_are_named(tiny, text):
    model = tiny("gpt2").half()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[:] = 60_000
    with pytest.raises(InputError, match="what enters layer 2 must be finite; got 'NaN or infinity'"):
        prune(model, **SMALL, text=text)
