"""`ffn` over a Record: values against float64, opcheck, gradients, fakes, and every refusal."""

import dataclasses
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyprune import BackendError, InputError
from pyprune.base import reference
from pyprune.base.record import Record, described
from pyprune.ffn import operators
from pyprune.ffn.mlp import pack
from pyprune.ffn.ops import ffn
from pyprune.ffn.quantisation import quantise, widened
from pyprune.model.patterns import FFNWeights

FORMS = list(itertools.product((False, True), (False, True)))  # gated, gather
# M, D, F: one of everything, nothing at all, primes.
SHAPES = [((5,), 8, 12), ((0,), 8, 12), ((3,), 1, 7), ((3,), 7, 1), ((1,), 1, 1), ((2, 0, 3), 5, 4), ((2, 3), 13, 31)]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MIXED = [(x, w) for x, w in itertools.product(FLOATS, (*FLOATS, torch.int8)) if x != w]
# Of `ffn_by_dispatch`, which `ops.ffn` calls, and of `ffn`.
BY_DISPATCH, FFN = torch.ops.pyprune.ffn_by_dispatch.default, torch.ops.pyprune.ffn.default


def formula(x, record):
    """The FFN written out, neuron by neuron."""
    act = reference.ACTIVATIONS[record.activation]
    out = torch.zeros_like(x)
    for j in range(record.neurons) if record.index is None else record.index.tolist():
        *inputs, down = record.rows[j].split(record.hidden_size)
        biases = [0] * len(inputs) if record.neuron_bias is None else record.neuron_bias[j]
        first, *up = (x @ part + bias for part, bias in zip(inputs, biases, strict=True))
        a = act(first) * up[0] if up else act(first)
        out = out + a[..., None] * down
    return out if record.down_bias is None else out + record.down_bias


