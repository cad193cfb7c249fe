"""Times every way to run a mixture's experts on a GPU, each compared with float64 first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base import reference
from ..base.clock import clock, graphed
from ..base.experts import Experts, ragged
from . import contest, tuned
from .backends import Config, Problem, cuda, triton
from .contest import Candidate, Effort, Tuned
from .moe_operator import kernel_on, why_no_kernel
from .quantisation import cast, widened

_STEPS = 8  # each routed to other experts, so that no cache holds their weights


def _operands(problem: Problem) -> tuple[Experts, list[tuple[Tensor, Tensor, Tensor]]]:
    """Random experts, and x, index and weights of several steps."""
    device, e, f, d = problem.device, problem.experts, problem.intermediate_size, problem.hidden_size
    generator = torch.Generator(device).manual_seed(0)
    parts, dtype = 3 if problem.gated else 2, problem.weights or problem.dtype
    rows = torch.empty(e, f, parts * d, dtype=dtype, device=device)
    scales = torch.empty(e, f, parts, device=device) if dtype == torch.int8 else None
    for expert in range(e):
        own, steps = cast(torch.randn(f, parts * d, generator=generator, device=device).mul_(d**-0.5), parts, dtype)
        rows[expert] = own
        if scales is not None and steps is not None:
            scales[expert] = steps
    kept: tuple[Tensor | None, Tensor | None] = (None, None)
    if problem.gather:
        orders = (torch.randperm(f, generator=generator, device=device) for _ in range(e))
        kept = ragged([order[: problem.kept].sort().values for order in orders], device)
    steps_of = []
    for _ in range(_STEPS):
        x = torch.randn(problem.tokens, d, generator=generator, device=device).to(problem.dtype)
        scores = torch.rand(problem.tokens, e, generator=generator, device=device)
        index = scores.argsort(1)[:, : problem.picked].contiguous()
        steps_of.append((x, index, torch.full(index.shape, 1 / problem.picked, device=device).to(problem.dtype)))
    return Experts(rows, problem.gated, problem.activation, scales, *kept), steps_of


def _ways(problem: Problem) -> list[tuple[str, Config, Callable[..., Tensor]]]:
    """Backend, configuration and function `(x, experts, index, weights)` of all that can run here."""
    offered: tuple[tuple[str, Any, Any], ...] = (
        (triton.NAME, triton.expert_configs, triton.run_experts),
        (cuda.NAME, cuda.expert_configs, cuda.run_experts),
    )
    weights = problem.weights or problem.dtype
    return [
        (name, config, lambda *given, run=run, config=config: run(*given, config))
        for name, configs, run in offered
        if why_no_kernel(problem.device, problem.dtype, weights, name) is None
        for config in configs(problem)
    ]


@torch.no_grad()
def try_all(problem: Problem, check_time: Callable[[], None], effort: Effort | None = None) -> Tuned:
    """As `contest.try_all`, of a problem with experts."""
    experts, steps = _operands(problem)
    whole, *routing = steps[0]
    rows = contest.checked_rows(whole)
    x, index, factors = (given[rows] for given in steps[0])
    exact = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in index.unique().tolist():  # one by one: all of them are large in float64
        tokens, place = (index == expert).nonzero(as_tuple=True)
        given = reference.ffn(x[tokens].double(), widened(experts.one(expert)))
        exact.index_add_(0, tokens, given * factors[tokens, place, None].double())
    error = (reference.moe(x, experts, index, factors).double() - exact).norm()
    allowed = float(2 * error + 1e-6 * exact.norm())
    now, found, refused = clock(problem.device), [], []
    for name, config, run in _ways(problem):
        check_time()
        try:
            own = float((run(whole, experts, *routing)[rows].double() - exact).norm())
            if own <= allowed:

                def calls(run: Callable[..., Tensor] = run) -> None:
                    for a, i, w in steps:
                        run(a, experts, i, w)

                candidate = Candidate(name, config, graphed(calls, x.device), len(steps))
                candidate.run()
                candidate.seconds = candidate.sample(now)[0]
                found.append(candidate)
                continue
            reason = f"error {own:.3g} where {allowed:.3g} is allowed"
        except Exception as problem_of_it:  # whatever a compiler or a launch has against it
            reason = " ".join(f"{type(problem_of_it).__name__}: {problem_of_it}".split())[:300]
        refused.append(f"{name} {dict(config)}: {reason}")
    entries, kernel = tuned.find(problem), kernel_on(problem.device)
    first = next((one for one in found if one.backend == kernel), None)
    before = (entries[0].backend, entries[0].config) if entries else None if first is None else (kernel, first.config)
    return contest.race(problem, before, found, refused, check_time, effort or contest.CAREFUL)
