"""Triton kernels, compact and gather, and of experts, on CUDA devices (and in Triton's interpreter, for tests)."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...base.errors import BackendError
from ...base.experts import Experts
from ...base.record import Record
from . import Config, Problem

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


def _package() -> ModuleType:
    kernels = _kernels()
    if isinstance(kernels, str):
        raise BackendError(kernels)
    return kernels


def why_no_kernel(device: str, dtype: torch.dtype, weights: torch.dtype | None) -> str | None:
    """Why the Triton kernels cannot run x of `dtype` beside `weights` (None: the same), in one line, or None."""
    kernels = _kernels()
    if isinstance(kernels, str):
        return kernels
    if dtype not in _DTYPES:
        return f"no kernel for {dtype}"
    if weights not in (None, dtype, torch.int8):
        return f"no kernel for {weights} weights beside x of {dtype}"
    reason: str | None = kernels.why_unavailable(device)
    if reason is None and weights == torch.int8:
        reason = kernels.why_no_int8(dtype, device)
    return reason


def why_not(problem: Problem) -> str | None:
    """Why the Triton kernels cannot run `problem`, in one line, or None."""
    return why_no_kernel(problem.device, problem.dtype, problem.weights)


def _sizes(problem: Problem) -> tuple[Any, ...]:
    """Arguments of the package's choices. Records are taken to be aligned where their width allows it."""
    return (
        problem.tokens,
        problem.kept,
        problem.hidden_size,
        problem.dtype,
        problem.gated,
        problem.gather,
        problem.hidden_size % 16 == 0,
    )


def default_config(problem: Problem) -> Config:
    """The analytic configuration: `kind` is "decode" (a single pass) or "prefill" (two matrix products), and sizes."""
    kernels = _package()
    int8 = problem.weights == torch.int8
    place = kernels.architecture(torch.device(problem.device))
    chosen = kernels.default_config(
        *_sizes(problem), batch_invariant=problem.batch_invariant, int8=int8, architecture=place
    )
    made: Config = kernels.to_json(chosen)
    return made


def candidate_configs(problem: Problem) -> list[Config]:
    """At most 12 configurations, all compiled in tests without spills; batch-invariant problems have one."""
    kernels = _package()
    found = kernels.candidates(
        *_sizes(problem),
        batch_invariant=problem.batch_invariant,
        int8=problem.weights == torch.int8,
        architecture=kernels.architecture(torch.device(problem.device)),
    )
    return [kernels.to_json(config) for config in found]


@functools.lru_cache(maxsize=1024)
def _parsed(items: tuple[tuple[str, int | str | bool], ...]) -> Any:
    return _package().from_json(dict(items))


def run(x: Tensor, record: Record, config: Config | None = None, batch_invariant: bool = False) -> Tensor:
    """Run by `config`, or by the analytic one for this number of tokens.

    Raises:
        ValueError: `config` has an unknown, missing or wrong key, or cannot run the call.
    """
    out: Tensor = _package().ffn(
        x,
        record.rows,
        gated=record.gated,
        activation=record.activation,
        neuron_bias=record.neuron_bias,
        down_bias=record.down_bias,
        index=record.index,
        scales=record.scales,
        config=None if config is None else _parsed(tuple(config.items())),
        batch_invariant=batch_invariant,
    )
    return out


def expert_configs(problem: Problem) -> list[Config]:
    """Configurations of a mixture's experts that are offered for timing, the analytic one first."""
    kernels = _package()
    sizes = (problem.tokens, problem.picked, problem.experts, problem.kept, problem.hidden_size, problem.dtype)
    if problem.weights not in (None, problem.dtype):
        place, aligned = kernels.architecture(torch.device(problem.device)), problem.hidden_size % 16 == 0
        gather = {"int8": True, "architecture": place, "gather": problem.gather}
        return [kernels.to_json(kernels.experts_config(*sizes, problem.gated, aligned, **gather))]
    form = (problem.gated, problem.hidden_size % 16 == 0, kernels.architecture(torch.device(problem.device)))
    return [kernels.to_json(config) for config in kernels.experts_candidates(*sizes, *form, problem.gather)]


def run_experts(
    x: Tensor,
    experts: Experts,
    index: Tensor,
    weights: Tensor,
    config: Config | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """`reference.moe` by the kernels, which wait for nothing: a token whose index names no expert becomes NaN."""
    out: Tensor = _package().moe(
        x,
        experts.rows,
        index,
        weights,
        gated=experts.gated,
        activation=experts.activation,
        scales=experts.scales,
        kept=experts.index,
        counts=experts.counts,
        config=None if config is None else _parsed(tuple(config.items())),
        batch_invariant=batch_invariant,
    )
    return out
