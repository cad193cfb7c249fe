"""The registered operators, `torch.ops.pyprune.*`: schema, fake implementation, autograd formula, and the way to a
backend. Nobody checks their operands here: see `ops.ffn`, which does.

    ffn               for inference. It has kernels in the native libraries, one for a CPU and one for CUDA, which take
                      the call where `backend` is their own, or "auto" and tokens are no more than `native_tokens` (see
                      `dispatch.native_tokens`), and hand all others on.
    ffn_by_dispatch   what Python's dispatch chooses, with autograd. Without the libraries `ffn` does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..base import reference
from ..base.errors import BackendError
from ..base.record import Record
from . import dispatch
from .backends import Problem

_SCHEMA = (
    "(Tensor x, Tensor record, Tensor? index, Tensor? scales, Tensor? neuron_bias, Tensor? down_bias, bool gated, "
    "str activation, str backend, int native_tokens, bool batch_invariant) -> Tensor"
)
_TENSORS = 6  # the first arguments
LIBRARY = torch.library.Library("pyprune", "FRAGMENT")


def dual() -> bool:
    """Whether forward-mode derivatives are being taken (`torch.func.jvp`): the operators do not carry them."""
    return forward_ad._current_level >= 0


def check_dual(backend: str, batch_invariant: bool) -> None:
    """Raise `BackendError` where forward-mode derivatives would be lost."""
    if dual() and (backend != "auto" or batch_invariant):
        raise BackendError(
            f"forward-mode derivatives need backend 'auto' without batch_invariant; got {backend!r}, {batch_invariant}"
        )


def _record(tensors: Sequence[Any], form: Sequence[Any]) -> Record:
    """The record of an operator's arguments."""
    _, rows, index, scales, neuron_bias, down_bias = tensors
    return Record.unchecked(rows, form[0], form[1], scales, neuron_bias, down_bias, index)


def _run(*arguments: Any) -> Tensor:
    """Compute by the backend that `dispatch` chooses."""
    x: Tensor = arguments[0]
    record = _record(arguments[:_TENSORS], arguments[_TENSORS:])
    backend, _, batch_invariant = arguments[-3:]
    rows = x.reshape(-1, x.shape[-1])
    problem = Problem.of(record, x.dtype, rows.shape[0], batch_invariant)
    chosen = dispatch.choose(problem, backend)
    return chosen.backend.run(rows, record, chosen.config, batch_invariant).view(x.shape)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.form = inputs[_TENSORS:]
    ctx.save_for_backward(*inputs[:_TENSORS])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """By differentiating the plain-torch twin."""
    tensors = list(ctx.saved_tensors)
    wanted = [i for i, t in enumerate(tensors) if t is not None and ctx.needs_input_grad[i]]
    twice = torch.is_grad_enabled()  # create_graph=True: these gradients will be differentiated again
    with torch.enable_grad():
        for i in wanted if not twice else ():
            tensors[i] = tensors[i].detach().requires_grad_()
        out = reference.ffn(tensors[0], _record(tensors, ctx.form))
        found = torch.autograd.grad(out, [tensors[i] for i in wanted], grad, create_graph=twice)
    grads: list[Tensor | None] = [None] * (_TENSORS + len(ctx.form))
    for i, g in zip(wanted, found, strict=True):
        grads[i] = g
    return tuple(grads)


def _define(name: str) -> Callable[..., Tensor]:
    """Define `pyprune::name` for every device; not by `custom_op`, whose calls cost 8 us more."""
    LIBRARY.define(name + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyprune::{name}", _fake, lib=LIBRARY)
    op: Callable[..., Tensor] = getattr(torch.ops.pyprune, name).default
    return op


FFN_BY_DISPATCH = _define("ffn_by_dispatch")
torch.library.register_autograd("pyprune::ffn_by_dispatch", _backward, setup_context=_save, lib=LIBRARY)
FFN = _define("ffn")


def arguments(
    x: Tensor, record: Record, backend: str, native_tokens: int = 0, batch_invariant: bool = False
) -> tuple[Any, ...]:
    """What the operators take."""
    return (
        x,
        record.rows,
        record.index,
        record.scales,
        record.neuron_bias,
        record.down_bias,
        record.gated,
        record.activation,
        backend,
        native_tokens,
        batch_invariant,
    )
