"""Gradient statistics against plain autograd and finite differences, and what they refuse."""

import copy
import dataclasses

import pytest
import torch
from conftest import VOCABULARY, WIDTH, make_model
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from tower_cases import make_tower

from pyprune import InputError
from pyprune.base.statistics import ActivationStats
from pyprune.model import families
from pyprune.pruning import gradients, importance

# Conv1D, gated, gated with biases, fused, in the decoder layer, plain with biases, w1/w3/w2.
SPELLINGS = ("gpt2", "llama", "llama mlp_bias", "phi3", "opt", "gpt_neox", "lfm2")


def wide_model(spelling):
    family, *biases = spelling.split()
    return make_model(family, **dict.fromkeys(biases, True)).double()


def collect(model, ids, **options):
    return gradients.collect(model, families.find_ffns(model), ids, **options)


def loss_of(model, window):
    return cross_entropy(model(input_ids=window[None], use_cache=False).logits[0, :-1], window[1:])


def naively(model, window):
    """By plain autograd, for each FFN: a * dL/da of every token, w * dL/dw summed over the neuron, and dL/dw."""
    ffns = families.find_ffns(model)
    entered = []

    def keep(module, args):
        args[0].retain_grad()
        entered.append(args[0])

    handles = [ffn.down.register_forward_pre_hook(keep) for ffn in ffns]
    model.zero_grad()
    loss_of(model, window).backward()
    for handle in handles:
        handle.remove()
    slopes = copy.deepcopy(model)  # the same model, its weights replaced by their gradients
    for slope, parameter in zip(slopes.parameters(), model.parameters(), strict=True):
        slope.data = parameter.grad
    results = []
    for ffn, a in zip(ffns, entered, strict=True):
        w, g = ffn.weights(), dataclasses.replace(ffn, holder=slopes.get_submodule(ffn.name)).weights()
        pairs = [*zip(w.parts, g.parts, strict=True)]
        pairs += [
            (x[:, None], y[:, None]) for x, y in zip(w.input_biases, g.input_biases, strict=True) if x is not None
        ]
        total = sum((x * y).sum(1) for x, y in pairs)
        results.append(((a * a.grad).reshape(len(window), -1).detach(), total.detach(), [p.detach() for p in g.parts]))
    model.zero_grad()
    return results


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_against_plain_autograd(spelling, ids):
    model, ids = wide_model(spelling), ids[:3]
    found = collect(model, ids, parts_square=True)
    samples = [naively(model, window) for window in ids]
    assert len(found) == 3
    for layer, stats in enumerate(found):
        products, totals, parts = zip(*(sample[layer] for sample in samples), strict=True)
        assert (stats.samples, stats.tokens) == (3, 48)
        assert_close(stats.neuron_taylor, torch.cat(products).abs().mean(0))
        assert_close(stats.mask_square, torch.stack([p.sum(0) ** 2 for p in products]).mean(0))
        assert_close(stats.sample_taylor, torch.stack(totals).abs().mean(0))
        for i, by_sample in enumerate(zip(*parts, strict=True)):
            assert_close(stats.parts[i], torch.stack(by_sample).mean(0))
            assert_close(stats.parts_square[i], torch.stack(by_sample).square().mean(0))
        assert len(stats.parts) == len(stats.parts_square) == len(parts[0])


# None of these has a norm that goes through float32, which would blur the differences.
@pytest.mark.parametrize("spelling", ["stablelm", "opt"])
def test_mask_against_finite_differences(spelling, ids):
    model, window = wide_model(spelling), ids[0]
    found = collect(model, window[None])
    for ffn, stats in zip(families.find_ffns(model), found, strict=True):
        for neuron in (0, WIDTH - 1):
            losses = []
            row = ffn.weights().down.detach()[neuron]
            weights = row.clone()
            for mask in (1 - 1e-4, 1 + 1e-4, 1):
                row.copy_(weights * mask)  # a mask on a_j is one on what its down row gives
                with torch.no_grad():
                    losses.append(loss_of(model, window).item())
            slope = (losses[1] - losses[0]) / 2e-4
            assert stats.mask_square[neuron].item() == pytest.approx(slope**2, rel=1e-4, abs=1e-14)


