"""Latency of one FFN: shape x M x keep x form x backend, by pytest-benchmark.

    pytest bench/model/bench_ffn.py --benchmark-only                            a few small shapes
    pytest bench/model/bench_ffn.py --benchmark-only --shapes all --tokens 1 --dtype bfloat16 -k "compact or linear"

Forms: `linear` is what Transformers runs, torch's Linear modules, dense at keep 1.0 and narrow below; `linear-compiled`
the same by torch.compile; `compact` and `gather` are PrunedMLP, by every backend that can. Cases of one shape run next
to each other, so that they meet the same machine.

Calls rotate over copies of the FFN that together exceed the last-level cache twice where a sixteenth of the free memory
holds them, as they would come from memory in a model; `extra_info` says how large they are. On CUDA one round is a
graph of one call per copy, else one round is one call; `calls` says how many.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.shapes import BY_NAME, DEFAULT, Shape
from pyprune import BackendError, KeepIndex, PrunedMLP
from pyprune.base import reference
from pyprune.base.clock import clock, timed
from pyprune.base.record import described
from pyprune.ffn import dispatch
from pyprune.ffn.backends import Problem
from pyprune.model.loading import DTYPES
from pyprune.speed import roofline
from pyprune.speed.timing import FFNUnit, ffn_pass, pruned_unit

FORMS = ("linear", "linear-compiled", "compact", "gather")


@dataclass(frozen=True)
class Case:
    """One line of the bench."""

    shape: Shape
    keep: float
    form: str
    backend: str
    tokens: int
    dtype: str
    device: str

    def __str__(self) -> str:
        backend = f"-{self.backend}" if self.backend else ""
        return f"{self.shape.name}-keep{self.keep}-{self.form}{backend}-M{self.tokens}-{self.dtype}-{self.device}"

    @property
    def neurons(self) -> int:
        return max(1, round(self.keep * self.shape.intermediate_size))

    def why_not(self) -> str | None:
        """Why this line cannot be measured, or None."""
        if not self.backend:
            return None
        gather = self.form == "gather"
        rows = self.shape.intermediate_size if gather else self.neurons
        shape = self.shape
        problem = Problem(
            self.device,
            DTYPES[self.dtype],
            self.tokens,
            shape.hidden_size,
            rows,
            self.neurons,
            shape.gated,
            gather,
            shape.activation,
        )
        try:
            dispatch.choose(problem, self.backend)
        except BackendError as error:
            return str(error)
        return None


class _Plain(nn.Module):
    """`down(act(up(x)))` in torch modules."""

    def __init__(self, shape: Shape, neurons: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.hidden_size, neurons, bias=shape.bias)
        self.fc2 = nn.Linear(neurons, shape.hidden_size, bias=shape.bias)
        self.act = reference.ACTIVATIONS[shape.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _Gated(nn.Module):
    """`down(act(gate(x)) * up(x))` in torch modules."""

    def __init__(self, shape: Shape, neurons: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, neurons, bias=shape.bias)
        self.up_proj = nn.Linear(shape.hidden_size, neurons, bias=shape.bias)
        self.down_proj = nn.Linear(neurons, shape.hidden_size, bias=shape.bias)
        self.act = reference.ACTIVATIONS[shape.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def _unit(case: Case) -> FFNUnit:
    """One FFN of the case, random weights, and the bytes a call reads."""
    shape = case.shape
    pruned = case.form in ("compact", "gather")
    width = shape.intermediate_size if case.form == "gather" else case.neurons
    with torch.device(case.device):
        dense = (_Gated if shape.gated else _Plain)(shape, width).to(DTYPES[case.dtype]).eval()
    if not pruned:
        biases = {"neuron_bias": shape.bias, "down_bias": shape.bias}
        form = {"gated": shape.gated, "activation": shape.activation, "dtype": DTYPES[case.dtype]}
        size = described(shape.hidden_size, width, **form, **biases).nbytes
        return FFNUnit(dense, shape.hidden_size, width, size)
    keep = None
    if case.form == "gather":
        scores = torch.rand(width, generator=torch.Generator().manual_seed(0))
        keep = KeepIndex.from_scores(scores, case.neurons)
    return pruned_unit(PrunedMLP.from_dense(dense, keep, case.form))


@functools.lru_cache(maxsize=1)
def _copies(case: Case) -> list[FFNUnit]:
    """Copies of the case's FFN that exceed the last-level cache, as far as memory allows; at least one."""
    first = _unit(case)
    device = torch.device(case.device)
    wanted = min(2 * roofline.cache_bytes(device), roofline.free_memory(device) // 16)
    count = max(1, math.ceil(wanted / first.bytes))
    return [first] + [
        FFNUnit(copy.deepcopy(first.run), first.hidden_size, first.neurons, first.bytes) for _ in range(count - 1)
    ]


def _rotation(units: list[FFNUnit], x: Tensor, compiled: bool) -> tuple[Callable[[], Any], int]:
    """What one round runs, and how many FFN calls that is."""
    if x.is_cuda:
        return ffn_pass(units, x, compiled), len(units)
    passes = itertools.cycle([ffn_pass([unit], x, compiled) for unit in units])
    return lambda: next(passes)(), 1


def _choices(value: str, known: tuple[str, ...], option: str) -> list[str]:
    chosen = list(known) if value == "all" else value.split(",")
    if unknown := set(chosen) - set(known):
        raise pytest.UsageError(f"{option} must be of {', '.join(known)}; got {', '.join(sorted(unknown))}")
    return chosen


def _cases(config: pytest.Config) -> list[Case]:
    """Every case that the options ask for, M fastest, so that copies are built once for all M."""
    option = config.getoption
    shapes = _choices(option("--shapes") or ",".join(DEFAULT), tuple(BY_NAME), "--shapes")
    forms = _choices(option("--forms"), FORMS, "--forms")
    backends = _choices(option("--backends"), tuple(dispatch.backends()), "--backends")
    dtype = _choices(option("--dtype"), tuple(name for name in DTYPES if name != "auto"), "--dtype")[0]
    device = option("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    tokens = [int(t) for t in option("--tokens").split(",")]
    return [
        Case(BY_NAME[name], float(keep), form, backend, m, dtype, device)
        for name in shapes
        for keep in option("--keeps").split(",")
        for form in forms
        for backend in (backends if form in ("compact", "gather") else [""])
        for m in tokens
        # Gathering every neuron is no use that anyone has.
        if not (form == "gather" and float(keep) == 1.0)
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", _cases(metafunc.config), ids=str)


@torch.no_grad()
def test_ffn(benchmark: Any, case: Case, request: pytest.FixtureRequest) -> None:
    """Time one case."""
    if reason := case.why_not():
        pytest.skip(reason)
    # The copies do not depend on M or, but for a name, on the backend.
    units = _copies(Case(case.shape, case.keep, case.form, "", 0, case.dtype, case.device))
    for unit in units:
        if isinstance(unit.run, PrunedMLP):
            unit.run.backend = case.backend
    x = torch.randn(1, case.tokens, case.shape.hidden_size, generator=torch.Generator().manual_seed(0))
    x = x.to(case.device, DTYPES[case.dtype])
    run, calls = _rotation(units, x, case.form == "linear-compiled")
    now = clock(case.device)

    def synchronised() -> None:
        run()
        now()

    synchronised()
    # The best of a few, since one disturbed call would leave a case with hardly any samples.
    estimate = min(timed(synchronised, now, passes=5)())
    rounds = max(5, min(1000, int(request.config.getoption("--seconds") / estimate)))
    benchmark.extra_info |= {
        "model": case.shape.name,
        "hidden_size": case.shape.hidden_size,
        "intermediate_size": case.shape.intermediate_size,
        "gated": case.shape.gated,
        "keep": case.neurons / case.shape.intermediate_size,
        "form": case.form,
        "backend": case.backend or "torch",
        "tokens": case.tokens,
        "dtype": case.dtype,
        "device": case.device,
        "bytes": units[0].bytes,
        "rotated_bytes": sum(unit.bytes for unit in units),
        "calls": calls,
        # The same bytes (or operations) a second on fewer neurons.
        "ceiling": case.shape.intermediate_size / case.neurons,
    }
    benchmark.pedantic(synchronised, rounds=rounds, iterations=1, warmup_rounds=min(len(units), rounds))
    benchmark.extra_info["gb_s"] = units[0].bytes * calls / benchmark.stats.stats.median / 1e9
