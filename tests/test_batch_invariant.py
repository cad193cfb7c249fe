"""With `batch_invariant=True` a row's result does not depend, to the bit, on the rows beside it: for every backend."""

import dataclasses
import functools
import itertools

import pytest
import torch

from pyprune import KeepIndex, PrunedMLP, accelerate
from pyprune.base import reference
from pyprune.base.record import Record
from pyprune.ffn import dispatch
from pyprune.ffn.backends import Problem
from pyprune.ffn.quantisation import quantise
from pyprune.model.families import find_ffns

FORMS = list(itertools.product((False, True), (False, True)))  # gated, gather
PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.int8),
    (torch.bfloat16, torch.int8),
]


def operands(gated, gather, dtype, weights, m=33, d=40, f=70):
    generator = torch.Generator().manual_seed(m + d)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    parts = 3 if gated else 2
    record, scales = randn(f, parts * d) * d**-0.5, None
    record, scales = quantise(record, parts) if weights == torch.int8 else (record.to(weights), None)
    index = torch.randperm(f, generator=generator)[: f // 2].sort().values.int() if gather else None
    biases = (randn(f, parts - 1).to(dtype), randn(d).to(dtype))
    return randn(m, d).to(dtype), Record(record, gated, "silu", scales, *biases, index)


def some_rows(m, generator):
    """Rows in any order, with repetitions, and one alone."""
    for size in (1, 2, 7, m, m + 5):
        yield torch.randint(0, m, (size,), generator=generator)


@pytest.mark.parametrize("name", dispatch.names()[1:])
@pytest.mark.parametrize(("gated", "gather"), FORMS)
@pytest.mark.parametrize(("dtype", "weights"), PAIRS, ids=str)
def test_rows_do_not_depend_on_their_neighbours(name, gated, gather, dtype, weights):
    backend = dispatch.backends()[name]
    sizes = {"m": 9, "d": 24, "f": 20} if name == "triton" else {}  # its interpreter is slow
    x, record = operands(gated, gather, dtype, weights, **sizes)
    if reason := backend.why_not(Problem.of(record, dtype, len(x), batch_invariant=True)):
        pytest.skip(reason)
    run = functools.partial(backend.run, record=record, batch_invariant=True)
    whole = run(x)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(whole, reference.ffn(x, record), rtol=tolerance, atol=tolerance)
    for rows in some_rows(len(x), torch.Generator().manual_seed(0)):
        assert torch.equal(run(x[rows]), whole[rows])
    odd = torch.cat([x[:, :3], x], 1)[:, 3:]  # rows that start elsewhere in memory
    assert torch.equal(run(odd), whole)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("gather", [False, True])
def test_the_choice_does_not_depend_on_the_number_of_tokens(device, gather, monkeypatch):
    problem = Problem(device, torch.float32, 1, 576, 1536, 768, True, gather, "silu", batch_invariant=True)
    for backend in dispatch.backends().values():
        monkeypatch.setattr(backend, "why_not", lambda _: None)
    dispatch.choose.cache_clear()
    try:
        chosen = {dispatch.choose(dataclasses.replace(problem, tokens=m)) for m in (0, 1, 9, 300, 5000)}
    finally:
        dispatch.choose.cache_clear()
    assert len(chosen) == 1


@pytest.mark.parametrize("mode", ["compact", "gather"])
@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_module(mode, weights, backend, tiny):
    keep = KeepIndex(range(0, 96, 3), 96)
    ffn = find_ffns(tiny("llama", mlp_bias=True))[0]
    pruned = PrunedMLP.from_dense(ffn, keep, mode, backend, weights, batch_invariant=True)
    plain = PrunedMLP.from_dense(ffn, keep, mode, backend, weights)
    assert repr(pruned) == f"{repr(plain)[:-1]}, batch-invariant)"
    x = torch.randn(300, 32)
    with torch.no_grad():
        whole = pruned(x)
        torch.testing.assert_close(whole, plain(x))
        for rows in some_rows(300, torch.Generator().manual_seed(0)):
            assert torch.equal(pruned(x[rows]), whole[rows])
            assert torch.equal(pruned(x[rows][None]), whole[rows][None])
            assert torch.equal(torch.compile(pruned, backend="aot_eager", fullgraph=True)(x[rows]), whole[rows])
        assert pruned(x[:0]).shape == (0, 32)
    assert torch.equal(pruned(x), whole), "with gradients"
    upstream = torch.randn(300, 32)
    got, want = [], []
    for module, found in ((pruned, got), (plain, want)):
        leaf = x.clone().requires_grad_()
        module(leaf).backward(upstream)
        found += [leaf.grad, *(p.grad for p in module.parameters() if p.grad is not None)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_every_layer_of_a_model(tiny, ids, same_logits):
    model = accelerate(tiny("llama"), batch_invariant=True)
    modules = [m for m in model.modules() if isinstance(m, PrunedMLP)]
    assert len(modules) == 3 and all(m.batch_invariant for m in modules)
    same_logits(model(ids).logits, tiny("llama")(ids).logits)
