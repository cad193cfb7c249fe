"""The FFN, and experts, in plain PyTorch: the truth for tests and benches, the twin of every kernel."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from . import int4
from .activations import ACTIVATIONS as ACTIVATIONS
from .experts import Experts
from .record import Record


def compute_dtype(x: Tensor, rows: Tensor) -> torch.dtype:
    """What `ffn` computes in."""
    if rows.dtype in (torch.int8, torch.uint8):
        return torch.float32 if x.dtype == torch.float16 else x.dtype
    return torch.promote_types(x.dtype, rows.dtype)


@functools.cache
def multiplies_half() -> bool:
    """Whether torch has a fast matrix product of float16 on this CPU; its other one is plain loops where weights are
    strided or transposed, a hundred times slower than float32.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)  # not in every build
    return supported is not None and bool(supported())


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype != torch.float16 or x.device.type != "cpu" or multiplies_half():
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _column(matrix: Tensor | None, i: int) -> Tensor | None:
    return None if matrix is None else matrix[:, i]


def _project(x: Tensor, part: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    part = part.to(x.dtype)
    if scale is None:
        return _linear(x, part, bias)
    product = _linear(x, part, None) * scale  # float32 scales: rounded once, after the bias
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
    return _linear(hidden, down.to(hidden.dtype).t(), down_bias).to(x.dtype)


def moe(x: Tensor, experts: Experts, index: Tensor, weights: Tensor) -> Tensor:
    """The sum over k of `weights[t, k] * ffn(x[t], experts.one(index[t, k]))`: a mixture of experts after its router.

    Each expert runs once, on all tokens that name it. What they give is weighted and added in float32 (float64 for
    tokens of that), in the order of the experts, and rounded once.

    Args:
        x: `[T, D]`.
        experts: the records.
        index: `[T, K]` integers in [0, E); experts that nobody names do not run.
        weights: `[T, K]` floating point.

    Returns:
        `[T, D]` in the dtype of `x`.
    """
    dtype, picked = torch.promote_types(x.dtype, torch.float32), index.shape[1]
    named, factors = index.flatten(), weights.flatten().to(dtype)
    order = named.argsort(stable=True)
    counts = torch.bincount(named, minlength=len(experts.rows)).tolist()
    out = x.new_zeros(x.shape, dtype=dtype)
    for expert, pairs in enumerate(order.split(counts)):
        if len(pairs):
            tokens = pairs.div(picked, rounding_mode="floor")
            given = ffn(x[tokens], experts.one(expert)).to(dtype)
            out.index_add_(0, tokens, given * factors[pairs, None])
    return out.to(x.dtype)
