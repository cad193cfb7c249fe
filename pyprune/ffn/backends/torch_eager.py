"""Plain PyTorch over slices of the record: runs everything, everywhere."""

from __future__ import annotations

from torch import Tensor

from ...base import reference
from . import Call, Config, Problem, row_by_row

NAME = "torch"


def why_not(problem: Problem) -> str | None:
    """Always None: PyTorch runs every problem."""
    return None


def default_config(problem: Problem) -> Config:
    """Nothing to choose."""
    return {}


def candidate_configs(problem: Problem) -> list[Config]:
    """The default alone."""
    return [{}]


def run(call: Call, config: Config | None = None) -> Tensor:
    """Run `call` by the reference operators; batch-invariant row by row, for torch chooses kernels by their number."""
    return row_by_row(call, _run) if call.batch_invariant else _run(call)


def _run(call: Call) -> Tensor:
    rest = (call.neuron_bias, call.down_bias, call.residual)
    if call.index is None:
        compact = reference.gated_ffn if call.gated else reference.plain_ffn
        return compact(call.x, call.record, *rest, scales=call.scales, activation=call.activation)
    if call.count is not None:
        operands = (call.x, call.record, call.index, call.count, *rest)
        return reference.contextual_ffn(*operands, scales=call.scales, gated=call.gated, activation=call.activation)
    gather = reference.gated_ffn_gather if call.gated else reference.plain_ffn_gather
    return gather(call.x, call.record, call.index, *rest, scales=call.scales, activation=call.activation)
