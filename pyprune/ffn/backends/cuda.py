"""The native CUDA kernels, compact and gather: `torch.ops.pyprune.ffn_cuda`, and `moe_cuda` of experts.

A configuration is a plan of `csrc/cuda/plan.h`, of experts one of `experts.h`. What it leaves out, the library chooses
from the sizes.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from ...base.errors import check, check_choice
from ...base.experts import Experts
from ...base.record import Record
from .. import native
from . import NATIVE_DTYPES, Config, Problem, no_native_kernel

NAME = "cuda"
ALGORITHMS = ("single_pass", "two_pass")

# Tokens that one launch takes; more are taken in chunks, each of which reads the weights again.
_AT_ONCE = 8
_MOST_CHANNELS = 1 << 17
# Tokens for which configurations are worth timing: two chunks. With more, the weights that each reads again decide.
_MOST_TIMED = 16
# In the order of `PlanOptions` in plan.h, with what leaves each to the library.
_UNSET: dict[str, int] = {
    "algorithm": -1,
    "blocks": 0,
    "cluster": 0,
    "teams": 0,
    "step": 0,
    "stages": 0,
    "splits": 0,
    "evict_first": -1,
    "overlap": -1,
    "early": -1,
    "bulk": -1,
}
# Of token and expert, in one launch.
_MOST_PAIRS = 256
# The same of `ExpertOptions` in experts.h.
_EXPERTS_UNSET: dict[str, int] = {"tokens": 0, "blocks": 0, "splits": 0, "evict_first": -1, "overlap": -1}
# A row's sums are the same for every number of tokens: the single pass is chosen by what registers hold, this is not.
_INVARIANT: Config = {"algorithm": "two_pass"}


def why_not(problem: Problem) -> str | None:
    """Why the native kernels cannot run `problem`, in one line, or None."""
    if problem.device != "cuda":
        return f"needs tensors on a CUDA device, not on {problem.device}"
    if reason := no_native_kernel(problem):
        return reason
    if problem.hidden_size > _MOST_CHANNELS:
        return f"no kernel for a hidden_size above {_MOST_CHANNELS}"
    reason = native.load_cuda()
    return reason if reason or torch.cuda.is_available() else "needs a CUDA device; torch sees none"


def plan(config: Config | None) -> list[int]:
    """The numbers that the library takes for `config`.

    Raises:
        InputError: an unknown name, an algorithm that is none, or a value that is no integer or boolean.
    """
    return _numbers(config, _UNSET)


def expert_plan(config: Config | None) -> list[int]:
    """The same for a call of experts: `tokens` of an expert that a block computes together (1, 4 or 8), `blocks` of a
    pair of token and expert, `splits` of its neurons, `evict_first` and `overlap`.
    """
    return _numbers(config, _EXPERTS_UNSET)


def _numbers(config: Config | None, unset: dict[str, int]) -> list[int]:
    numbers = dict(unset)
    for name, value in (config or {}).items():
        check_choice(name, "config", numbers)
        if name == "algorithm":
            check_choice(str(value), "config['algorithm']", ALGORITHMS)
            numbers[name] = ALGORITHMS.index(str(value))
        else:
            check(isinstance(value, int), f"config[{name!r}]", "be an integer or a boolean", value)
            numbers[name] = int(value)
    return list(numbers.values())


def _planned(problem: Problem, config: Config | None) -> dict[str, int]:
    """What the library plans on the current device. Raises RuntimeError where `config` does not fit."""
    found: str = torch.ops.pyprune.cuda_plan(
        torch.cuda.current_device(),
        max(1, min(problem.tokens, _AT_ONCE)),
        problem.hidden_size,
        problem.kept,
        problem.gated,
        problem.gather,
        str(problem.weights or problem.dtype).removeprefix("torch."),
        plan(config),
    )
    planned: dict[str, int] = json.loads(found)
    return planned


def default_config(problem: Problem) -> Config:
    """What the library plans for `problem` on the current device."""
    planned = _planned(problem, _INVARIANT if problem.batch_invariant else None)
    config: dict[str, int | str | bool] = {"algorithm": ALGORITHMS[planned["algorithm"]]}
    sizes = ("blocks", "cluster", "teams", "step", "stages", "splits")
    config |= {name: planned[name] for name in sizes if name in planned}
    return config | {name: bool(planned[name]) for name in ("evict_first", "overlap", "early", "bulk")}


def candidate_configs(problem: Problem) -> list[Config]:
    """The default and what can be faster, the most promising first, no two planned alike; none for many tokens."""
    if problem.tokens > _MOST_TIMED:
        return []
    offered: list[Config] = [default_config(problem)]
    if problem.batch_invariant:
        offered += [{**_INVARIANT, "splits": n} for n in (4, 8, 16, 32)]
    else:
        single, two = ({"algorithm": name} for name in ALGORITHMS)
        ways: list[Config] = [{"overlap": True}, {"bulk": False}, {"overlap": True, "early": True}]
        offered += [{**single, **way} for way in ways]
        offered += [two, {**two, "overlap": True}, {**two, "overlap": True, "splits": 24}, single]
        ways = [{"step": 2, "stages": 3}, {"step": 3, "stages": 2}, {"step": 4, "stages": 2}, {"teams": 1}]
        ways += [{"cluster": 4}, {"cluster": 2}, {"teams": 4}, {"teams": 8}, {"stages": 3}, {"step": 1, "stages": 4}]
        ways += [{"step": 1, "stages": 6}, {"teams": 1, "bulk": False}, {"evict_first": False}]
        offered += [{**single, **way} for way in ways]
        offered += [{**two, "splits": n} for n in (8, 16, 32)]
    planned: dict[str, Config] = {}
    for config in offered:
        if plan := _fits(problem, config):
            planned.setdefault(plan, config)
    return list(planned.values())


def _fits(problem: Problem, config: Config) -> str:
    """The plan that `config` becomes, as text; empty where it does not fit."""
    try:
        return json.dumps(_planned(problem, config))
    except RuntimeError:
        return ""


def run(x: Tensor, record: Record, config: Config | None = None, batch_invariant: bool = False) -> Tensor:
    """Run by the plan `config`, on the current stream, without waiting for the device.

    Raises:
        InputError: see `plan`.
        RuntimeError: the plan does not fit the call or the device; names what does.
    """
    if config is None and batch_invariant:
        config = _INVARIANT
    out: Tensor = torch.ops.pyprune.ffn_cuda.default(
        x,
        record.rows,
        record.index,
        record.scales,
        record.neuron_bias,
        record.down_bias,
        record.gated,
        record.activation,
        plan(config),
    )
    return out


def why_no_experts(device: str, dtype: torch.dtype, weights: torch.dtype) -> str | None:
    """Why the native kernels cannot run experts on a type of device, x of `dtype` beside rows of `weights`, or None."""
    return why_not(Problem(device, dtype, 1, 1, 1, 1, True, False, "silu", weights))


def expert_configs(problem: Problem) -> list[Config]:
    """What is worth timing for a mixture's experts, what the library plans by itself first; none for many pairs."""
    if problem.tokens * problem.picked > _MOST_PAIRS:
        return []
    ways: list[Config] = [{}, *({"splits": n} for n in (1, 2, 4, 8)), {"overlap": False}]
    return ways if problem.tokens == 1 else [*ways, *({"tokens": n} for n in (1, 4, 8))]


def run_experts(x: Tensor, experts: Experts, index: Tensor, weights: Tensor, config: Config | None = None) -> Tensor:
    """`reference.moe` by the kernels for few pairs, many in chunks of 256 that each read their experts' rows again.

    They wait for nothing, so a token whose index names no expert becomes NaN. A token has the same bits whatever the
    tokens beside it.

    Raises:
        InputError: see `expert_plan`.
        RuntimeError: the plan does not fit the call or the device; names what does.
    """
    known = weights if weights.dtype in NATIVE_DTYPES else weights.float()
    out: Tensor = torch.ops.pyprune.moe_cuda.default(
        x, experts.rows, experts.scales, experts.index, experts.counts, index.long(), known, experts.gated,
        experts.activation, expert_plan(config),
    )  # fmt: skip
    return out
