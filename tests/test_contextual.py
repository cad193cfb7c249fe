"""The contextual gather: neurons chosen on the device. Values, what is never read, gradients, compile, refusals."""

import dataclasses
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyprune import BackendError, InputError
from pyprune.base import reference
from pyprune.ffn import backends, dispatch, operators, ops
from pyprune.ffn.quantisation import dequantise, quantise

FORMS = list(itertools.product((False, True), (False, True)))  # gated, one list a token
F, D, K = 12, 8, 6


def operands(gated, lists, shape=(3,), dtype=torch.float64, extras=True, counts=(4, 0, 6, 1), seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    parts, tokens = 3 if gated else 2, torch.Size(shape).numel()
    number = tokens if lists else 1
    index = torch.stack([torch.randperm(F, generator=generator)[:K] for _ in range(max(number, 1))]).int()[:number]
    index, count = index if lists else index[0], torch.tensor(counts[:number], dtype=torch.int32)
    rest = (randn(F, parts - 1), randn(D), randn(*shape, D)) if extras else (None, None, None)
    return randn(*shape, D), randn(F, parts * D), index, count, rest


def expected(gated, x, record, index, count, rest, activation="silu", scales=None):
    """Each token by the plain gather over the entries that count."""
    record = record if scales is None else dequantise(record, scales, x.dtype)
    gather = operators.TWINS[gated, True]
    bias, down_bias, residual = rest
    out = torch.empty_like(x).view(-1, D)
    for m, token in enumerate(x.reshape(-1, D)):
        own, number = (index, count[0]) if index.ndim == 1 else (index[m], count[m])
        rows = own[: int(number.clamp(0, own.numel()))]
        rests = (bias, down_bias, None if residual is None else residual.reshape(-1, D)[m])
        out[m] = gather(token, record, rows, *rests, activation=activation)
    return out.view(x.shape)


@pytest.mark.parametrize(("gated", "lists"), FORMS)
@pytest.mark.parametrize("extras", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 2), (1, 3), (0,)])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_equals_the_gather_of_each_token(gated, lists, extras, shape, backend):
    x, record, index, count, rest = operands(gated, lists, shape, extras=extras)
    for activation in reference.ACTIVATIONS:
        got = ops.contextual_ffn(x, record, index, count, *rest, gated=gated, activation=activation, backend=backend)
        torch.testing.assert_close(got, expected(gated, x, record, index, count, rest, activation))
        assert got.shape == x.shape


@pytest.mark.parametrize("count", [-3, 0, 1, K, K + 5])
@pytest.mark.parametrize(("gated", "lists"), FORMS)
def test_every_count(count, gated, lists):
    x, record, index, _, rest = operands(gated, lists)
    number = torch.full((3 if lists else 1,), count, dtype=torch.int32)
    got = ops.contextual_ffn(x, record, index, number, *rest, gated=gated, activation="gelu")
    torch.testing.assert_close(got, expected(gated, x, record, index, number, rest, "gelu"))


@pytest.mark.parametrize(("gated", "lists"), FORMS)
@pytest.mark.parametrize("garbage", [-1, 2**31 - 1, 5])
def test_entries_behind_the_count_are_not_read(gated, lists, garbage):
    x, record, index, count, rest = operands(gated, lists)
    want = ops.contextual_ffn(x, record, index, count, *rest, gated=gated, activation="silu")
    behind = torch.arange(K) >= (count[:, None] if lists else count)
    index = torch.where(behind, garbage, index)
    used = torch.unique(index[~behind])
    unused = torch.ones(F, dtype=torch.bool)
    unused[used.long()] = False
    record[unused], rest[0][unused] = float("nan"), float("inf")
    got = ops.contextual_ffn(x, record, index, count, *rest, gated=gated, activation="silu")
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("gated", "lists"), FORMS)
def test_int8_and_other_dtypes_of_weights(gated, lists):
    x, record, index, count, rest = operands(gated, lists, dtype=torch.float32)
    integers, scales = quantise(record, 3 if gated else 2)
    got = ops.contextual_ffn(x, integers, index, count, *rest, scales=scales, gated=gated, activation="silu")
    want = expected(gated, x, integers, index, count, rest, scales=scales)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    got = ops.contextual_ffn(x, record.bfloat16(), index, count, *rest, gated=gated, activation="silu")
    torch.testing.assert_close(got, expected(gated, x, record.bfloat16().float(), index, count, rest))


def test_a_record_without_rows_and_lists_without_entries():
    x, record, index, count, rest = operands(True, False)
    want = rest[1] + rest[2]
    for rows, entries in ((0, K), (F, 0), (0, 0)):
        some = (record[:rows], index[:entries], count * 0, rest[0][:rows], *rest[1:])
        torch.testing.assert_close(ops.contextual_ffn(x, *some, gated=True, activation="silu"), want)


