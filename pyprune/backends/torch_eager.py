"""Plain PyTorch over slices of the record: runs everything, everywhere."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from . import Call, Problem

NAME = "torch"


def why_not(problem: Problem) -> str | None:
    """Always None: PyTorch runs every problem."""
    return None


def run(call: Call) -> Tensor:
    """Run `call` by the reference operators."""
    rest = (call.neuron_bias, call.down_bias, call.residual)
    if call.index is None:
        compact = reference.gated_ffn if call.gated else reference.plain_ffn
        return compact(call.x, call.record, *rest, scales=call.scales, activation=call.activation)
    gather = reference.gated_ffn_gather if call.gated else reference.plain_ffn_gather
    return gather(call.x, call.record, call.index, *rest, scales=call.scales, activation=call.activation)
