"""The native CPU library, compact and gather: `torch.ops.pyprune.ffn`, whose CPU kernel it brings.

int4 rows have a second way, for many tokens: the library writes out some neurons at a time, which stay in a cache, and
torch multiplies with them (`{"written": True}`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...base import reference
from ...base.record import Record
from .. import native
from . import Config, Problem, no_native_kernel, row_by_row

NAME = "cpu"
# Most tokens for which int4 rows are multiplied as they are, unless measured.
_FEW = 128
# Of neurons that are written out at once, about.
_WRITTEN_BYTES = 4 << 20
_WRITTEN: Config = {"written": True}


def why_not(problem: Problem) -> str | None:
    """Why the native kernel cannot run `problem`, in one line, or None."""
    if problem.device != "cpu":
        return f"needs tensors on a CPU, not on {problem.device}"
    if reason := no_native_kernel(problem):
        return reason
    return native.load()


def default_config(problem: Problem) -> Config:
    """Nothing to choose, for the library sees to its tiles itself; but of int4 rows `written`, for many tokens."""
    return candidate_configs(problem)[0]


def candidate_configs(problem: Problem) -> list[Config]:
    """The default first, and the other of the two ways where there are two."""
    if problem.weights != torch.uint8 or problem.batch_invariant:
        return [{}]
    return [{}, _WRITTEN] if problem.tokens <= _FEW else [_WRITTEN, {}]


def _write_and_multiply(x: Tensor, record: Record) -> Tensor:
    """Some neurons after others, in the dtype that the plain-torch twin computes in; shares are added in float32."""
    rows, index, bias = record.rows, record.index, record.neuron_bias
    dtype, columns = reference.compute_dtype(x, rows), record.parts * record.hidden_size
    a, step = x.to(dtype), max(64, _WRITTEN_BYTES // max(1, columns * dtype.itemsize) // 64 * 64)
    room = torch.empty(min(step, record.kept), columns, dtype=dtype)
    total = torch.zeros(x.shape, dtype=torch.promote_types(dtype, torch.float32))
    for first in range(0, record.kept, step):
        chosen = slice(first, first + step) if index is None else index[first : first + step]
        some, own = rows[chosen], None if bias is None else bias[chosen].to(dtype)
        written = room[: len(some)]
        torch.ops.pyprune.cpu_write_out.default(some, record.parts, written)
        total += reference.ffn(a, Record.unchecked(written, record.gated, record.activation, None, own))
    return (total if record.down_bias is None else total + record.down_bias).to(x.dtype)


def run(x: Tensor, record: Record, config: Config | None = None, batch_invariant: bool = False) -> Tensor:
    """Run by the native kernel; batch-invariant row by row, for it chooses its order of sums by their number."""
    if batch_invariant:
        return row_by_row(x, lambda row: run(row, record, {}))
    if config is None and record.rows.dtype == torch.uint8:
        config = _WRITTEN if len(x) > _FEW else {}
    if config:
        return _write_and_multiply(x, record)
    # Without the library, which `why_not` rules out, the operator would come back here.
    out: Tensor = torch.ops.pyprune.ffn.default(
        x,
        record.rows,
        record.index,
        record.scales,
        record.neuron_bias,
        record.down_bias,
        record.gated,
        record.activation,
        NAME,
        0,
        False,
    )
    return out
