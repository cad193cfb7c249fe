"""The FFN operators in plain PyTorch: the truth for tests and benches, the twin of every kernel.

Layout, shared by every backend (see `PrunedMLP`):

    record       [F, P*D]   one row per neuron: [up | down] (P = 2) or [gate | up | down] (P = 3)
    scales       [F, P]     float32, with an int8 record only: weight = record * scale
    neuron_bias  [F, P-1]   bias of (up) or (gate, up), or None
    down_bias    [D]        or None
    index        [K] int32  the kept neurons, sorted and unique, or None for all of them

Biases and residual have the dtype of `x`, and so has the result. Every function computes in the dtype to which torch
promotes those of `x` and `record`, and rounds where Transformers' own FFN modules round. An int8 record is computed in
the dtype of `x`, which holds its integers exactly; beside float16 in float32, for sums of such integers pass 65504.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def _column(matrix: Tensor | None, i: int) -> Tensor | None:
    return None if matrix is None else matrix[:, i]


def _rows(matrix: Tensor | None, index: Tensor) -> Tensor | None:
    return None if matrix is None else matrix.index_select(0, index)


def _compute_dtype(x: Tensor, record: Tensor) -> torch.dtype:
    if record.dtype == torch.int8:
        return torch.float32 if x.dtype == torch.float16 else x.dtype
    return torch.promote_types(x.dtype, record.dtype)


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def _project(x: Tensor, part: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    part = part.to(x.dtype)
    if scale is None:
        return F.linear(x, part, bias)
    product = F.linear(x, part) * scale  # float32 scales: rounded once, after the bias
    return (product if bias is None else product + bias).to(x.dtype)


def _project_down(
    a: Tensor, down: Tensor, scale: Tensor | None, down_bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    if scale is not None:
        a = (a * scale).to(a.dtype)
    out = F.linear(a, down.to(a.dtype).t(), down_bias)
    return out if residual is None else out + residual


def plain_ffn(
    x: Tensor,
    record: Tensor,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    activation: str,
) -> Tensor:
    """`down(act(up(x)))`, plus `residual` if given.

    Args:
        x: `[..., D]`.
        record: `[F, 2*D]`, rows `[up | down]`.
        neuron_bias: `[F, 1]` or None.
        down_bias: `[D]` or None.
        residual: same shape as `x`, or None.
        scales: `[F, 2]` float32 with an int8 record, else None.
        activation: a key of `ACTIVATIONS`.

    Returns:
        `[..., D]` in the dtype of `x`.
    """
    d = x.shape[-1]
    dtype = _compute_dtype(x, record)
    a = x.to(dtype)
    neuron_bias, down_bias, residual = _cast(dtype, neuron_bias, down_bias, residual)
    hidden = ACTIVATIONS[activation](_project(a, record[:, :d], _column(scales, 0), _column(neuron_bias, 0)))
    return _project_down(hidden, record[:, d:], _column(scales, 1), down_bias, residual).to(x.dtype)


def gated_ffn(
    x: Tensor,
    record: Tensor,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    activation: str,
) -> Tensor:
    """`down(act(gate(x)) * up(x))`, plus `residual` if given.

    Args:
        x: `[..., D]`.
        record: `[F, 3*D]`, rows `[gate | up | down]`.
        neuron_bias: `[F, 2]`, columns (gate, up), or None.
        down_bias: `[D]` or None.
        residual: same shape as `x`, or None.
        scales: `[F, 3]` float32 with an int8 record, else None.
        activation: a key of `ACTIVATIONS`.

    Returns:
        `[..., D]` in the dtype of `x`.
    """
    d = x.shape[-1]
    dtype = _compute_dtype(x, record)
    a = x.to(dtype)
    neuron_bias, down_bias, residual = _cast(dtype, neuron_bias, down_bias, residual)
    gate = ACTIVATIONS[activation](_project(a, record[:, :d], _column(scales, 0), _column(neuron_bias, 0)))
    hidden = gate * _project(a, record[:, d : 2 * d], _column(scales, 1), _column(neuron_bias, 1))
    return _project_down(hidden, record[:, 2 * d :], _column(scales, 2), down_bias, residual).to(x.dtype)


def plain_ffn_gather(
    x: Tensor,
    record: Tensor,
    index: Tensor,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    activation: str,
) -> Tensor:
    """`plain_ffn` over the rows `index` (`[K]`, int32) of `record`, `scales` and `neuron_bias`."""
    kept, bias, kept_scales = record.index_select(0, index), _rows(neuron_bias, index), _rows(scales, index)
    return plain_ffn(x, kept, bias, down_bias, residual, scales=kept_scales, activation=activation)


def gated_ffn_gather(
    x: Tensor,
    record: Tensor,
    index: Tensor,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    activation: str,
) -> Tensor:
    """`gated_ffn` over the rows `index` (`[K]`, int32) of `record`, `scales` and `neuron_bias`."""
    kept, bias, kept_scales = record.index_select(0, index), _rows(neuron_bias, index), _rows(scales, index)
    return gated_ffn(x, kept, bias, down_bias, residual, scales=kept_scales, activation=activation)


def _used(matrix: Tensor | None, rows: Tensor, live: Tensor) -> Tensor | None:
    """Rows of a matrix; those that are not live are zeros."""
    if matrix is None:
        return None
    taken = matrix.index_select(0, rows)
    return torch.where(live[:, None], taken, torch.zeros((), dtype=taken.dtype, device=taken.device))


def _contextual_rows(
    x: Tensor,
    record: Tensor,
    index: Tensor,
    count: Tensor,
    neuron_bias: Tensor | None,
    down_bias: Tensor | None,
    residual: Tensor | None,
    scales: Tensor | None,
    gated: bool,
    activation: str,
) -> Tensor:
    """One list of neurons for all rows of x. A neuron of zeros adds nothing, for every activation of 0 is 0."""
    index = index[: index.shape[0] if record.shape[0] else 0]  # of a record without rows nothing can be used
    live = torch.arange(index.shape[0], device=index.device) < count
    rows = torch.where(live, index, 0)
    used = record.new_empty(0, record.shape[1]) if not index.shape[0] else _used(record, rows, live)
    assert used is not None
    bias, used_scales = _used(neuron_bias, rows, live), _used(scales, rows, live)
    run = gated_ffn if gated else plain_ffn
    return run(x, used, bias, down_bias, residual, scales=used_scales, activation=activation)


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
) -> Tensor:
    """`gated_ffn` or `plain_ffn` over the first `count` neurons of `index`, a number that only the device knows.

    Nothing waits for the device: all K rows are taken, and those from `count` on are zeros.

    Args:
        x: `[..., D]`.
        record: `[F, P*D]`, as `gated_ffn` or `plain_ffn` take it.
        index: int32 `[K]`, one list for all tokens, or `[M, K]`, one for each of the M tokens in x. Entries from
            `count` on may hold anything.
        count: int32 `[1]`, or `[M]` with one list a token; no more than K counts.
        neuron_bias, down_bias, residual, scales, activation: as `gated_ffn` or `plain_ffn` take them.
        gated: P = 3 if true, else 2.

    Returns:
        `[..., D]` in the dtype of `x`.
    """
    rest = (scales, gated, activation)
    if index.ndim == 1:
        return _contextual_rows(x, record, index, count, neuron_bias, down_bias, residual, *rest)
    d = x.shape[-1]
    tokens = x.reshape(-1, d).split(1)
    residuals = [None] * len(tokens) if residual is None else residual.reshape(-1, d).split(1)
    if not x.numel():
        return x.clone()
    outs = [
        _contextual_rows(token, record, index[m], count[m : m + 1], neuron_bias, down_bias, residuals[m], *rest)
        for m, token in enumerate(tokens)
    ]
    return torch.cat(outs).view(x.shape)
