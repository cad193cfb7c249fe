"""Ways to run the experts of a case: PrunedMoE by its backends and configurations, and Transformers' own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu.expert_cases import Case
from bench.gpu.timing import Call
from bench.mixtures import OTHERS, OWN, Shape

FEW = 16  # most tokens for the CUDA kernels, which many would read the weights again
COPYING = 16  # most tokens for batched_mm, which copies the weights of every pair


def transformers_ways(case: Case) -> Iterator[tuple[str, list[Call], bool]]:
    """Name, calls and whether a graph may hold them, of Transformers' implementations over the case's weights."""
    own, prefix = case.layers.own, "" if case.layers.keep == 1 else "pruned "
    for name in (OWN, *OTHERS):
        if name == "batched_mm" and case.tokens > COPYING:
            continue

        def run(i: int, x: Tensor, index: Tensor, weights: Tensor, name: str = name) -> Tensor:
            module = own[i % len(own)]
            module.config._experts_implementation = name
            out: Tensor = module(x, index, weights)
            return out

        yield prefix + name, case.routings.calls(run), name != "eager"


def our_ways(case: Case) -> Iterator[tuple[str, list[Call], bool]]:
    """The same of PrunedMoE."""
    cuda = ("cuda",) if case.routings.x[0].is_cuda and case.tokens <= FEW else ()
    for name in ("triton", "torch", *cuda, *(f"{own} gather" for own in ("triton", *cuda) if case.layers.gathers)):

        def run(i: int, x: Tensor, index: Tensor, weights: Tensor, name: str = name) -> Tensor:
            records = case.layers.gathers if name.endswith("gather") else case.layers.records
            module = records[i % len(records)]
            module.backend = name.partition(" ")[0]
            out: Tensor = module(x, index, weights)
            return out

        yield name, case.routings.calls(run), name != "torch"


def candidates(shape: Shape, keep: float, tokens: int, device: torch.device) -> list[Any]:
    """Configurations of the kernels, the analytic one first."""
    from pyprune import triton_kernels as kernels

    width = round(keep * shape.intermediate_size)
    sizes = (tokens, shape.picked, shape.experts, width, shape.hidden_size)
    place = kernels.architecture(device)
    found: list[Any] = kernels.experts_candidates(*sizes, torch.bfloat16, True, True, place)
    return found


def by_config(case: Case, config: Any) -> list[Call]:
    """PrunedMoE's kernels by one of their configurations, past the operator."""
    from pyprune import triton_kernels as kernels

    records = [module.experts for module in case.layers.records]

    def run(i: int, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        e = records[i % len(records)]
        out: Tensor = kernels.moe(x, e.rows, index, weights, gated=True, activation=e.activation, config=config)
        return out

    return case.routings.calls(run)
