"""Public operators: `plain_ffn`, `gated_ffn`, their gather forms, and `contextual_ffn`.

In one line each, with U, G, V the parts of the record:

    plain_ffn(x) = act(x U^T + b) V + c + residual
    gated_ffn(x) = (act(x G^T + b) * (x U^T + b')) V + c + residual

The gather forms do the same over the rows `index`, and `contextual_ffn` over the first `count` of these, a number on
the device. The functions of this module check every argument, and then call the operators of `operators`.

`torch.ops.pyprune.ffn` is the first four for inference only, at a fraction of their cost a call: unchecked, without
autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import reference
from ..base.errors import check, check_choice
from ..model.mask import KeepIndex
from . import dispatch
from .operators import CONTEXTUAL_FFN, OPERATORS

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BACKENDS = tuple(dispatch.names())  # here, for torch.compile cannot follow how they are loaded

# Most tokens that can have a list of neurons each.
MOST_LISTS = 4


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
    check_choice(backend, "backend", _BACKENDS)
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


def contextual_ffn(
    x: Tensor,
    record: Tensor,
    index: Tensor,
    count: Tensor,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    gated: bool,
    activation: str,
    backend: str = "auto",
) -> Tensor:
    """`reference.contextual_ffn` by the chosen backend: the neurons are chosen on the device, for this input.

    Nothing waits for the device, so the entries of `index` are not checked: the first `count` must be rows of `record`.

    Args:
        index: int32 `[K]`; or `[M, K]`, one list a token, for at most four tokens.
        count: int32 `[1]`; or `[M]` with one list a token.

    Raises:
        InputError: operands that do not fit.
        BackendError: the forced backend cannot run this problem.
    """
    check_operands(x, record, scales, neuron_bias, down_bias, residual, gated, activation)
    check_choice(backend, "backend", _BACKENDS)
    tokens = x.shape[:-1].numel()
    for name, tensor in (("index", index), ("count", count)):
        check(isinstance(tensor, Tensor), name, "be a tensor", type(tensor).__name__)
        check(tensor.dtype == torch.int32, name, "have dtype torch.int32", tensor.dtype)
        check(tensor.device == x.device, name, f"be on the device of x, {x.device}", str(tensor.device))
    shape = tuple(index.shape)
    check(index.ndim in (1, 2), "index", "have shape [K], or [M, K] with one list a token", shape)
    if index.ndim == 2:
        check(tokens <= MOST_LISTS, "x", f"have at most {MOST_LISTS} tokens with one list a token", tokens)
        check(shape[0] == tokens, "index", f"have one list for each of the {tokens} tokens", shape)
    lists = 1 if index.ndim == 1 else tokens
    check(tuple(count.shape) == (lists,), "count", f"have shape {(lists,)}", tuple(count.shape))
    rest = (scales, neuron_bias, down_bias, residual, gated, activation, backend)
    return CONTEXTUAL_FFN(x, record, index, count, *rest)
