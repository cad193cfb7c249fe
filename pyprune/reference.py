"""The FFN operators in plain PyTorch: the truth for tests and benches, the twin of every kernel.

Layout, shared by every backend (see `PrunedMLP`):

    record       [F, P*D]   one row per neuron: [up | down] (P = 2) or [gate | up | down] (P = 3)
    neuron_bias  [F, P-1]   bias of (up) or (gate, up), or None
    down_bias    [D]        or None
    index        [K] int32  the kept neurons, sorted and unique, or None for all of them

Every function computes in the dtype of `x` and rounds where Transformers' own FFN modules round.
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


def _project_down(a: Tensor, down: Tensor, down_bias: Tensor | None, residual: Tensor | None) -> Tensor:
    out = F.linear(a, down.t(), down_bias)
    return out if residual is None else out + residual


def plain_ffn(
    x: Tensor,
    record: Tensor,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str,
) -> Tensor:
    """`down(act(up(x)))`, plus `residual` if given.

    Args:
        x: `[..., D]`.
        record: `[F, 2*D]`, rows `[up | down]`.
        neuron_bias: `[F, 1]` or None.
        down_bias: `[D]` or None.
        residual: same shape as `x`, or None.
        activation: a key of `ACTIVATIONS`.

    Returns:
        `[..., D]` in the dtype of `x`.
    """
    d = x.shape[-1]
    hidden = ACTIVATIONS[activation](F.linear(x, record[:, :d], _column(neuron_bias, 0)))
    return _project_down(hidden, record[:, d:], down_bias, residual)


def gated_ffn(
    x: Tensor,
    record: Tensor,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str,
) -> Tensor:
    """`down(act(gate(x)) * up(x))`, plus `residual` if given.

    Args:
        x: `[..., D]`.
        record: `[F, 3*D]`, rows `[gate | up | down]`.
        neuron_bias: `[F, 2]`, columns (gate, up), or None.
        down_bias: `[D]` or None.
        residual: same shape as `x`, or None.
        activation: a key of `ACTIVATIONS`.

    Returns:
        `[..., D]` in the dtype of `x`.
    """
    d = x.shape[-1]
    gate = ACTIVATIONS[activation](F.linear(x, record[:, :d], _column(neuron_bias, 0)))
    hidden = gate * F.linear(x, record[:, d : 2 * d], _column(neuron_bias, 1))
    return _project_down(hidden, record[:, 2 * d :], down_bias, residual)


def plain_ffn_gather(
    x: Tensor,
    record: Tensor,
    index: Tensor,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str,
) -> Tensor:
    """`plain_ffn` over the rows `index` (`[K]`, int32) of `record`."""
    bias = None if neuron_bias is None else neuron_bias.index_select(0, index)
    return plain_ffn(x, record.index_select(0, index), bias, down_bias, residual, activation=activation)


def gated_ffn_gather(
    x: Tensor,
    record: Tensor,
    index: Tensor,
    neuron_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str,
) -> Tensor:
    """`gated_ffn` over the rows `index` (`[K]`, int32) of `record`."""
    bias = None if neuron_bias is None else neuron_bias.index_select(0, index)
    return gated_ffn(x, record.index_select(0, index), bias, down_bias, residual, activation=activation)
