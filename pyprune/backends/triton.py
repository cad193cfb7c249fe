"""Triton kernels, compact and gather, on CUDA devices (and in Triton's interpreter, for tests)."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from ..errors import BackendError
from . import Call, Problem

NAME = "triton"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def _kernels() -> ModuleType | str:
    """The kernel package, or why it cannot be imported."""
    try:
        triton_kernels = importlib.import_module("pyprune.triton_kernels")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return triton_kernels


def why_not(problem: Problem) -> str | None:
    """Why the Triton kernels cannot run `problem`, in one line, or None."""
    kernels = _kernels()
    if isinstance(kernels, str):
        return kernels
    if problem.dtype not in _DTYPES:
        return f"no kernel for {problem.dtype}"
    if problem.weights not in (None, problem.dtype):
        return f"no kernel for {problem.weights} weights beside x of {problem.dtype}"
    reason: str | None = kernels.why_unavailable(problem.device)
    return reason


def run(call: Call) -> Tensor:
    """Run `call` by the kernel for its number of tokens."""
    kernels = _kernels()
    if isinstance(kernels, str):
        raise BackendError(kernels)
    out: Tensor = kernels.ffn(
        call.x,
        call.record,
        gated=call.gated,
        activation=call.activation,
        neuron_bias=call.neuron_bias,
        down_bias=call.down_bias,
        residual=call.residual,
        index=call.index,
    )
    return out
