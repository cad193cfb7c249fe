"""Runs the FFNs of a model before they are needed, so that nothing compiles, is chosen or is copied later."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import check
from . import dispatch
from .backends import Problem
from .mlp import PrunedMLP
from .moe import PrunedMoE
from .sharded import ShardedMLP


@dataclass(frozen=True)
class Warmed:
    """One problem that was run.

    Attributes:
        layer: name of the first module that has this problem.
        problem: what was computed.
        backend: who does, and from now on will.
        seconds: of the first call, with all that it had to prepare.
    """

    layer: str
    problem: Problem
    backend: str
    seconds: float


def _problem(module: PrunedMLP, tokens: int) -> Problem:
    return Problem.of(module.running, module.dtype, tokens, module.batch_invariant)


def _distinct(name: str, module: PrunedMLP, tokens: int) -> tuple[Any, ...]:
    """What two modules must share for one to prepare all that the other needs."""
    # Kernels are compiled for which operands there are. What is kept of a gather belongs to its own weights.
    operands = (module.neuron_bias is None, module.down_bias is None, module.record.device)
    # Processes that add up their shares must all make the same calls, whatever widths each has.
    alone = module.index is not None or isinstance(module, ShardedMLP)
    return (_problem(module, tokens), module.backend, operands, name if alone else None)


@torch.no_grad()
def warmup(model: nn.Module, tokens: Sequence[int] = (1, 512)) -> list[Warmed]:
    """Run every distinct problem of the model's `PrunedMLP`s once for each number of tokens, and experts on a GPU.

    Kernels are compiled, choices made, and rows of a gather copied where a backend keeps them. Do this before a CUDA
    graph is captured, on the stream and with the numbers of tokens that it will have, and before latency is measured.

    Args:
        model: a model that `accelerate` changed, or a single `PrunedMLP`.
        tokens: how many at once; a prompt of 512 tokens in two sequences is 1024.

    Returns:
        What was run of `PrunedMLP`s, in order.

    Raises:
        InputError: no `PrunedMLP` in the model, or a number of tokens below 1.
        BackendError: a forced backend cannot run a problem.
    """
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, PrunedMLP)]
    experts = [module for module in model.modules() if isinstance(module, PrunedMoE)]
    known = bool(modules) or bool(experts)
    check(known, "model", "have a PrunedMLP; call pyprune.accelerate first", type(model).__name__)
    check(len(tokens) > 0 and min(tokens) >= 1, "tokens", "be one or more numbers of at least 1", tuple(tokens))
    done: dict[tuple[Any, ...], Warmed] = {}
    for number in dict.fromkeys(tokens):
        for name, module in modules:
            distinct = _distinct(name, module, number)
            if distinct in done:
                continue
            problem = _problem(module, number)
            x = torch.zeros(number, module.hidden_size, dtype=module.dtype, device=module.record.device)
            start = time.perf_counter()
            _finish(module(x))
            seconds = time.perf_counter() - start
            backend = dispatch.choose(problem, module.backend).backend.NAME
            done[distinct] = Warmed(name, problem, backend, seconds)
        _run_experts(experts, number)
    return list(done.values())


def _run_experts(modules: Sequence[PrunedMoE], tokens: int) -> None:
    """Run those that have kernels to compile, one of each form."""
    seen = set()
    for module in modules:
        record = module.record
        gather = None if module.index is None else module.index.shape
        form = (record.shape, gather, record.dtype, record.device, module.dtype, module.activation, module.backend)
        if record.is_cuda and (form, module.batch_invariant) not in seen:
            seen.add((form, module.batch_invariant))
            x = torch.zeros(tokens, module.hidden_size, dtype=module.dtype, device=record.device)
            index = torch.arange(module.picked, device=record.device).expand(tokens, -1)
            _finish(module(x, index, torch.ones(index.shape, dtype=module.dtype, device=record.device)))


def _finish(out: Tensor) -> None:
    if out.is_cuda:
        torch.cuda.synchronize(out.device)
