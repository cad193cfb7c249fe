"""Streamed statistics against hooks on whole forward passes of the dense model."""

import pytest
import torch
from torch.testing import assert_close

from pyprune import InputError, UnsupportedModelError, prune
from pyprune.base.windows import stack_batches
from pyprune.model import surgery
from pyprune.model.families import find_ffns
from pyprune.pruning.calibration import LayerStream, adds_ffn

STREAMED = ("gpt2", "gpt_neo", "opt", "falcon", "gpt_neox", "llama", "gemma2", "gemma3_text", "phi3", "lfm2", "biogpt")


@torch.no_grad()
def hooked_activations(model, ffns, ids):
    """What enters each down projection in full forward passes, `[tokens, F]` a layer, in float64."""
    seen = [[] for _ in ffns]
    handles = [
        f.down.register_forward_pre_hook(lambda m, args, i=i: seen[i].append(args[0].reshape(-1, args[0].shape[-1])))
        for i, f in enumerate(ffns)
    ]
    for row in ids:
        model(row[None])
    for handle in handles:
        handle.remove()
    return [torch.cat(parts).double() for parts in seen]


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("window", [7, 40])  # 40 is longer than every sliding or local window of the tiny models
def test_stream_equals_full_forward_passes(name, window, tiny):
    model = tiny(name)
    ids = torch.randint(3, 128, (3, window), generator=torch.Generator().manual_seed(2))
    ffns = find_ffns(model)
    stream = LayerStream(model, ffns, ids)
    for ffn, a in zip(ffns, hooked_activations(model, ffns, ids), strict=True):
        stats = stream.statistics(ffn, gram=ffn.layer != 1)
        assert stats.tokens == len(a) == ids.numel()
        assert_close(stats.mean, a.mean(0), rtol=1e-4, atol=1e-6)
        assert_close(stats.abs_mean, a.abs().mean(0), rtol=1e-5, atol=1e-6)
        assert_close(stats.square_sum, a.square().sum(0), rtol=1e-5, atol=1e-6)
        assert_close(stats.variance, a.var(0, correction=0), rtol=1e-4, atol=1e-6)
        if ffn.layer == 1:
            assert stats.gram is None
        else:
            assert_close(stats.gram, a.t() @ a, rtol=1e-4, atol=1e-4)
            assert stats.gram.dtype == torch.float64
        stream.advance()


def test_statistics_do_not_depend_on_whether_a_gram_is_asked_for(tiny, ids):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-3)
    ffns = find_ffns(model)
    stream = LayerStream(model, ffns, ids)
    with_gram, without = (stream.statistics(ffns[0], gram=g) for g in (True, False))
    assert torch.equal(with_gram.variance, without.variance)


def test_stream_leaves_no_hooks_and_no_changes(tiny, ids):
    model = tiny("gpt2")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stream = LayerStream(model, find_ffns(model), ids)
    stream.statistics(find_ffns(model)[0], gram=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_later_layers_see_what_pruned_earlier_ones_give(tiny, ids, masked, random_mask):
    model = tiny("llama")
    mask = random_mask(model, (10, 96, 96))
    ffns = find_ffns(model)
    want = hooked_activations(reference := masked(model, mask), find_ffns(reference), ids)[1]
    stream = LayerStream(model, ffns, ids)
    surgery.cut(ffns[0], mask.layers[0])
    stream.advance()
    assert_close(stream.statistics(ffns[1], gram=False).mean, want.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_layer_and_neuron(bad, tiny, ids):
    model = tiny("phi")
    ffns = find_ffns(model)
    stream = LayerStream(model, ffns, ids)
    with torch.no_grad():
        ffns[0].weights().up_bias[5] = bad
    with pytest.raises(InputError, match=r"activations of layer 0 must be finite; 1 of 96 .*; got \[5\]"):
        stream.statistics(ffns[0], gram=False)


def test_layers_that_do_not_hand_over_one_hidden_state_are_refused(tiny, ids):
    model = tiny("llama")
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]), prepend=True)
    with pytest.raises(UnsupportedModelError, match="the input of decoder layer 1 is not the output of layer 0"):
        LayerStream(model, find_ffns(model), ids)


def test_layers_that_get_more_from_the_tokens_are_refused(tiny, ids):
    model = tiny("llama")
    decoder = model.model

    def tag(module, args, kwargs):
        return args, {**kwargs, "tokens": decoder.seen}

    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: setattr(decoder, "seen", kwargs["input_ids"]), with_kwargs=True
    )
    decoder.layers[1].register_forward_pre_hook(tag, with_kwargs=True, prepend=True)
    with pytest.raises(UnsupportedModelError, match="decoder layer 1 gets more from the tokens than its hidden state"):
        LayerStream(model, find_ffns(model), ids)
    LayerStream(model, find_ffns(model), ids[:1].expand(3, -1))  # one window only, so nothing can differ


