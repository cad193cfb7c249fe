"""Public operators: `plain_ffn`, `gated_ffn` and their gather forms, as `torch.ops.pyprune.*`.

In one line each, with U, G, V the parts of the record:

    plain_ffn(x) = act(x U^T + b) V + c + residual
    gated_ffn(x) = (act(x G^T + b) * (x U^T + b')) V + c + residual

The gather forms do the same over the rows `index`. Schema, fake implementation and autograd formula are registered
here; `dispatch` chooses who computes. The functions of this module check every argument and then call the operator.

`torch.ops.pyprune.ffn` is all four for inference only, at a fraction of their cost a call: unchecked, without autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import dispatch, reference
from .backends import Call, Problem
from .errors import check, check_choice
from .mask import KeepIndex

TWINS: dict[tuple[bool, bool], Callable[..., Tensor]] = {
    (False, False): reference.plain_ffn,
    (False, True): reference.plain_ffn_gather,
    (True, False): reference.gated_ffn,
    (True, True): reference.gated_ffn_gather,
}


def _run(
    x: Tensor,
    record: Tensor,
    index: Tensor | None,
    scales: Tensor | None,
    neuron_bias: Tensor | None,
    down_bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
    activation: str,
    backend: str,
) -> Tensor:
    hidden = x.shape[-1]
    rows = x.reshape(-1, hidden)
    rest = None if residual is None else residual.reshape(-1, hidden)
    size = record.shape[0]
    problem = Problem(
        x.device.type,
        x.dtype,
        rows.shape[0],
        hidden,
        size,
        size if index is None else index.shape[0],
        gated,
        index is not None,
        activation,
        record.dtype,
    )
    call = Call(rows, record, index, scales, neuron_bias, down_bias, rest, gated, activation)
    return dispatch.choose(problem, backend).run(call).view(x.shape)


def _fake(x: Tensor, *args: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, activation, _backend = inputs
    ctx.activation = activation
    ctx.save_for_backward(*tensors)


def _backward(gated: bool, gather: bool) -> Callable[..., Any]:
    twin, at = TWINS[gated, gather], 3 if gather else 2  # where scales stand

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by differentiating the plain-torch twin."""
        tensors = list(ctx.saved_tensors)
        wanted = [i for i, t in enumerate(tensors) if t is not None and ctx.needs_input_grad[i]]
        twice = torch.is_grad_enabled()  # create_graph=True: these gradients will be differentiated again
        with torch.enable_grad():
            for i in wanted if not twice else ():
                tensors[i] = tensors[i].detach().requires_grad_()
            out = twin(*tensors[:at], *tensors[at + 1 :], scales=tensors[at], activation=ctx.activation)
            found = torch.autograd.grad(out, [tensors[i] for i in wanted], grad, create_graph=twice)
        grads: list[Tensor | None] = [None] * (len(tensors) + 2)
        for i, g in zip(wanted, found, strict=True):
            grads[i] = g
        return tuple(grads)

    return backward


def _compact_op(gated: bool) -> Callable[..., Tensor]:
    def op(
        x: Tensor,
        record: Tensor,
        scales: Tensor | None,
        neuron_bias: Tensor | None,
        down_bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
        backend: str,
    ) -> Tensor:
        return _run(x, record, None, scales, neuron_bias, down_bias, residual, gated, activation, backend)

    return op


def _gather_op(gated: bool) -> Callable[..., Tensor]:
    def op(
        x: Tensor,
        record: Tensor,
        index: Tensor,
        scales: Tensor | None,
        neuron_bias: Tensor | None,
        down_bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
        backend: str,
    ) -> Tensor:
        return _run(x, record, index, scales, neuron_bias, down_bias, residual, gated, activation, backend)

    return op


def _register(gated: bool, gather: bool) -> Any:
    name = f"pyprune::{'gated' if gated else 'plain'}_ffn{'_gather' if gather else ''}"
    op = torch.library.custom_op(name, (_gather_op if gather else _compact_op)(gated), mutates_args=())
    op.register_fake(_fake)
    op.register_autograd(_backward(gated, gather), setup_context=_save)
    return op


OPERATORS = {(gated, gather): _register(gated, gather) for gated in (False, True) for gather in (False, True)}


_OPERANDS = (
    "(Tensor x, Tensor record, Tensor? index, Tensor? scales, Tensor? neuron_bias, Tensor? down_bias, "
    "Tensor? residual, bool gated, str activation, str backend"
)
_LIBRARY = torch.library.Library("pyprune", "FRAGMENT")


def _ffn(*operands: Any) -> Tensor:
    return _run(*operands[:-1])


