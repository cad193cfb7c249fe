"""The native CPU library, compact and gather: `torch.ops.pyprune.ffn`, whose CPU kernel it brings."""

from __future__ import annotations

import torch
from torch import Tensor

from ...base.record import Record
from .. import native
from . import Config, Problem, no_native_kernel, row_by_row

NAME = "cpu"


def why_not(problem: Problem) -> str | None:
    """Why the native kernel cannot run `problem`, in one line, or None."""
    if problem.device != "cpu":
        return f"needs tensors on a CPU, not on {problem.device}"
    if reason := no_native_kernel(problem):
        return reason
    return native.load()


def default_config(problem: Problem) -> Config:
    """Nothing to choose: the library sees to its tiles itself."""
    return {}


def candidate_configs(problem: Problem) -> list[Config]:
    """The default alone."""
    return [{}]


def run(x: Tensor, record: Record, config: Config | None = None, batch_invariant: bool = False) -> Tensor:
    """Run by the native kernel; batch-invariant row by row, for it chooses its order of sums by their number."""
    if batch_invariant:
        return row_by_row(x, lambda row: run(row, record))
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