@pytest.mark.parametrize("spelling", ["gpt2", "llama", "llama mlp_bias", "phi3"])
def test_down_row_carries_what_its_activation_does(spelling, ids):
    """sum_i V_ji dL/dV_ji = sum_t a_tj dL/da_tj, and the same of a linear up row without a bias."""
    model = wide_model(spelling)
    found = collect(model, ids[:1])
    for ffn, stats in zip(families.find_ffns(model), found, strict=True):
        weights = ffn.weights()
        down = (weights.down * stats.parts[-1]).sum(1)
        assert_close(down.square(), stats.mask_square)
        if weights.gate is not None and weights.up_bias is None:
            assert_close((weights.up * stats.parts[-2]).sum(1), down)


def test_a_block_that_several_layers_run_has_one_mask(ids):
    """The same neuron in each place at once, by a mask that plain autograd goes through."""
    model = make_tower("zamba").double()
    (ffn,) = families.find_ffns(model)
    square = torch.zeros(WIDTH, dtype=torch.float64)
    for window in ids:
        mask = torch.ones(WIDTH, dtype=torch.float64, requires_grad=True)
        handles = [down.register_forward_pre_hook(lambda _, args, m=mask: (args[0] * m,)) for down in ffn.downs]
        loss_of(model, window).backward()
        square += mask.grad.square() / len(ids)
        for handle in handles:
            handle.remove()
    assert len(ffn.downs) == 2
    assert_close(collect(model, ids)[0].mask_square, square, rtol=1e-6, atol=1e-12)


def test_summed_loss_in_rows():
    logits = torch.randn(8, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 10, 3, 3, 7, 1, 9])
    expected = cross_entropy(logits[:-1], targets, reduction="sum")
    expected.backward()
    for rows in (1, 3, 7, 128):
        loss, gradient = gradients._summed_loss(logits.detach(), targets, rows)
        assert loss == pytest.approx(expected.item(), rel=1e-14)
        assert_close(gradient, logits.grad)


def test_what_nobody_asked_for_is_not_kept(ids):
    (without, *_), (both, *_) = (collect(make_model("llama"), ids, parts=p, parts_square=p) for p in (False, True))
    assert without.parts == without.parts_square == ()
    assert len(both.parts) == len(both.parts_square) == 3
    for name in ("neuron_taylor", "mask_square", "sample_taylor"):
        assert torch.equal(getattr(without, name), getattr(both, name))


def test_dtypes(ids):
    model = make_model("llama")
    exact = collect(model, ids, parts_square=True)
    half = collect(model.bfloat16(), ids, parts_square=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for found, stats in zip(half, exact, strict=True):
        assert {t.dtype for t in (*found.parts, *found.parts_square)} == {torch.float32}
        assert found.sample_taylor.dtype == torch.float64
        for name in ("neuron_taylor", "mask_square", "sample_taylor"):
            a, b = getattr(found, name), getattr(stats, name)
            assert ((a - b).norm() / b.norm()).item() < 0.1


def test_repeatable_and_counted(ids):
    model, seen = make_model("gpt2"), []
    first, again = (collect(model, ids, progress=lambda *step: seen.append(step)) for _ in range(2))
    assert seen[:5] == [("collecting gradients", i, 4) for i in range(5)]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.mask_square, b.mask_square)
        assert all(torch.equal(p, q) for p, q in zip(a.parts, b.parts, strict=True))


@pytest.fixture
def used():
    """A model in the middle of a training step, with some parameters frozen, and a function that checks it still is."""
    model = make_model("opt", dropout=0.5)
    model.model.decoder.layers[1].train()
    parameters = list(model.parameters())
    for i, p in enumerate(parameters):
        p.requires_grad_(i % 3 > 0)
        p.grad = torch.full_like(p, i) if i % 2 else None
    state = [(p.requires_grad, p.grad, p.detach().clone()) for p in parameters]
    modes = [m.training for m in model.modules()]

    def check():
        for i, (p, (needed, gradient, value)) in enumerate(zip(parameters, state, strict=True)):
            assert p.requires_grad is needed
            assert p.grad is gradient
            assert gradient is None or (gradient == i).all()
            assert torch.equal(p, value)
            assert not p._post_accumulate_grad_hooks
        assert [m.training for m in model.modules()] == modes
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())

    check()
    return model, check


