"""The FFN in plain PyTorch: the truth for tests and benches, the twin of every kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import int4
from .activations import ACTIVATIONS as ACTIVATIONS
from .record import Record


def compute_dtype(x: Tensor, rows: Tensor) -> torch.dtype:
    """What `ffn` computes in."""
    if rows.dtype in (torch.int8, torch.uint8):
        return torch.float32 if x.dtype == torch.float16 else x.dtype
    return torch.promote_types(x.dtype, rows.dtype)


def _column(matrix: Tensor | None, i: int) -> Tensor | None:
    return None if matrix is None else matrix[:, i]


def _project(x: Tensor, part: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    part = part.to(x.dtype)
    if scale is None:
        return F.linear(x, part, bias)
    product = F.linear(x, part) * scale  # float32 scales: rounded once, after the bias
    return (product if bias is None else product + bias).to(x.dtype)


def ffn(x: Tensor, record: Record) -> Tensor:
    """`down(act(up(x)))`, gated `down(act(gate(x)) * up(x))`, over the rows that `record.index` names.

    Computed in the dtype to which torch promotes those of x and the rows, and rounded where Transformers' own FFN
    modules round. Int8 rows are computed in the dtype of x, which holds their integers exactly; beside float16 in
    float32, for sums of such integers pass 65504. Int4 rows are written out in that dtype.

    Args:
        x: `[..., D]`.
        record: the FFN.

    Returns:
        `[..., D]` in the dtype of `x`.
    """
    rows, scales, neuron_bias, down_bias = record.rows, record.scales, record.neuron_bias, record.down_bias
    if record.index is not None:
        rows = rows.index_select(0, record.index)
        scales = None if scales is None else scales.index_select(0, record.index)
        neuron_bias = None if neuron_bias is None else neuron_bias.index_select(0, record.index)
    act, d, dtype = ACTIVATIONS[record.activation], x.shape[-1], compute_dtype(x, rows)
    a = x.to(dtype)
    if rows.dtype == torch.uint8:
        rows = int4.unpack(rows, record.parts, dtype)
    neuron_bias = None if neuron_bias is None else neuron_bias.to(dtype)
    down_bias = None if down_bias is None else down_bias.to(dtype)
    hidden = act(_project(a, rows[:, :d], _column(scales, 0), _column(neuron_bias, 0)))
    if record.gated:
        hidden = hidden * _project(a, rows[:, d : 2 * d], _column(scales, 1), _column(neuron_bias, 1))
    down = rows[:, (record.parts - 1) * d :]
    if scales is not None:
        hidden = (hidden * scales[:, -1]).to(hidden.dtype)
    return F.linear(hidden, down.to(hidden.dtype).t(), down_bias).to(x.dtype)