def operands(gated, gather, shape=(5,), d=8, f=12, dtype=torch.float32, weights=None, biases=True, activation="silu"):
    """x, and a record whose rows are in `weights`, or in `dtype` as all else is."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    parts = 3 if gated else 2
    index = torch.randperm(f, generator=generator)[: (f + 1) // 2].sort().values.int() if gather else None
    x, rows, scales = randn(*shape, d), randn(f, parts * d) / (1 if weights is None else 8), None
    if weights == torch.int8:
        rows, scales = quantise(rows, parts)
    bias, down_bias = (randn(f, parts - 1).to(dtype), randn(d).to(dtype)) if biases else (None, None)
    return x.to(dtype), Record(rows.to(weights or dtype), gated, activation, scales, bias, down_bias, index)


def run(op, x, record, backend="torch", native_tokens=0, batch_invariant=False):
    return op(*operators.arguments(x, record, backend, native_tokens, batch_invariant))


@pytest.mark.parametrize(("gated", "gather"), FORMS)
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize(("shape", "d", "f"), SHAPES)
def test_equals_the_formula(gated, gather, biases, shape, d, f):
    x, record = operands(gated, gather, shape, d, f, torch.float64, biases=biases)
    for activation in reference.ACTIVATIONS:
        chosen = dataclasses.replace(record, activation=activation)
        want = formula(x, chosen)
        for backend in ("auto", "torch"):
            torch.testing.assert_close(ffn(x, chosen, backend=backend), want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("gated", "gather"), FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_error_is_at_most_twice_that_of_torch(gated, gather, dtype):
    x, record = operands(gated, gather, (33,), 64, 160, dtype, weights=dtype)
    exact = ffn(x.double(), widened(record))
    kept = slice(None) if record.index is None else record.index.long()
    *inputs, down = record.rows[kept].split(64, dim=1)
    bias = record.neuron_bias[kept]
    hidden = torch.nn.functional.silu(torch.nn.functional.linear(x, inputs[0], bias[:, 0]))
    if gated:
        hidden = hidden * torch.nn.functional.linear(x, inputs[1], bias[:, 1])
    torch_own = torch.nn.functional.linear(hidden, down.t(), record.down_bias)
    error, allowed = ((t.double() - exact).norm() for t in (ffn(x, record), torch_own))
    assert 0 < error <= 2 * allowed


@pytest.mark.parametrize(("gated", "gather"), FORMS)
@pytest.mark.parametrize(("dtype", "weights"), [*MIXED, (torch.float64, torch.int8)])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_mixed_dtypes(gated, gather, dtype, weights, biases, backend):
    x, record = operands(gated, gather, (33,), 64, 160, dtype, weights, biases)
    exact = ffn(x.double(), widened(record))
    got = ffn(x, record, backend=backend)
    assert got.dtype == dtype
    # What torch makes of the same weights in the dtype of x: twice that error is allowed, as between equal dtypes.
    torch_own = ffn(x, widened(record, dtype), backend="torch")
    error, allowed = ((t.double() - exact).norm() for t in (got, torch_own))
    assert error <= 2 * allowed + 1e-12 * exact.norm()


@pytest.mark.parametrize(("gated", "gather"), FORMS)
def test_int8_beside_float16_does_not_overflow(gated, gather):
    """Sums of x times integers of up to 127 pass what float16 holds, where x times the weights does not."""
    x, record = operands(gated, gather, (4,), 64, 12, torch.float16, torch.int8, activation="relu")
    x = x * 100
    exact = ffn(x.double(), widened(record))
    assert (x.double() @ record.rows[:, :64].double().t()).abs().max() > 65504
    assert exact.abs().max() < 65504
    got = ffn(x, record, backend="torch")
    torch.testing.assert_close(got.double(), exact, rtol=2e-3, atol=2e-3 * exact.abs().max().item())


@pytest.mark.parametrize(("gated", "gather"), FORMS)
@pytest.mark.parametrize(
    ("dtype", "weights"), [(torch.float64, None), (torch.float32, None), (torch.bfloat16, torch.int8)]
)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (0,)])
def test_both_operators_give_the_same(gated, gather, dtype, weights, shape):
    x, record = operands(gated, gather, shape, dtype=dtype, weights=weights, activation="gelu")
    want = ffn(x, record, backend="torch")
    assert want.shape == x.shape
    torch.testing.assert_close(want, reference.ffn(x, record))
    invariant = ffn(x, record, backend="torch", batch_invariant=True)
    torch.testing.assert_close(invariant, want)
    for op in (FFN, BY_DISPATCH):
        assert torch.equal(run(op, x, record), want)
        assert torch.equal(run(op, x, record, batch_invariant=True), invariant)
    if dtype == torch.float64:
        return  # no native kernel, and dispatch.native_tokens says so
    got = run(FFN, x, record, "auto", 64)
    torch.testing.assert_close(got, want, rtol=3e-2 if dtype == torch.bfloat16 else 1e-5, atol=3e-2)


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_an_operator_refuses_a_forced_backend_as_dispatch_does(backend):
    x, record = operands(True, False, dtype=torch.float64)
    with pytest.raises(BackendError, match=rf"{backend}: no kernel for torch\.float64"):
        run(BY_DISPATCH, x, record, backend)


@pytest.mark.parametrize(("gated", "gather"), FORMS)
def test_transposed_and_sliced_operands(gated, gather):
    x, record = operands(gated, gather, (6,))
    want = ffn(x, record)
    rows = torch.cat([record.rows, record.rows], 1)[:, : record.rows.shape[1]]
    torch.testing.assert_close(ffn(x.t().contiguous().t(), dataclasses.replace(record, rows=rows)), want)
    cube = torch.stack([x, x, x], 1)[:, ::2].transpose(0, 1)  # [2, 6, 8], not contiguous
    got = ffn(cube, record)
    torch.testing.assert_close(got, want.expand(2, -1, -1))
    assert got.shape == cube.shape
    torch.testing.assert_close(ffn(x[0], record), want[0])


@pytest.mark.parametrize(("gated", "gather"), FORMS)
@pytest.mark.parametrize(
    ("shape", "dtype", "weights", "biases", "batch_invariant"),
    [
        ((5,), torch.float32, None, True, False),
        ((2, 3), torch.bfloat16, None, False, True),
        ((3,), torch.float32, torch.int8, True, True),
        ((0,), torch.float32, None, True, False),
    ],
)
def test_opcheck(gated, gather, shape, dtype, weights, biases, batch_invariant):
    x, record = operands(gated, gather, shape, dtype=dtype, weights=weights, biases=biases)
    torch.library.opcheck(FFN, operators.arguments(x, record, "torch", 64, batch_invariant))
    for tensor in (x, record.rows, record.neuron_bias, record.down_bias):
        if tensor is not None and tensor.is_floating_point():
            tensor.requires_grad_(shape != (0,))
    torch.library.opcheck(BY_DISPATCH, operators.arguments(x, record, "torch", 64, batch_invariant))


def leaves(x, record):
    """What can want a gradient."""
    found = (x, record.rows, record.neuron_bias, record.down_bias)
    return [t.requires_grad_() for t in found if t is not None and t.is_floating_point()]


@pytest.mark.parametrize(("gated", "gather"), FORMS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("biases", [True, False])
def test_gradcheck(gated, gather, backend, biases):
    x, record = operands(gated, gather, (2,), 3, 4, torch.float64, biases=biases, activation="gelu_tanh")

    def of(x, rows, neuron_bias=None, down_bias=None):
        parts = {"rows": rows, "neuron_bias": neuron_bias, "down_bias": down_bias}
        return ffn(x, dataclasses.replace(record, **parts), backend=backend)

    assert torch.autograd.gradcheck(of, leaves(x, record))
    assert torch.autograd.gradgradcheck(of, leaves(x, record))


@pytest.mark.parametrize(("gated", "gather"), FORMS)
@pytest.mark.parametrize("weights", [None, torch.int8, torch.bfloat16])
def test_gradients_equal_those_of_float64_and_plain_torch(gated, gather, weights):
    x, record = operands(gated, gather, weights=weights)
    wide, exact = x.double(), widened(record)
    upstream, wanted, in_float64 = torch.randn(5, 8), leaves(x, record), leaves(wide, exact)
    twin = torch.autograd.grad(reference.ffn(x, record), wanted, upstream)
    got = torch.autograd.grad(ffn(x, record, backend="torch"), wanted, upstream)
    for found, plain in zip(got, twin, strict=True):
        assert found.dtype == plain.dtype
        torch.testing.assert_close(found, plain)
    if weights is None:
        right = torch.autograd.grad(ffn(wide, exact), in_float64, upstream.double())
        for found, exactly in zip(got, right, strict=True):
            torch.testing.assert_close(found.double(), exactly, rtol=1e-4, atol=1e-4)
    if gather and weights is None:
        removed = torch.ones(12, dtype=torch.bool)
        removed[record.index.long()] = False
        assert (got[1][removed] == 0).all()
        assert (got[1][~removed] != 0).any(1).all()


@pytest.mark.parametrize(("gated", "gather"), FORMS)
def test_only_wanted_gradients_are_made(gated, gather):
    x, record = operands(gated, gather)
    record.down_bias.requires_grad_()
    ffn(x, record, backend="torch").sum().backward()
    assert x.grad is None and record.rows.grad is None
    assert record.down_bias.grad.tolist() == [5.0] * 8


@pytest.mark.parametrize(("gated", "gather"), FORMS)
def test_fake_tensors(gated, gather):
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, dtype=torch.bfloat16)
        rows = torch.empty(12, 24 if gated else 16, dtype=torch.bfloat16)
        index = torch.empty(4, dtype=torch.int32) if gather else None
        out = run(FFN, x, Record.unchecked(rows, gated, "silu", index=index), "auto")
    assert (out.shape, out.dtype, out.is_contiguous()) == ((2, 3, 8), torch.bfloat16, True)


@pytest.mark.parametrize("batch_invariant", [False, True])
@torch.no_grad()
def test_compiles_in_one_graph(batch_invariant):
    x, record = operands(True, True)

    def of(x):
        return ffn(x, record, batch_invariant=batch_invariant) + 1

    compiled = torch.compile(of, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), of(x))


@pytest.mark.parametrize(("gated", "gather"), FORMS)
def test_what_a_record_says_of_itself(gated, gather):
    x, record = operands(gated, gather)
    assert (record.hidden_size, record.neurons, record.kept) == (8, 12, 6 if gather else 12)
    of = {"gated": gated, "activation": "silu", "dtype": torch.float32, "neuron_bias": True, "down_bias": True}
    assert record.nbytes == described(8, 12, **of, kept=6 if gather else None).nbytes
    narrow = record.narrow(5)
    assert narrow.kept == 5 and narrow.rows.data_ptr() == record.rows.data_ptr()
    few = (
        {"index": record.index[:5]} if gather else {n: getattr(record, n)[:5].clone() for n in ("rows", "neuron_bias")}
    )
    assert torch.equal(reference.ffn(x, narrow), reference.ffn(x, dataclasses.replace(record, **few)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.gated = not gated


def some(gated, **changes):
    """Parts of a record, some of them wrong."""
    _, record = operands(gated, True, weights=changes.pop("weights", None))
    return {**vars(record), **changes}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("argument", "shape", "rule"),
    [
        ("rows", (12, 17), r"have shape \(12, \d+\); got \(12, 17\)"),
        ("rows", (12,), r"have two dimensions; got \(12,\)"),
        ("rows", (), r"have two dimensions; got \(\)"),
        ("neuron_bias", (12,), r"have shape \(12, \d\); got \(12,\)"),
        ("neuron_bias", (12, 3), r"have shape \(12, \d\); got \(12, 3\)"),
        ("down_bias", (9,), r"have shape \(8,\); got \(9,\)"),
        ("down_bias", (1, 8), r"have shape \(8,\); got \(1, 8\)"),
    ],
)
def test_wrong_shape_is_refused(gated, argument, shape, rule):
    with pytest.raises(InputError, match=f"{argument} must {rule}"):
        Record(**some(gated, **{argument: torch.zeros(shape)}))


@pytest.mark.parametrize("gated", [False, True])
def test_wrong_parts_are_refused(gated):
    parts = 3 if gated else 2
    scales = some(gated, weights=torch.int8)["scales"]
    for wrong, rule in (
        (None, "be given with int8 rows; got None"),
        (scales[:11], rf"have shape \(12, {parts}\); got \(11, {parts}\)"),
        (scales[:, :1], rf"have shape \(12, {parts}\); got \(12, 1\)"),
        (scales.double(), r"have dtype torch\.float32; got torch\.float64"),
        (scales.to("meta"), "be on the device of rows, cpu; got 'meta'"),
    ):
        with pytest.raises(InputError, match=f"scales must {rule}"):
            Record(**some(gated, weights=torch.int8, scales=wrong))
    with pytest.raises(InputError, match=r"scales must be None with rows of torch\.float32; got \(12, "):
        Record(**some(gated, scales=scales))
    for dtype in (torch.int16, torch.bool):
        with pytest.raises(InputError, match=rf"rows must be floating point, int8 or uint8 \(int4\); got {dtype}"):
            Record(**some(gated, rows=some(gated)["rows"].to(dtype)))
    for wrong, rule in (
        (torch.tensor([0, 12]).int(), r"lie in \[0, 12\); got \(0, 12\)"),
        (torch.tensor([3, -1]).int(), r"lie in \[0, 12\); got \(-1, 3\)"),
        (torch.tensor([0, 3]), r"have dtype torch\.int32; got torch\.int64"),
        (torch.zeros(2, 1).int(), r"have shape \(2,\); got \(2, 1\)"),
        (torch.zeros(2, device="meta").int(), "be on the device of rows, cpu; got 'meta'"),
    ):
        with pytest.raises(InputError, match=f"index must {rule}"):
            Record(**some(gated, index=wrong))
    for name in ("neuron_bias", "down_bias"):
        with pytest.raises(InputError, match=f"{name} must be on the device of rows, cpu; got 'meta'"):
            Record(**some(gated, **{name: some(gated)[name].to("meta")}))
    with pytest.raises(InputError, match=r"activation must be one of gelu, .*got 'gelu_tan' \(nearest: gelu_tanh"):
        Record(**some(gated, activation="gelu_tan"))


@pytest.mark.parametrize(("gated", "gather"), FORMS)
def test_x_that_does_not_fit_is_refused(gated, gather):
    x, record = operands(gated, gather)
    bare = dataclasses.replace(record, neuron_bias=None, down_bias=None)
    for wrong, given, rule in (
        (torch.tensor(1.0), record, r"x must have at least one dimension; got \(\)"),
        (torch.zeros(5, 7), record, r"x must have shape \[\.\.\., 8\]; got \(5, 7\)"),
        (torch.zeros(5, 8, dtype=torch.int64), record, r"x must be floating point; got torch\.int64"),
        (x.to("meta"), record, "x must be on the device of the record, cpu; got 'meta'"),
        (x.double(), bare, r"dtype of x must be torch\.float32, as the rows are, or mix .*; got torch\.float64"),
        (x.half(), record, r"dtype of x must be torch\.float32, as neuron_bias is; got torch\.float16"),
    ):
        with pytest.raises(InputError, match=rule):
            ffn(wrong, given)
    odd = dataclasses.replace(bare, down_bias=torch.zeros(8).double())
    with pytest.raises(InputError, match=r"dtype of x must be torch\.float64, as down_bias is; got torch\.float32"):
        ffn(x, odd)
    with pytest.raises(InputError, match=r"backend must be one of auto, torch.*got 'tritn' \(nearest: triton"):
        ffn(x, record, backend="tritn")
    with pytest.raises(BackendError, match=r"triton: no kernel for torch\.float64"):
        ffn(x.double(), widened(record), backend="triton")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bad", [[0, 12], [-1, 3]])
def test_an_operator_never_reads_outside_the_record(gated, bad):
    x, record = operands(gated, True)
    beyond = Record.unchecked(**{**vars(record), "index": torch.tensor(bad, dtype=torch.int32)})
    with pytest.raises((IndexError, RuntimeError), match=r"out of range|out of bounds"):
        run(BY_DISPATCH, x, beyond)


@pytest.mark.parametrize("gated", [False, True])
def test_packed_record_computes_what_its_parts_do(gated):
    generator = torch.Generator().manual_seed(0)
    up, down, gate = (torch.randn(12, 8, generator=generator) for _ in range(3))
    rows, bias = pack(FFNWeights(up, down, gate if gated else None))
    assert bias is None
    x = torch.randn(4, 8, generator=generator)
    hidden = torch.relu(x @ gate.t()) * (x @ up.t()) if gated else torch.relu(x @ up.t())
    torch.testing.assert_close(ffn(x, Record(rows, gated, "relu")), hidden @ down)