def test_leaves_the_model_as_it_was(used, ids):
    model, check = used
    with torch.no_grad():
        inside = collect(model, ids)
    check()
    assert torch.equal(inside[0].mask_square, collect(make_model("opt"), ids)[0].mask_square)  # no dropout, no grads


def test_leaves_the_model_as_it_was_after_an_error(used, ids):
    model, check = used

    def stop(stage, done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, ids, progress=stop)
    check()


def poison(tensor, value=float("nan")):
    with torch.no_grad():
        tensor.view(-1)[0] = value


def test_nan_activations_name_the_layer(ids):
    model = make_model("llama")
    poison(families.find_ffns(model)[1].weights().up)
    with pytest.raises(
        InputError, match=r"^activations of layer 1 must be finite; 1 of 96 neurons are not.*got \[0\]$"
    ):
        collect(model, ids)


def test_nan_loss_names_the_window(ids):
    model = make_model("llama", tie_word_embeddings=False)
    poison(model.lm_head.weight)
    with pytest.raises(InputError, match=r"^loss of window 0 must be finite; got nan$"):
        collect(model, ids)


@pytest.mark.parametrize("layer", [0, 2])
def test_nan_gradients_name_the_layer(layer, ids):
    model = make_model("llama")
    ffns = families.find_ffns(model)

    def spoil(module, args, output):
        output.register_hook(lambda g: g * float("inf"))

    model.model.layers[layer].mlp.register_forward_hook(spoil)
    with pytest.raises(InputError, match=rf"^gradients of layer {layer} must be finite; 96 of 96 neurons.*got \[0\]$"):
        gradients.collect(model, ffns, ids)


def test_zero_gradients_name_the_layer(ids):
    model = make_model("gpt_neox")
    with torch.no_grad():
        families.find_ffns(model)[1].weights().down.zero_()
    with pytest.raises(InputError, match=r"^gradients of layer 1 must not all be zero, or no neuron can be ranked"):
        collect(model, ids)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_dead_neurons_score_zero(family, ids):
    model = make_model(family)
    ffn = families.find_ffns(model)[1]
    weights = ffn.weights()
    with torch.no_grad():
        weights.up[7] = 0
        if weights.up_bias is not None:
            weights.up_bias[7] = -1  # below ReLU's threshold
    found = collect(model, ids, parts_square=True)[1]
    stats = ActivationStats(64, *torch.zeros(3, WIDTH), torch.zeros(WIDTH, WIDTH), found)
    for name, entry in importance.CRITERIA.items():
        if entry.needs & {"gradients", "gradients2"}:
            scores = entry(weights, stats)
            assert scores.shape == (WIDTH,), name
            assert scores[7] == 0, name
            assert (scores > 0).sum() > WIDTH / 2, name


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.ones(3, 1, dtype=torch.long), "ids must have windows of at least 2 tokens, one to predict; got 1"),
        (torch.ones(1, 65, dtype=torch.long), "ids must have windows of at most 64 tokens .*; got 65"),
        (torch.full((1, 9), VOCABULARY), r"must lie in \[0, 128\)"),
        (torch.ones(2, 9), "must hold token ids; got torch.float32"),
    ],
)
def test_bad_windows(ids, message):
    with pytest.raises(InputError, match=message):
        collect(make_model("gpt2"), ids)


def test_shortest_windows(ids):
    model = wide_model("llama")
    stats = collect(model, ids[:1, :2])[0]
    product = naively(model, ids[0, :2])[0][0]
    assert_close(stats.neuron_taylor, product.abs().mean(0))
    assert (product[1] == 0).all()  # the last token predicts nothing
