"""Warming up: every distinct problem runs once, and what it says is what then happens."""

import pytest
import torch

from pyprune import BackendError, InputError, accelerate
from pyprune.ffn import scratch
from pyprune.ffn.backends import cublas
from pyprune.ffn.warming import warmup


def test_one_run_for_each_distinct_problem(tiny):
    model = accelerate(tiny("llama"))
    warmed = warmup(model, tokens=(1, 300, 1))
    assert [(w.layer, w.problem.tokens) for w in warmed] == [("model.layers.0.mlp", 1), ("model.layers.0.mlp", 300)]
    assert warmed[1].backend == "torch"
    assert all(w.seconds > 0 and w.problem.hidden_size == 32 and w.problem.kept == 96 for w in warmed)


def test_layers_that_differ_run_each(tiny, random_mask):
    model = tiny("llama")
    model = accelerate(model, mask=random_mask(model, (60, 33, 60)))
    assert [w.problem.kept for w in warmup(model, (2,))] == [60, 33]
    model = tiny("llama")
    model = accelerate(model, "gather", mask=random_mask(model, (60, 33, 60)), batch_invariant=True)
    warmed = warmup(model, (2,))
    assert [(w.problem.kept, w.problem.gather, w.problem.batch_invariant) for w in warmed] == [
        (60, True, True),
        (33, True, True),
        (60, True, True),
    ]


@pytest.mark.parametrize("family_name", ["gpt2", "opt"])
def test_modules_of_every_place(family_name, tiny):
    model = accelerate(tiny(family_name), weights="int8")
    assert len(warmup(model, (1,))) == 1
    module = next(m for m in model.modules() if type(m).__name__ == "PrunedMLP")
    assert [w.layer for w in warmup(module, (1,))] == [""]


def test_rows_of_a_gather_are_there_afterwards(tiny, random_mask, monkeypatch):
    monkeypatch.setattr(cublas, "why_not", lambda problem: None)
    model = tiny("llama")
    model = accelerate(model, "gather", "cublas", random_mask(model, (60, 33, 60)))
    assert {w.backend for w in warmup(model)} == {"cublas"}
    assert scratch.kept_bytes(torch.device("cpu")) == (60 + 33 + 60) * 3 * 32 * 4
    monkeypatch.setattr(scratch, "_capturing", lambda device: True)
    with torch.no_grad():
        model(torch.arange(8)[None])  # without the warning


def test_refusals(tiny):
    with pytest.raises(InputError, match=r"model must have a PrunedMLP; call pyprune\.accelerate first; got 'Llama"):
        warmup(tiny("llama"))
    model = accelerate(tiny("llama"))
    for tokens in ((), (0, 1)):
        with pytest.raises(InputError, match="tokens must be one or more numbers of at least 1"):
            warmup(model, tokens)
    with pytest.raises(BackendError, match="cublas: needs tensors on a CUDA device"):
        warmup(accelerate(tiny("llama"), backend="cublas"))
