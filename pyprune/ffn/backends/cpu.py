"""The native CPU library, compact and gather: `torch.ops.pyprune.ffn`, whose CPU kernel it brings."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from . import Call, Config, Problem, no_native_kernel, row_by_row

NAME = "cpu"


def why_not(problem: Problem) -> str | None:
    """Why the native kernel cannot run `problem`, in one line, or None."""
    if problem.device != "cpu":
        return f"needs tensors on a CPU, not on {problem.device}"
    if reason := no_native_kernel(problem):
        return reason
    if problem.contextual:
        return "no kernel for a contextual gather"
    return native.load()


def default_config(problem: Problem) -> Config:
    """Nothing to choose: the library sees to its tiles itself."""
    return {}


def candidate_configs(problem: Problem) -> list[Config]:
    """The default alone."""
    return [{}]


def run(call: Call, config: Config | None = None) -> Tensor:
    """Run `call` by the native kernel; batch-invariant row by row, for it chooses its order of sums by their number."""
    return row_by_row(call, _run) if call.batch_invariant else _run(call)


def _run(call: Call) -> Tensor:
    # Without the library, which `why_not` rules out, the operator would come back here.
    out: Tensor = torch.ops.pyprune.ffn.default(
        call.x,
        call.record,
        call.index,
        call.scales,
        call.neuron_bias,
        call.down_bias,
        call.residual,
        call.gated,
        call.activation,
        NAME,
        0,
    )
    return out