def low_level(gated, x, record, index, count, rest, scales=None, activation="gelu", backend="auto"):
    return torch.ops.pyprune.contextual_ffn.default(x, record, index, count, scales, *rest, gated, activation, backend)


@pytest.mark.parametrize(("gated", "lists"), FORMS)
@pytest.mark.parametrize("extras", [True, False])
def test_opcheck_and_gradients(gated, lists, extras):
    x, record, index, count, rest = operands(gated, lists, (2,), extras=extras)
    leaves = [t.requires_grad_() for t in (x, record, *rest) if t is not None]
    arguments = (x, record, index, count, None, *rest, gated, "gelu", "auto")
    torch.library.opcheck(torch.ops.pyprune.contextual_ffn.default, arguments)

    def run(x, record, *rest):
        return low_level(gated, x, record, index, count, rest or (None, None, None))

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize(("gated", "lists"), FORMS)
def test_fake_tensors(gated, lists):
    with FakeTensorMode():
        x, record = torch.empty(3, D, dtype=torch.bfloat16), torch.empty(F, (3 if gated else 2) * D)
        index = torch.empty(*((3,) if lists else ()), K, dtype=torch.int32)
        count = torch.empty(3 if lists else 1, dtype=torch.int32)
        out = low_level(gated, x, record, index, count, (None, None, None))
    assert (out.shape, out.dtype, out.is_contiguous()) == ((3, D), torch.bfloat16, True)


@pytest.mark.parametrize("lists", [False, True])
def test_compiles_without_a_break_and_chooses_within(lists):
    x, record, _, _, rest = operands(True, lists, dtype=torch.float32)

    def ffn(x):
        """The neurons with the largest first weights for this input, as many as have positive ones."""
        scores = x @ record[:, :D].t() if lists else (x @ record[:, :D].t()).sum(0)
        index = scores.topk(K, -1).indices.int()
        count = (scores > 1).sum(-1, keepdim=not lists).clamp(max=K).int()
        return ops.contextual_ffn(x, record, index, count, *rest, gated=True, activation="silu")

    compiled = torch.compile(ffn, backend="aot_eager", fullgraph=True)
    for scale in (1, 0, -1, 3):
        torch.testing.assert_close(compiled(x * scale), ffn(x * scale))


@pytest.mark.parametrize(
    ("lists", "changes", "message"),
    [
        (False, {"index": torch.zeros(K, dtype=torch.int64)}, r"index must have dtype torch\.int32; got torch\.int64"),
        (False, {"count": torch.zeros(1)}, r"count must have dtype torch\.int32; got torch\.float32"),
        (False, {"count": 3}, "count must be a tensor; got 'int'"),
        (False, {"index": torch.zeros(2, 2, 2, dtype=torch.int32)}, r"index must have shape \[K\], or \[M, K\] with"),
        (False, {"count": torch.zeros(3, dtype=torch.int32)}, r"count must have shape \(1,\); got \(3,\)"),
        (True, {"count": torch.zeros(1, dtype=torch.int32)}, r"count must have shape \(3,\); got \(1,\)"),
        (True, {"index": torch.zeros(2, K, dtype=torch.int32)}, r"index must have one list for each of the 3 tokens"),
        (True, {"x": torch.zeros(5, D), "residual": None}, "x must have at most 4 tokens with one list a token; got 5"),
        (False, {"index": torch.zeros(K, dtype=torch.int32, device="meta")}, "index must be on the device of x, cpu"),
        (False, {"count": torch.zeros(1, dtype=torch.int32, device="meta")}, "count must be on the device of x, cpu"),
        (False, {"record": torch.zeros(F, 9)}, r"record must have shape \(12, 24\); got \(12, 9\)"),
        (False, {"activation": "swish"}, "activation must be one of gelu"),
        (False, {"backend": "cudnn"}, "backend must be one of auto"),
    ],
)
def test_refusals(lists, changes, message):
    x, record, index, count, rest = operands(True, lists, dtype=torch.float32)
    named = dict(zip(("neuron_bias", "down_bias", "residual"), rest, strict=True))
    named |= {"x": x, "record": record, "index": index, "count": count, "activation": "silu", **changes}
    with pytest.raises(InputError, match=message):
        ops.contextual_ffn(**named, gated=True)


def test_who_runs_it():
    problem = backends.Problem("cpu", torch.float32, 3, D, F, K, True, True, "silu", contextual=True)
    assert dispatch.choose(problem).backend.NAME == "torch"
    with pytest.raises(BackendError, match="cpu: no kernel for a contextual gather"):
        dispatch.choose(problem, "cpu")
    with pytest.raises(BackendError, match="cublas: a contextual gather has no fixed rows to copy"):
        dispatch.choose(dataclasses.replace(problem, device="cuda"), "cublas")