def _define(name: str, schema: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Define `pyprune::name` with `run` for every device; not by `custom_op`, whose calls cost 8 us more."""
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyprune::{name}", _fake, lib=_LIBRARY)
    op: Callable[..., Tensor] = getattr(torch.ops.pyprune, name).default
    return op


# The FFN operators for inference: without autograd, and with operands that the caller has checked. `ffn` has a CPU
# kernel in the native library, which takes the call where `backend` is "cpu", or "auto" and tokens are no more than
# `native_tokens` (see `dispatch.native_tokens`), and hands all others to `ffn_by_dispatch`. Without that library, and
# on other devices, `ffn` is `ffn_by_dispatch`.
FFN_BY_DISPATCH = _define("ffn_by_dispatch", f"{_OPERANDS}) -> Tensor", _run)
FFN = _define("ffn", f"{_OPERANDS}, int native_tokens) -> Tensor", _ffn)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _check_record(x: Tensor, record: Tensor, scales: Tensor | None) -> None:
    if record.dtype == torch.int8:
        check(scales is not None, "scales", "be given with an int8 record", scales)
        return
    mixed = record.dtype in _FLOATS and x.dtype in _FLOATS
    rule = f"be int8, have the dtype of x, {x.dtype}, or be mixed with it (float32, bfloat16, float16)"
    check(mixed or record.dtype == x.dtype, "record", rule, record.dtype)
    given = None if scales is None else tuple(scales.shape)
    check(scales is None, "scales", f"be None with a record of {record.dtype}", given)


def check_operands(
    x: Tensor,
    record: Tensor,
    scales: Tensor | None,
    neuron_bias: Tensor | None,
    down_bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
    activation: str,
) -> None:
    """Raise `InputError` naming the first argument whose shape, dtype or device does not fit.

    Shapes and dtypes as in `reference`. The dtypes of x and of a floating record differ only among float32, bfloat16
    and float16.
    """
    parts = 3 if gated else 2
    check_choice(activation, "activation", reference.ACTIVATIONS)
    check(x.ndim >= 1, "x", "have at least one dimension", tuple(x.shape))
    check(record.ndim == 2, "record", "have two dimensions", tuple(record.shape))
    d, f = x.shape[-1], record.shape[0]
    check(x.is_floating_point(), "x", "be floating point", x.dtype)
    check(record.shape[1] == parts * d, "record", f"have shape {(f, parts * d)}", tuple(record.shape))
    check(record.device == x.device, "record", f"be on the device of x, {x.device}", str(record.device))
    _check_record(x, record, scales)
    of_x = f"the dtype of x, {x.dtype}"
    rules = (
        ("scales", scales, (f, parts), torch.float32, "dtype torch.float32"),
        ("neuron_bias", neuron_bias, (f, parts - 1), x.dtype, of_x),
        ("down_bias", down_bias, (d,), x.dtype, of_x),
        ("residual", residual, tuple(x.shape), x.dtype, of_x),
    )
    for name, tensor, shape, dtype, described in rules:
        if tensor is None:
            continue
        check(tuple(tensor.shape) == shape, name, f"have shape {shape}", tuple(tensor.shape))
        check(tensor.dtype == dtype, name, f"have {described}", tensor.dtype)
        check(tensor.device == x.device, name, f"be on the device of x, {x.device}", str(tensor.device))


def _call(
    x: Tensor,
    record: Tensor,
    index: KeepIndex | None,
    scales: Tensor | None,
    neuron_bias: Tensor | None,
    down_bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
    activation: str,
    backend: str,
) -> Tensor:
    check_operands(x, record, scales, neuron_bias, down_bias, residual, gated, activation)
    check_choice(backend, "backend", dispatch.names())
    rest = (scales, neuron_bias, down_bias, residual, activation, backend)
    if index is None:
        return OPERATORS[gated, False](x, record, *rest)
    f = record.shape[0]
    check(isinstance(index, KeepIndex), "index", "be a KeepIndex", type(index).__name__)
    check(index.intermediate_size == f, "index", f"refer to {f} neurons", index.intermediate_size)
    return OPERATORS[gated, True](x, record, index.neurons.to(x.device), *rest)


def plain_ffn(
    x: Tensor,
    record: Tensor,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    activation: str,
    backend: str = "auto",
) -> Tensor:
    """`reference.plain_ffn` by the chosen backend. Raises `InputError` on operands that do not fit, `BackendError`."""
    return _call(x, record, None, scales, neuron_bias, down_bias, residual, False, activation, backend)


def gated_ffn(
    x: Tensor,
    record: Tensor,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    activation: str,
    backend: str = "auto",
) -> Tensor:
    """`reference.gated_ffn` by the chosen backend. Raises `InputError` on operands that do not fit, `BackendError`."""
    return _call(x, record, None, scales, neuron_bias, down_bias, residual, True, activation, backend)


def plain_ffn_gather(
    x: Tensor,
    record: Tensor,
    index: KeepIndex,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    activation: str,
    backend: str = "auto",
) -> Tensor:
    """`reference.plain_ffn_gather` by the chosen backend; `index` was checked when it was made."""
    return _call(x, record, index, scales, neuron_bias, down_bias, residual, False, activation, backend)


def gated_ffn_gather(
    x: Tensor,
    record: Tensor,
    index: KeepIndex,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    activation: str,
    backend: str = "auto",
) -> Tensor:
    """`reference.gated_ffn_gather` by the chosen backend; `index` was checked when it was made."""
    return _call(x, record, index, scales, neuron_bias, down_bias, residual, True, activation, backend)
