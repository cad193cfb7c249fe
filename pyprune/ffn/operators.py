"""The registered operators, `torch.ops.pyprune.*`: schema, fake implementation, autograd formula, and the way to a
backend. Their operands are those of `backends.Call`, and nobody checks them here: see `ops`, whose functions do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base import reference
from . import dispatch
from .backends import Call, Problem

TWINS: dict[tuple[bool, bool], Callable[..., Tensor]] = {
    (False, False): reference.plain_ffn,
    (False, True): reference.plain_ffn_gather,
    (True, False): reference.gated_ffn,
    (True, True): reference.gated_ffn_gather,
}

Maybe = Tensor | None


def _run(
    x: Tensor,
    record: Tensor,
    index: Maybe,
    scales: Maybe,
    neuron_bias: Maybe,
    down_bias: Maybe,
    residual: Maybe,
    gated: bool,
    activation: str,
    backend: str,
    count: Maybe = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Compute by the backend that `dispatch` chooses."""
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
        size if index is None else index.shape[-1],
        gated,
        index is not None,
        activation,
        record.dtype,
        count is not None,
        batch_invariant,
    )
    call = Call(rows, record, index, scales, neuron_bias, down_bias, rest, gated, activation, count, batch_invariant)
    chosen = dispatch.choose(problem, backend)
    return chosen.backend.run(call, chosen.config).view(x.shape)


def _fake(x: Tensor, *args: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _gradients(op: Any, others: int, twin: Callable[..., Tensor], **where: Any) -> None:
    """Register gradients of `op` by differentiating its plain-torch twin.

    Args:
        op: an operator, or its name.
        others: how many arguments follow the tensors.
        twin: takes `(tensors, others)`.
        where: more for `torch.library.register_autograd`.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.others = inputs[-others:]
        ctx.save_for_backward(*inputs[:-others])

    def backward(ctx: Any, grad: Tensor) -> tuple[Maybe, ...]:
        tensors = list(ctx.saved_tensors)
        wanted = [i for i, t in enumerate(tensors) if t is not None and ctx.needs_input_grad[i]]
        twice = torch.is_grad_enabled()  # create_graph=True: these gradients will be differentiated again
        with torch.enable_grad():
            for i in wanted if not twice else ():
                tensors[i] = tensors[i].detach().requires_grad_()
            out = twin(tensors, ctx.others)
            found = torch.autograd.grad(out, [tensors[i] for i in wanted], grad, create_graph=twice)
        grads: list[Maybe] = [None] * (len(tensors) + others)
        for i, g in zip(wanted, found, strict=True):
            grads[i] = g
        return tuple(grads)

    torch.library.register_autograd(op, backward, setup_context=save, **where)


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
    twin, at = TWINS[gated, gather], 3 if gather else 2  # where scales stand

    def run_twin(tensors: Sequence[Any], others: Sequence[Any]) -> Tensor:
        return twin(*tensors[:at], *tensors[at + 1 :], scales=tensors[at], activation=others[0])

    _gradients(name, 2, run_twin)
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


# The FFN operators for inference: without autograd, and with operands that the caller has checked. `ffn` has kernels
# in the native libraries, one for a CPU and one for CUDA, which take the call where `backend` is their own, or "auto"
# and tokens are no more than `native_tokens` (see `dispatch.native_tokens`), and hand all others to `ffn_by_dispatch`.
# Without these libraries `ffn` is `ffn_by_dispatch`.
FFN_BY_DISPATCH = _define("ffn_by_dispatch", f"{_OPERANDS}) -> Tensor", _run)
FFN = _define("ffn", f"{_OPERANDS}, int native_tokens) -> Tensor", _ffn)


_RUN: Callable[..., Tensor] = _run


def _invariant(*operands: Any) -> Tensor:
    return _RUN(*operands, None, True)


def _invariant_twin(tensors: Sequence[Any], others: Sequence[Any]) -> Tensor:
    x, record, index, scales, *rest = tensors
    gated, activation, _ = others
    head = (x, record) if index is None else (x, record, index)
    return TWINS[gated, index is not None](*head, *rest, scales=scales, activation=activation)


# All four forms, such that a row of the result does not depend, to the bit, on the rows beside it.
FFN_BATCH_INVARIANT = _define("ffn_batch_invariant", f"{_OPERANDS}) -> Tensor", _invariant)
_gradients("pyprune::ffn_batch_invariant", 3, _invariant_twin, lib=_LIBRARY)


def _contextual(x: Tensor, record: Tensor, index: Tensor, count: Tensor, *rest: Any) -> Tensor:
    return _RUN(x, record, index, *rest, count)


def _contextual_twin(tensors: Sequence[Any], others: Sequence[Any]) -> Tensor:
    x, record, index, count, scales, neuron_bias, down_bias, residual = tensors
    gated, activation, _ = others
    operands = (x, record, index, count, neuron_bias, down_bias, residual)
    return reference.contextual_ffn(*operands, scales=scales, gated=gated, activation=activation)


# The gather forms with a count that only the device knows; index `[K]` and count `[1]`, or `[M, K]` and `[M]`.
CONTEXTUAL_FFN = _define(
    "contextual_ffn", _OPERANDS.replace("Tensor? index", "Tensor index, Tensor count") + ") -> Tensor", _contextual
)
_gradients("pyprune::contextual_ffn", 3, _contextual_twin, lib=_LIBRARY)