def test_model_that_never_calls_its_layers_is_refused(tiny, ids):
    model = tiny("llama")
    model.forward = lambda **kwargs: None
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM never called its decoder layers"):
        LayerStream(model, find_ffns(model), ids)


def test_stack_batches():
    rows = torch.arange(12).view(3, 4)
    for batches in (rows, list(rows), [rows[:2], rows[2]], (r for r in rows), rows.to(torch.int16)):
        assert torch.equal(stack_batches(batches, 12), rows)
    assert stack_batches(rows, None).dtype == torch.int64


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches must hold at least one window; got 0"),
        (torch.zeros(0, 4, dtype=torch.int64), "batches must hold at least one window"),
        (torch.zeros(3, 0, dtype=torch.int64), "batches must hold at least one window"),
        ([torch.zeros(4), torch.zeros(0)], "batches must hold at least one window"),
        ([torch.zeros(4).long(), torch.zeros(5).long()], r"must have windows of one length; got \[4, 5\]"),
        (torch.zeros(2, 4), "must hold token ids; got torch.float32"),
        (torch.zeros(2, 4, dtype=torch.bool), "must hold token ids; got torch.bool"),
        (torch.tensor([[0, 10]]), r"must lie in \[0, 10\); got \(0, 10\)"),
        (torch.tensor([[-1, 2]]), r"must lie in \[0, 10\); got \(-1, 2\)"),
        ([[1, 2, 3]], r"must hold tensors of shape \[W\] or \[N, W\]; got \['list'\]"),
        (torch.tensor(3), r"must hold tensors of shape"),
    ],
)
def test_bad_batches_are_refused(batches, message):
    with pytest.raises(InputError, match=message):
        stack_batches(batches, 10)


def test_products_in_bfloat16_between_float32_states(tiny, ids):
    """Half the digits in the layers' products, none lost in hidden states, moments and the fit."""
    model = tiny("llama")
    ffns = find_ffns(model)
    exact, lower = LayerStream(model, ffns, ids), LayerStream(model, ffns, ids, products=torch.bfloat16)
    for stream in (exact, lower):
        stream.advance()
    assert lower._hidden.dtype == torch.float32
    difference = float((lower._hidden - exact._hidden).norm() / exact._hidden.norm())
    assert 1e-6 < difference < 2e-2
    found = lower.statistics(ffns[1], gram=True)
    assert found.gram is not None and found.gram.dtype == torch.float64
    rows: list[torch.Tensor] = []
    lower.see_all([ffns[1]], lambda _, a, *__: rows.append(a.double()))
    want = torch.cat(rows).t() @ torch.cat(rows)
    assert float((found.gram - want).norm() / want.norm()) < 1e-6


def test_unknown_precision_is_refused_before_anything_changes(tiny):
    model = tiny("llama")
    with pytest.raises(InputError, match="precision must be one of auto, float32, bfloat16"):
        prune(model, 0.5, "random", repair=None, precision="half")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt_neox", "falcon", "phi"])
def test_a_branch_that_cancels_the_residual_does_not_hide_a_sum(name, dtype, tiny):
    """In half precision some values round as a much larger sum did."""
    model = tiny(name).to(dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(50)
        for projection, weight in model.named_parameters():
            if projection.endswith("dense.weight"):
                weight.mul_(20)
    assert adds_ffn(model, find_ffns(model))


@pytest.mark.parametrize(("name", "adds"), [("llama", True), ("gemma2", False), ("olmo2", False)])
def test_one_loud_channel_does_not_hide_a_norm_behind_the_ffn(name, adds, tiny):
    model = tiny(name)
    for loud in (0.0, 1000.0):
        with torch.no_grad():
            model.get_input_embeddings().weight[:, 3] += loud
        assert adds_ffn(model, find_ffns(model)) == adds
    assert adds_ffn(model.bfloat16(), find_ffns(model)) == adds


def test_pruning_is_the_same_inside_an_autocast(tiny, ids):
    """Statistics, fits and the layers' own products keep their precision."""
    found = []
    for enabled in (False, True):
        model = tiny("llama")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            prune(model, 0.5, "obs", allocation="uniform:multiple=8", text=ids)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
