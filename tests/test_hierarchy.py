"""The representation hierarchy of tiny models: nothing where nothing differs, and by hand where one thing does."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyprune import InputError, prune, prune_blocks
from pyprune.evaluation import perplexity
from pyprune.evaluation.analysis import representation_hierarchy
from pyprune.evaluation.analysis.deviation import PROBABILITY, probability_deviation, vector_deviation
from pyprune.evaluation.analysis.trace import Tracer
from pyprune.ffn.accelerate import accelerate
from pyprune.model import families

Tiny = Callable[..., Any]


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(5))


def pruned_of(model: Any, keep: float = 0.5) -> Any:
    pruned = copy.deepcopy(model)
    prune(pruned, keep=keep, method="random", allocation="uniform:multiple=1", repair=None)
    return pruned


def test_identical_models_are_exactly_alike(tiny: Tiny, family: str, windows: Tensor) -> None:
    model = tiny(family)
    found = representation_hierarchy(model, copy.deepcopy(model), windows)
    spaces = [found.embedding, found.logits, found.centred]
    spaces += [entry[name] for entry in found.layers for name in entry if name not in ("layer", "kept")]
    for space in spaces:
        assert space["cosine"]["mean"] == space["angle"]["mean"] == space["orthogonal"]["p90"] == 0.0
        assert space["norm"]["mean"] == 1.0 and space["cosine"]["interval"] == [0.0, 0.0]
    changed = {name for name in PROBABILITY if found.probabilities[name]["mean"] != 0.0}
    assert changed == {"top1", "top5", "entropy", "entropy_pruned"}
    assert found.amplification == {"exact": None, "estimate": None}


def test_permuted_neurons_change_next_to_nothing(tiny: Tiny, windows: Tensor) -> None:
    model = tiny("llama")
    other = copy.deepcopy(model)
    for ffn in families.find_ffns(other):
        order = torch.randperm(ffn.intermediate_size)
        for name in ("gate_proj", "up_proj"):
            module = ffn.holder.get_submodule(name)
            module.weight.data = module.weight.data[order]
        ffn.down.weight.data = ffn.down.weight.data[:, order]
    found = representation_hierarchy(model, other, windows)
    assert found.probabilities["kl"]["mean"] < 1e-10 and found.layers[-1]["hidden"]["cosine"]["mean"] < 1e-10


def test_against_the_models_themselves(tiny: Tiny, windows: Tensor) -> None:
    dense = tiny("llama")
    pruned = pruned_of(dense)
    found = representation_hierarchy(dense, pruned, windows)
    with torch.no_grad():
        a, b = (m(input_ids=windows, output_hidden_states=True) for m in (dense, pruned))
    for layer in range(2):  # the last one of these has been through the final norm
        hidden = vector_deviation(*(o.hidden_states[layer + 1].flatten(0, 1) for o in (a, b)))
        assert found.layers[layer]["hidden"]["angle"]["mean"] == pytest.approx(float(hidden["angle"].mean()), rel=1e-4)
    embedding = vector_deviation(*(o.hidden_states[-1].flatten(0, 1) for o in (a, b)))
    assert found.embedding["cosine"]["mean"] == pytest.approx(float(embedding["cosine"].mean()), rel=1e-4)
    exact = probability_deviation(*(o.logits.flatten(0, 1) for o in (a, b)))
    for name in ("kl", "js", "total_variation", "top5", "cosine"):
        assert found.probabilities[name]["mean"] == pytest.approx(float(exact[name].mean()), rel=1e-4)
    for name, model in (("dense", dense), ("pruned", pruned)):
        assert found.perplexity[name] == pytest.approx(perplexity(model, windows).perplexity, rel=1e-5)
    gap = math.log(found.perplexity["pruned"] / found.perplexity["dense"])
    assert found.perplexity["loss"]["mean"] == pytest.approx(gap)
    low, high = found.probabilities["kl"]["interval"]
    assert low < found.probabilities["kl"]["mean"] < high
    of_one = next(entry for entry in found.temperatures if entry["temperature"] == 1.0)
    assert of_one["kl"] == pytest.approx(found.probabilities["kl"]["mean"])  # 64 positions: none left out
    assert json.loads(json.dumps(found.to_json()))["windows"] == 4


def test_the_first_layer_sees_the_same_and_later_ones_do_not(tiny: Tiny, family: str, windows: Tensor) -> None:
    dense = tiny(family)
    found = representation_hierarchy(dense, pruned_of(dense), windows)
    first, later = found.layers[0], found.layers[1:]
    # A norm stands behind the FFN of these, so what it puts out is not what it adds.
    assert ("rest" in first) == (family not in ("gemma2", "gemma3_text", "glm4", "olmo2", "openai-gpt"))
    if "rest" in first:
        assert first["rest"]["cosine"]["mean"] < 1e-6, "attention of layer 0 gets the same in both models"
    for space in ("hidden", "ffn"):
        assert first[space]["cosine"]["mean"] == pytest.approx(first[f"{space}_alone"]["cosine"]["mean"], rel=1e-4)
        assert first[space]["cosine"]["mean"] > 0
    assert any(e["hidden"]["cosine"]["mean"] != e["hidden_alone"]["cosine"]["mean"] for e in later)


def test_a_layer_alone_is_what_it_does_in_the_dense_model(tiny: Tiny, windows: Tensor) -> None:
    """With one layer cut, the others alone lose nothing, whatever reaches them."""
    dense = tiny("llama")
    pruned = copy.deepcopy(dense)
    ffn = families.find_ffns(pruned)[1]
    ffn.down.weight.data[:, ::2] = 0
    layers = representation_hierarchy(dense, pruned, windows).layers
    assert [entry["hidden_alone"]["cosine"]["mean"] > 0 for entry in layers] == [False, True, False]
    assert [entry["hidden"]["cosine"]["mean"] > 0 for entry in layers] == [False, True, True]


def test_scaled_logits(tiny: Tiny, windows: Tensor) -> None:
    """A head of 1.5 times the weights: no angle in any vector space, and the KL of a scaled logit vector."""
    dense = tiny("llama", tie_word_embeddings=False)
    pruned = copy.deepcopy(dense)
    pruned.lm_head.weight.data *= 1.5
    found = representation_hierarchy(dense, pruned, windows)
    assert found.logits["cosine"]["mean"] < 1e-12 and found.logits["norm"]["mean"] == pytest.approx(1.5)
    with torch.no_grad():
        z = dense(input_ids=windows).logits.double()
    p = z.softmax(-1)
    kl = (1.5 * z).logsumexp(-1) - z.logsumexp(-1) - 0.5 * (p * z).sum(-1)
    assert found.probabilities["kl"]["mean"] == pytest.approx(float(kl.mean()), rel=1e-4)


def test_dropped_layers_are_left_out(tiny: Tiny, windows: Tensor) -> None:
    dense = tiny("llama")
    pruned = copy.deepcopy(dense)
    prune_blocks(pruned, "layer", 0.67, text=windows)
    kept = pruned.config.pyprune["provenance"]["blocks"]["kept"]
    found = representation_hierarchy(dense, pruned, windows)
    assert [entry["kept"] for entry in found.layers] == [i in kept for i in range(3)]
    assert len(kept) == 2 and all(("hidden" in entry) == entry["kept"] for entry in found.layers)
    del pruned.config.pyprune
    with pytest.raises(InputError, match="pruned must have the 3 layers of dense, or say in its config which"):
        representation_hierarchy(dense, pruned, windows)


def test_temperature_and_breakdown(tiny: Tiny, windows: Tensor) -> None:
    dense = tiny("llama")
    dense.lm_head.weight.data *= 20
    found = representation_hierarchy(dense, pruned_of(dense), windows, temperatures=(0.5, 4.0))
    cold, hot = found.temperatures
    assert cold["kl"] > hot["kl"] > 0 and hot["kl_estimate"] == pytest.approx(hot["kl"], rel=0.5)
    assert cold["change"] <= cold["change_bound"]
    estimates = [entry["estimate"] for entry in found.breakdown]
    assert len(estimates) == 10 and estimates == sorted(estimates)


def test_one_window_has_no_interval(tiny: Tiny, windows: Tensor) -> None:
    dense = tiny("llama")
    found = representation_hierarchy(dense, pruned_of(dense), windows[:1])
    assert found.probabilities["kl"]["interval"] is None and found.windows == 1 and found.window == 16


def test_models_are_left_as_they_were(tiny: Tiny, windows: Tensor) -> None:
    dense = tiny("llama").train()
    pruned = pruned_of(dense)
    representation_hierarchy(dense, pruned, windows)
    assert dense.training and not any(m._forward_hooks or m._forward_pre_hooks for m in dense.modules())


def test_bad_input(tiny: Tiny, windows: Tensor) -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match="pruned must have the vocab_size of dense, 128; got 256"):
        representation_hierarchy(model, tiny("llama", vocab_size=256), windows)
    with pytest.raises(InputError, match=r"temperatures must be above 0 and finite; got .0"):
        representation_hierarchy(model, model, windows, temperatures=(1.0, 0))
    with pytest.raises(InputError, match="windows must have windows of at most 64 tokens"):
        representation_hierarchy(model, model, torch.ones(1, 65, dtype=torch.long))
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[3] = torch.nan
    with pytest.raises(InputError, match="pruned must be finite"):
        representation_hierarchy(model, broken, windows)


def test_a_trace_is_the_forward_pass(tiny: Tiny, family: str, windows: Tensor) -> None:
    model = tiny(family)
    tracer = Tracer(model, families.find_ffns(model))
    trace = tracer(windows[0])
    with torch.no_grad():
        logits = model(input_ids=windows[:1], use_cache=False).logits[0]
    assert torch.equal(trace.logits, logits) and len(trace.entering) == len(trace.leaving) == len(trace.ffn) == 3
    for number in range(3):
        out, ffn = tracer.layer(number, trace.entering[number], trace)
        assert torch.allclose(out, trace.leaving[number], atol=1e-6)
        assert torch.allclose(ffn, trace.ffn[number], atol=1e-6)


def test_accelerated_models_are_refused(tiny: Tiny, windows: Tensor) -> None:
    dense = tiny("llama")
    fast = accelerate(copy.deepcopy(dense))
    with pytest.raises(Exception, match="is accelerated already"):
        representation_hierarchy(dense, fast, windows)
