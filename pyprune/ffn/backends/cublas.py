"""Many tokens through cuBLAS: matrix products over slices of the record, without a second copy of the weights.

A part of a neuron-major record is a matrix whose rows are P*D apart, which cuBLAS takes as it is. A gather takes the
kept rows from `scratch`, which copies them once for each mask.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base import reference
from ...base.record import Record
from .. import scratch
from . import Config, Problem

NAME = "cublas"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Activations that cuBLAS can apply to a product before it is written, on values not rounded yet. Its GELU is the tanh
# form.
_EPILOGUES = ("gelu_tanh", "relu")
# Most tokens whose gate and up are one batched product.
_FEW = 64
_ActMul = Callable[..., Tensor]


def why_not(problem: Problem) -> str | None:
    """Why cuBLAS cannot run `problem`, in one line, or None."""
    if problem.device != "cuda":
        return f"needs tensors on a CUDA device, not on {problem.device}"
    if problem.dtype not in _DTYPES:
        return f"no products for {problem.dtype}"
    if problem.weights not in (None, problem.dtype):
        return f"no products of {problem.weights} weights with x of {problem.dtype}"
    if problem.batch_invariant:
        return "cuBLAS chooses its order of sums by the number of tokens"
    return None


def default_config(problem: Problem) -> Config:
    """`products`: gate and up as `two`, or `one` batched; plain: `epilogue`, activation within the product or after."""
    return candidate_configs(problem)[0]


def candidate_configs(problem: Problem) -> list[Config]:
    """Every way there is, the default first."""
    if problem.gated:
        own = _products(problem.tokens)
        return [{"products": own}, {"products": "two" if own == "one" else "one"}]
    if problem.activation in _EPILOGUES:
        return [{"epilogue": True}, {"epilogue": False}]
    return [{"epilogue": False}]


def _products(tokens: int) -> str:
    """Of gate and up. Measured on an H200: one launch less shows while the weights' bytes are the bound."""
    return "one" if tokens <= _FEW else "two"


@functools.cache
def _triton_act_mul(device: str) -> _ActMul | None:
    """The fused kernel, where Triton runs."""
    try:
        kernels = importlib.import_module("pyprune.triton_kernels")
    except ImportError:
        return None
    if kernels.why_unavailable(device) is not None:
        return None
    act_mul: _ActMul = kernels.act_mul
    return act_mul


def _act_mul(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """`act(gate) * up`, or `act(gate)`, into `gate` where that can be."""
    fused = _triton_act_mul(gate.device.type) if gate.is_cuda else None
    if fused is not None:
        return fused(gate, up, activation, out=gate)
    hidden = reference.ACTIVATIONS[activation](gate)
    return hidden if up is None else hidden.mul_(up)


def _plain(x: Tensor, up: Tensor, bias: Tensor | None, activation: str, epilogue: bool) -> Tensor:
    # On a CPU, where tests run this, the same operator's GELU is the exact one.
    within = epilogue and bias is not None and (x.is_cuda or activation == "relu")
    if within and bias is not None:
        return torch._addmm_activation(bias[:, 0].contiguous(), x, up.t(), use_gelu=activation == "gelu_tanh")
    return _act_mul(F.linear(x, up, None if bias is None else bias[:, 0]), None, activation)


def _gated(x: Tensor, both: Tensor, bias: Tensor | None, activation: str, batched: bool) -> Tensor:
    d = x.shape[1]
    if batched:
        # [2, D, F]: two matrices that interleave in memory.
        weights = both.unflatten(1, (2, d)).permute(1, 2, 0)
        gate, up = torch.bmm(x.expand(2, -1, -1), weights).unbind(0)
        if bias is not None:
            gate, up = gate + bias[:, 0], up + bias[:, 1]
    else:
        columns = (None, None) if bias is None else bias.t().contiguous().unbind(0)
        gate, up = (F.linear(x, part, column) for part, column in zip(both.split(d, 1), columns, strict=True))
    return _act_mul(gate, up, activation)


def run(x: Tensor, record: Record, config: Config | None = None, batch_invariant: bool = False) -> Tensor:
    """The product or products in, the activation, the product down."""
    rows, bias, activation, d = record.rows, record.neuron_bias, record.activation, x.shape[1]
    if record.index is not None:
        rows = scratch.compacted(rows, record.index)
        bias = None if bias is None else scratch.compacted(bias, record.index)
    if record.gated:
        batched = (_products(len(x)) if config is None else config["products"]) == "one"
        hidden = _gated(x, rows[:, : 2 * d], bias, activation, batched)
    else:
        epilogue = activation in _EPILOGUES if config is None else bool(config["epilogue"])
        hidden = _plain(x, rows[:, :d], bias, activation, epilogue)
    down = rows[:, -d:] if d else rows[:, :0]
    return hidden @ down if record.down_bias is None else torch.addmm(record.down_bias, hidden, down)
