"""The four operators: values against float64, opcheck, gradients, fakes, and every refusal."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyprune import BackendError, InputError, KeepIndex
from pyprune.base import reference
from pyprune.ffn import operators, ops
from pyprune.ffn.mlp import pack
from pyprune.ffn.quantisation import dequantise, quantise
from pyprune.model.patterns import FFNWeights

FORMS = list(itertools.product((False, True), (False, True)))  # gated, gather
PUBLIC = {
    (False, False): ops.plain_ffn,
    (False, True): ops.plain_ffn_gather,
    (True, False): ops.gated_ffn,
    (True, True): ops.gated_ffn_gather,
}
# M, D, F: one of everything, nothing at all, primes.
SHAPES = [((5,), 8, 12), ((0,), 8, 12), ((3,), 1, 7), ((3,), 7, 1), ((1,), 1, 1), ((2, 0, 3), 5, 4), ((2, 3), 13, 31)]


def formula(x, gate, up, down, biases, down_bias, residual, activation):
    """The FFN written out, neuron by neuron."""
    act = reference.ACTIVATIONS[activation]
    out = torch.zeros_like(x)
    for j in range(len(up)):
        a = x @ up[j] + (0 if biases is None else biases[j, -1])
        a = act(a) if gate is None else act(x @ gate[j] + (0 if biases is None else biases[j, 0])) * a
        out = out + a[..., None] * down[j]
    out = out if down_bias is None else out + down_bias
    return out if residual is None else out + residual


def operands(gated, gather, shape=(5,), d=8, f=12, dtype=torch.float32, extras=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    parts = 3 if gated else 2
    index = torch.randperm(f, generator=generator)[: (f + 1) // 2].sort().values.int() if gather else None
    x, record = randn(*shape, d), randn(f, parts * d)
    rest = (randn(f, parts - 1), randn(d), randn(*shape, d)) if extras else (None, None, None)
    return x, record, index, rest


def low_level(gated, gather):
    return getattr(torch.ops.pyprune, f"{'gated' if gated else 'plain'}_ffn{'_gather' if gather else ''}").default


def arguments(x, record, index, rest, scales=None):
    return (x, record, *(() if index is None else (index,)), scales, *rest)


def call(gated, gather, x, record, index, rest, activation="silu", backend="auto", scales=None):
    keep = () if index is None else (KeepIndex(index, record.shape[0] if record.ndim else 12),)
    return PUBLIC[gated, gather](x, record, *keep, *rest, scales=scales, activation=activation, backend=backend)


@pytest.mark.parametrize(("gated", "gather"), FORMS)
@pytest.mark.parametrize("extras", [True, False])
@pytest.mark.parametrize(("shape", "d", "f"), SHAPES)
def test_equals_the_formula(gated, gather, extras, shape, d, f):
    x, record, index, rest = operands(gated, gather, shape, d, f, torch.float64, extras)
    rows = slice(None) if index is None else index.long()
    *inputs, down = record[rows].split(d, dim=1)
    biases = None if rest[0] is None else rest[0][rows]
    gate = inputs[0] if gated else None
    for activation in reference.ACTIVATIONS:
        want = formula(x, gate, inputs[-1], down, biases, *rest[1:], activation)
        for backend in ("auto", "torch"):
            got = call(gated, gather, x, record, index, rest, activation, backend)
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("gated", "gather"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(gated, gather, dtype):
    x, record, index, rest = operands(gated, gather, (33,), 64, 160, dtype)
    record = record / 8
    exact = call(gated, gather, x.double(), record.double(), index, [t.double() for t in rest])
    kept = record if index is None else record[index.long()]
    neuron_bias = rest[0] if index is None else rest[0][index.long()]
    *inputs, down = kept.split(64, dim=1)
    hidden = torch.nn.functional.silu(torch.nn.functional.linear(x, inputs[0], neuron_bias[:, 0]))
    if gated:
        hidden = hidden * torch.nn.functional.linear(x, inputs[1], neuron_bias[:, 1])
    torch_own = torch.nn.functional.linear(hidden, down.t(), rest[1]) + rest[2]
    error, allowed = ((t.double() - exact).norm() for t in (call(gated, gather, x, record, index, rest), torch_own))
    assert 0 < error <= 2 * allowed


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MIXED = [(x, w) for x, w in itertools.product(FLOATS, (*FLOATS, torch.int8)) if x != w]


def mixed_operands(gated, gather, dtype, weights, **sizes):
    """Operands with x, biases and residual of `dtype`, a record of `weights`, and its scales or None."""
    x, record, index, rest = operands(gated, gather, dtype=torch.float64, **sizes)
    record, scales = record / 8, None
    if weights == torch.int8:
        record, scales = quantise(record, 3 if gated else 2)
    rest = tuple(None if t is None else t.to(dtype) for t in rest)
    return x.to(dtype), record.to(weights), index, rest, scales


def exact_weights(record, scales):
    return record.double() if scales is None else dequantise(record, scales, torch.float64)


@pytest.mark.parametrize(("gated", "gather"), FORMS)
@pytest.mark.parametrize(("dtype", "weights"), [*MIXED, (torch.float64, torch.int8)])
@pytest.mark.parametrize("extras", [True, False])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_mixed_dtypes(gated, gather, dtype, weights, extras, backend):
    sizes = {"shape": (33,), "d": 64, "f": 160, "extras": extras}
    x, record, index, rest, scales = mixed_operands(gated, gather, dtype, weights, **sizes)
    rest_exact = [None if t is None else t.double() for t in rest]
    dense = exact_weights(record, scales)
    exact = call(gated, gather, x.double(), dense, index, rest_exact)
    got = call(gated, gather, x, record, index, rest, "silu", backend, scales)
    assert got.dtype == dtype
    # What torch makes of the same weights in the dtype of x: twice that error is allowed, as between equal dtypes.
    torch_own = call(gated, gather, x, dense.to(dtype), index, rest, "silu", "torch")
    error, allowed = ((t.double() - exact).norm() for t in (got, torch_own))
    assert error <= 2 * allowed + 1e-12 * exact.norm()


@pytest.mark.parametrize(("gated", "gather"), FORMS)
def test_int8_beside_float16_does_not_overflow(gated, gather):
    """Sums of x times integers of up to 127 pass what float16 holds, where x times the weights does not."""
    x, record, index, rest, scales = mixed_operands(gated, gather, torch.float16, torch.int8, shape=(4,), d=64)
    x = x * 100
    exact = call(gated, gather, x.double(), exact_weights(record, scales), index, [t.double() for t in rest], "relu")
    assert (x.double() @ record[:, :64].double().t()).abs().max() > 65504
    assert exact.abs().max() < 65504
    got = call(gated, gather, x, record, index, rest, "relu", "torch", scales)
    torch.testing.assert_close(got.double(), exact, rtol=2e-3, atol=2e-3 * exact.abs().max().item())


@pytest.mark.parametrize(("gated", "gather"), FORMS)
@pytest.mark.parametrize("weights", [torch.int8, torch.bfloat16])
def test_gradients_beside_weights_of_another_dtype(gated, gather, weights):
    x, record, index, rest, scales = mixed_operands(gated, gather, torch.float32, weights)
    leaves = [t.requires_grad_() for t in (x, *rest)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    upstream = torch.randn(5, 8)
    exact = call(gated, gather, wide[0], exact_weights(record, scales), index, wide[1:])
    want = torch.autograd.grad(exact, wide, upstream.double())
    out = low_level(gated, gather)(*arguments(x, record, index, rest, scales), "silu", "torch")
    keep = (x, record) if index is None else (x, record, index)
    twin = operators.TWINS[gated, gather](*keep, *rest, scales=scales, activation="silu")
    for result in (out, twin):
        for got, exact_grad in zip(torch.autograd.grad(result, leaves, upstream), want, strict=True):
            torch.testing.assert_close(got.double(), exact_grad, rtol=1e-4, atol=1e-4)
    if weights != torch.int8:
        record.requires_grad_()
        out = low_level(gated, gather)(*arguments(x, record, index, rest, scales), "silu", "torch")
        assert torch.autograd.grad(out.sum(), record)[0].dtype == weights


def lean(x, record, index, scales, rest, gated, activation="silu", backend="auto", native_tokens=64):
    return torch.ops.pyprune.ffn.default(x, record, index, scales, *rest, gated, activation, backend, native_tokens)


@pytest.mark.parametrize(("gated", "gather"), FORMS)
@pytest.mark.parametrize(
    ("dtype", "weights"), [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.int8)]
)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (0,)])
def test_inference_operator_equals_the_others(gated, gather, dtype, weights, shape):
    x, record, index, rest, scales = mixed_operands(gated, gather, dtype, weights, shape=shape)
    want = call(gated, gather, x, record, index, rest, "gelu", "torch", scales)
    assert torch.equal(lean(x, record, index, scales, rest, gated, "gelu", "torch"), want)
    by_dispatch = torch.ops.pyprune.ffn_by_dispatch.default
    assert torch.equal(by_dispatch(x, record, index, scales, *rest, gated, "gelu", "torch"), want)
    if dtype == torch.float64:
        return  # no native kernel, and dispatch.native_tokens says so
    got = lean(x, record, index, scales, rest, gated, "gelu", "auto")
    torch.testing.assert_close(got, want, rtol=3e-2 if dtype == torch.bfloat16 else 1e-5, atol=3e-2)


@pytest.mark.parametrize(("gated", "gather"), FORMS)
@pytest.mark.parametrize("weights", [torch.float32, torch.int8])
@pytest.mark.parametrize("extras", [True, False])
@pytest.mark.parametrize("name", ["ffn", "ffn_by_dispatch"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_opcheck_of_the_inference_operators(gated, gather, weights, extras, name, backend):
    x, record, index, rest, scales = mixed_operands(gated, gather, torch.float32, weights, extras=extras)
    arguments = (x, record, index, scales, *rest, gated, "gelu", backend)
    op = getattr(torch.ops.pyprune, name).default
    torch.library.opcheck(op, arguments if name == "ffn_by_dispatch" else (*arguments, 64))


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_inference_operator_refuses_a_forced_backend_as_dispatch_does(backend):
    x, record, index, rest = operands(True, False, dtype=torch.float64)
    with pytest.raises(BackendError, match=rf"{backend}: no kernel for torch\.float64"):
        torch.ops.pyprune.ffn_by_dispatch.default(x, record, index, None, *rest, True, "silu", backend)


@pytest.mark.parametrize(("gated", "gather"), FORMS)
def test_transposed_and_sliced_operands(gated, gather):
    x, record, index, rest = operands(gated, gather, (6,), 8, 12)
    want = call(gated, gather, x, record, index, rest)
    odd = x.t().contiguous().t(), torch.cat([record, record], 1)[:, : record.shape[1]]
    torch.testing.assert_close(call(gated, gather, *odd, index, rest), want)
    cube = torch.stack([x, x, x], 1)[:, ::2].transpose(0, 1)  # [2, 6, 8], not contiguous
    residual = rest[2].expand(2, -1, -1)
    got = call(gated, gather, cube, record, index, (*rest[:2], residual))
    torch.testing.assert_close(got, want.expand(2, -1, -1))
    assert got.shape == cube.shape


@pytest.mark.parametrize(("gated", "gather"), FORMS)
def test_one_token_without_batch_dimension(gated, gather):
    x, record, index, rest = operands(gated, gather, ())
    many = call(gated, gather, x[None], record, index, (*rest[:2], rest[2][None]))
    torch.testing.assert_close(call(gated, gather, x, record, index, rest), many[0])


@pytest.mark.parametrize(("gated", "gather"), FORMS)
@pytest.mark.parametrize(("shape", "extras"), [((5,), True), ((2, 3), True), ((4,), False), ((0,), True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(gated, gather, shape, extras, dtype):
    x, record, index, rest = operands(gated, gather, shape, dtype=dtype, extras=extras)
    floating = [x, record, *(t for t in rest if t is not None)]
    for tensor in floating:
        tensor.requires_grad_(shape != (0,))
    torch.library.opcheck(low_level(gated, gather), (*arguments(x, record, index, rest), "gelu", "torch"))


@pytest.mark.parametrize(("gated", "gather"), FORMS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("extras", [True, False])
def test_gradcheck(gated, gather, backend, extras):
    x, record, index, rest = operands(gated, gather, (2,), 3, 4, torch.float64, extras)
    floating = [t.requires_grad_() for t in (x, record, *rest) if t is not None]

    def run(x, record, *rest):
        rest = rest or (None, None, None)
        return low_level(gated, gather)(*arguments(x, record, index, rest), "gelu_tanh", backend)

    assert torch.autograd.gradcheck(run, floating)
    assert torch.autograd.gradgradcheck(run, floating)


@pytest.mark.parametrize(("gated", "gather"), FORMS)
def test_gradients_equal_those_of_plain_torch(gated, gather):
    x, record, index, rest = operands(gated, gather)
    leaves = [t.requires_grad_() for t in (x, record, *rest)]
    out = low_level(gated, gather)(*arguments(x, record, index, rest), "silu", "torch")
    operator = (x, record) if index is None else (x, record, index)
    twin = operators.TWINS[gated, gather](*operator, *rest, activation="silu")
    upstream = torch.randn_like(out)
    for got, want in zip(*(torch.autograd.grad(o, leaves, upstream) for o in (out, twin)), strict=True):
        torch.testing.assert_close(got, want)
    if gather:
        removed = torch.ones(12, dtype=torch.bool)
        removed[index.long()] = False
        out = low_level(gated, True)(*arguments(x, record, index, rest), "silu", "torch")
        grad = torch.autograd.grad(out.sum(), record)[0]
        assert (grad[removed] == 0).all()
        assert (grad[~removed] != 0).any(1).all()


@pytest.mark.parametrize(("gated", "gather"), FORMS)
def test_only_wanted_gradients_are_made(gated, gather):
    x, record, index, rest = operands(gated, gather)
    rest[1].requires_grad_()
    low_level(gated, gather)(*arguments(x, record, index, rest), "silu", "torch").sum().backward()
    assert x.grad is None
    assert rest[1].grad.tolist() == [5.0] * 8


@pytest.mark.parametrize(("gated", "gather"), FORMS)
def test_fake_tensors(gated, gather):
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, dtype=torch.bfloat16)
        record = torch.empty(12, 24 if gated else 16, dtype=torch.bfloat16)
        index = torch.empty(4, dtype=torch.int32) if gather else None
        out = low_level(gated, gather)(*arguments(x, record, index, (None, None, None)), "silu", "auto")
    assert (out.shape, out.dtype, out.is_contiguous()) == ((2, 3, 8), torch.bfloat16, True)


def replaced(gated, gather, **changes):
    x, record, index, rest = operands(gated, gather)
    named = {"x": x, "record": record, "neuron_bias": rest[0], "down_bias": rest[1], "residual": rest[2]}
    named.update(changes)
    x, record, *rest = named.values()
    return call(gated, gather, x, record, index, rest)


@pytest.mark.parametrize(("gated", "gather"), FORMS)
@pytest.mark.parametrize(
    ("argument", "shape", "rule"),
    [
        ("record", (12, 17), r"have shape \(12, \d+\); got \(12, 17\)"),
        ("record", (12,), r"have two dimensions; got \(12,\)"),
        ("record", (), r"have two dimensions; got \(\)"),
        ("neuron_bias", (12,), r"have shape \(12, \d\); got \(12,\)"),
        ("neuron_bias", (12, 3), r"have shape \(12, \d\); got \(12, 3\)"),
        ("down_bias", (9,), r"have shape \(8,\); got \(9,\)"),
        ("down_bias", (1, 8), r"have shape \(8,\); got \(1, 8\)"),
        ("residual", (1, 8), r"have shape \(5, 8\); got \(1, 8\)"),  # would broadcast
        ("residual", (8,), r"have shape \(5, 8\); got \(8,\)"),
        ("x", (), r"have at least one dimension; got \(\)"),
    ],
)
def test_wrong_shape_is_refused(gated, gather, argument, shape, rule):
    with pytest.raises(InputError, match=f"{argument} must {rule}"):
        replaced(gated, gather, **{argument: torch.zeros(shape)})


@pytest.mark.parametrize(("gated", "gather"), FORMS)
@pytest.mark.parametrize("argument", ["record", "neuron_bias", "down_bias", "residual"])
def test_wrong_dtype_and_device_are_refused(gated, gather, argument):
    _, record, _, rest = operands(gated, gather)
    tensor = dict(zip(("record", "neuron_bias", "down_bias", "residual"), (record, *rest), strict=True))[argument]
    with pytest.raises(InputError, match=f"{argument} must .*have the dtype of x, torch.float32.*; got torch.float64"):
        replaced(gated, gather, **{argument: tensor.double()})
    with pytest.raises(InputError, match=f"{argument} must be on the device of x, cpu; got 'meta'"):
        replaced(gated, gather, **{argument: tensor.to("meta")})


@pytest.mark.parametrize(("gated", "gather"), FORMS)
def test_wrong_scales_and_mixtures_are_refused(gated, gather):
    x, record, index, rest, scales = mixed_operands(gated, gather, torch.float32, torch.int8)
    parts = 3 if gated else 2
    for wrong, rule in (
        (None, "be given with an int8 record; got None"),
        (scales[:11], rf"have shape \(12, {parts}\); got \(11, {parts}\)"),
        (scales[:, :1], rf"have shape \(12, {parts}\); got \(12, 1\)"),
        (scales.double(), r"have dtype torch\.float32; got torch\.float64"),
        (scales.to("meta"), "be on the device of x, cpu; got 'meta'"),
    ):
        with pytest.raises(InputError, match=f"scales must {rule}"):
            call(gated, gather, x, record, index, rest, scales=wrong)
    with pytest.raises(InputError, match=r"scales must be None with a record of torch\.float32; got \(12, "):
        call(gated, gather, x, record.float(), index, rest, scales=scales)
    for weights in (torch.float64, torch.int16, torch.uint8, torch.bool):
        with pytest.raises(InputError, match=rf"record must be int8, .*x, torch\.float32, .*; got {weights}"):
            call(gated, gather, x, record.to(weights), index, rest)
    wide = [t.double() for t in rest]
    with pytest.raises(InputError, match=r"record must be int8, .*x, torch\.float64, .*; got torch\.float32"):
        call(gated, gather, x.double(), record.float(), index, wide)


@pytest.mark.parametrize(("gated", "gather"), FORMS)
def test_other_refusals(gated, gather):
    x, record, index, rest = operands(gated, gather)
    with pytest.raises(InputError, match=r"x must be floating point; got torch\.int64"):
        replaced(gated, gather, x=torch.zeros(5, 8, dtype=torch.int64))
    with pytest.raises(InputError, match=r"activation must be one of gelu, .*got 'gelu_tan' \(nearest: gelu_tanh"):
        call(gated, gather, x, record, index, rest, "gelu_tan")
    with pytest.raises(InputError, match=r"backend must be one of auto, torch.*got 'tritn' \(nearest: triton"):
        call(gated, gather, x, record, index, rest, backend="tritn")
    with pytest.raises(BackendError, match=r"triton: no kernel for torch\.float64"):
        call(gated, gather, x.double(), record.double(), index, [t.double() for t in rest], backend="triton")


@pytest.mark.parametrize("gated", [False, True])
def test_gather_wants_a_keep_index_of_this_record(gated):
    x, record, index, rest = operands(gated, True)
    op = PUBLIC[gated, True]
    with pytest.raises(InputError, match="index must be a KeepIndex; got 'Tensor'"):
        op(x, record, index, *rest, activation="silu")
    with pytest.raises(InputError, match="index must refer to 12 neurons; got 99"):
        op(x, record, KeepIndex([0], 99), *rest, activation="silu")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bad", [[0, 12], [-1, 3]])
def test_raw_operator_never_reads_outside_the_record(gated, bad):
    x, record, _, rest = operands(gated, True)
    with pytest.raises((IndexError, RuntimeError), match=r"out of range|out of bounds"):
        low_level(gated, True)(x, record, torch.tensor(bad, dtype=torch.int32), None, *rest, "silu", "torch")


@pytest.mark.parametrize("gated", [False, True])
def test_packed_record_computes_what_its_parts_do(gated):
    generator = torch.Generator().manual_seed(0)
    up, down, gate = (torch.randn(12, 8, generator=generator) for _ in range(3))
    record, bias = pack(FFNWeights(up, down, gate if gated else None))
    assert bias is None
    x = torch.randn(4, 8, generator=generator)
    hidden = torch.relu(x @ gate.t()) * (x @ up.t()) if gated else torch.relu(x @ up.t())
    torch.testing.assert_close(PUBLIC[gated, False](x, record, activation="relu"), hidden @ down)
