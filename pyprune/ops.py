"""Public operators: `plain_ffn`, `gated_ffn` and their gather forms, as `torch.ops.pyprune.*`.

In one line each, with U, G, V the parts of the record:

    plain_ffn(x) = act(x U^T + b) V + c + residual
    gated_ffn(x) = (act(x G^T + b) * (x U^T + b')) V + c + residual

The gather forms do the same over the rows `index`. Schema, fake implementation and autograd formula are registered
here; `dispatch` chooses who computes. The functions of this module check every argument and then call the operator.
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
    )
    call = Call(rows, record, index, neuron_bias, down_bias, rest, gated, activation)
    return dispatch.choose(problem, backend).run(call).view(x.shape)


def _fake(x: Tensor, *args: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, activation, _backend = inputs
    ctx.activation = activation
    ctx.save_for_backward(*tensors)


def _backward(twin: Callable[..., Tensor]) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by differentiating the plain-torch twin."""
        tensors = list(ctx.saved_tensors)
        wanted = [i for i, t in enumerate(tensors) if t is not None and ctx.needs_input_grad[i]]
        twice = torch.is_grad_enabled()  # create_graph=True: these gradients will be differentiated again
        with torch.enable_grad():
            for i in wanted if not twice else ():
                tensors[i] = tensors[i].detach().requires_grad_()
            out = twin(*tensors, activation=ctx.activation)
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
        neuron_bias: Tensor | None,
        down_bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
        backend: str,
    ) -> Tensor:
        return _run(x, record, None, neuron_bias, down_bias, residual, gated, activation, backend)

    return op


def _gather_op(gated: bool) -> Callable[..., Tensor]:
    def op(
        x: Tensor,
        record: Tensor,
        index: Tensor,
        neuron_bias: Tensor | None,
        down_bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
        backend: str,
    ) -> Tensor:
        return _run(x, record, index, neuron_bias, down_bias, residual, gated, activation, backend)

    return op


def _register(gated: bool, gather: bool) -> Any:
    name = f"pyprune::{'gated' if gated else 'plain'}_ffn{'_gather' if gather else ''}"
    op = torch.library.custom_op(name, (_gather_op if gather else _compact_op)(gated), mutates_args=())
    op.register_fake(_fake)
    op.register_autograd(_backward(TWINS[gated, gather]), setup_context=_save)
    return op


OPERATORS = {(gated, gather): _register(gated, gather) for gated in (False, True) for gather in (False, True)}


def check_operands(
    x: Tensor,
    record: Tensor,
    neuron_bias: Tensor | None,
    down_bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
    activation: str,
) -> None:
    """Raise `InputError` naming the first argument whose shape, dtype or device does not fit.

    Shapes as in `reference`.
    """
    parts = 3 if gated else 2
    check_choice(activation, "activation", reference.ACTIVATIONS)
    check(x.ndim >= 1, "x", "have at least one dimension", tuple(x.shape))
    check(record.ndim == 2, "record", "have two dimensions", tuple(record.shape))
    d, f = x.shape[-1], record.shape[0]
    check(x.is_floating_point(), "x", "be floating point", x.dtype)
    shapes = (
        ("record", record, (f, parts * d)),
        ("neuron_bias", neuron_bias, (f, parts - 1)),
        ("down_bias", down_bias, (d,)),
        ("residual", residual, tuple(x.shape)),
    )
    for name, tensor, shape in shapes:
        if tensor is None:
            continue
        check(tuple(tensor.shape) == shape, name, f"have shape {shape}", tuple(tensor.shape))
        check(tensor.dtype == x.dtype, name, f"have the dtype of x, {x.dtype}", tensor.dtype)
        check(tensor.device == x.device, name, f"be on the device of x, {x.device}", str(tensor.device))


def _call(
    x: Tensor,
    record: Tensor,
    index: KeepIndex | None,
    neuron_bias: Tensor | None,
    down_bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
    activation: str,
    backend: str,
) -> Tensor:
    check_operands(x, record, neuron_bias, down_bias, residual, gated, activation)
    check_choice(backend, "backend", dispatch.names())
    rest = (neuron_bias, down_bias, residual, activation, backend)
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
    activation: str,
    backend: str = "auto",
) -> Tensor:
    """`reference.plain_ffn` by the chosen backend. Raises `InputError` on operands that do not fit, `BackendError`."""
    return _call(x, record, None, neuron_bias, down_bias, residual, False, activation, backend)


def gated_ffn(
    x: Tensor,
    record: Tensor,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str,
    backend: str = "auto",
) -> Tensor:
    """`reference.gated_ffn` by the chosen backend. Raises `InputError` on operands that do not fit, `BackendError`."""
    return _call(x, record, None, neuron_bias, down_bias, residual, True, activation, backend)


def plain_ffn_gather(
    x: Tensor,
    record: Tensor,
    index: KeepIndex,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str,
    backend: str = "auto",
) -> Tensor:
    """`reference.plain_ffn_gather` by the chosen backend; `index` was checked when it was made."""
    return _call(x, record, index, neuron_bias, down_bias, residual, False, activation, backend)


def gated_ffn_gather(
    x: Tensor,
    record: Tensor,
    index: KeepIndex,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str,
    backend: str = "auto",
) -> Tensor:
    """`reference.gated_ffn_gather` by the chosen backend; `index` was checked when it was made."""
    return _call(x, record, index, neuron_bias, down_bias, residual, True, activation, backend)
