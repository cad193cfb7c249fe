"""Every way to run the FFN of a case, over weights that lie in one arena."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cpu.cases import Case
from bench.shapes import Shape
from pyprune import KeepIndex
from pyprune.base import reference
from pyprune.base.clock import Job
from pyprune.base.errors import check
from pyprune.base.memory import huge_pages
from pyprune.base.record import Record, described
from pyprune.ffn import dispatch, first_use, operators
from pyprune.ffn.backends import Problem
from pyprune.ffn.quantisation import WEIGHTS, row_bytes


class Arena:
    """Memory that weights of every variant are views of, so that they need no time to make and no room each.

    It holds bfloat16 numbers near 0.02. Two of them read as one float32 are such a number again, every byte is an int8
    one or two of int4, and int4's scales are bfloat16; for float16 it is filled anew.
    """

    def __init__(self, size: int) -> None:
        size = size // 64 * 64
        # As `accelerate` keeps records; so torch's weights lie on huge pages here too, which they seldom do elsewhere.
        pages = huge_pages(size)
        self.memory = torch.empty(size, dtype=torch.uint8) if pages is None else pages
        self.fill(torch.bfloat16)

    def fill(self, dtype: torch.dtype) -> None:
        """Write normal numbers of `dtype` everywhere."""
        self.filled = dtype
        generator = torch.Generator().manual_seed(0)
        sign = torch.randint(2, (1 << 20,), generator=generator) * 2 - 1
        tile = (sign * (0.01 + 0.02 * torch.rand(1 << 20, generator=generator))).to(dtype)
        for part in self.memory.view(dtype).split(len(tile)):
            part.copy_(tile[: len(part)])

    def copies(self, dtype: torch.dtype, *shapes: tuple[int, int]) -> list[tuple[Tensor, ...]]:
        """As many sets of contiguous matrices of these shapes as there is room for."""
        if (dtype == torch.float16) != (self.filled == torch.float16):
            self.fill(torch.float16 if dtype == torch.float16 else torch.bfloat16)
        sizes = [rows * columns for rows, columns in shapes]
        numbers = self.memory.view(dtype)
        check(len(numbers) >= sum(sizes), "arena", f"hold {sum(sizes)} numbers of {dtype}", len(numbers))
        sets = numbers[: len(numbers) // sum(sizes) * sum(sizes)].view(-1, sum(sizes))
        columns = sets.split(sizes, dim=1)
        views = [c.unflatten(1, shape).unbind() for c, shape in zip(columns, shapes, strict=True)]
        return list(zip(*views, strict=True))


@dataclass
class Variant:
    """A way to run the FFN of a case: `run(*copies[i])` reads copy i of the weights, `bytes` of them."""

    run: Callable[..., Any]
    copies: list[tuple[Any, ...]]
    bytes: int
    backend: str

    def job(self, seconds: float) -> Job:
        """Calls for `seconds`, at least one, each on the next copy; each is a sample."""
        turns = itertools.cycle(self.copies)

        def slices() -> list[float]:
            samples = []
            end = time.perf_counter() + seconds
            while True:
                arguments = next(turns)
                start = time.perf_counter()
                self.run(*arguments)
                stop = time.perf_counter()
                samples.append(stop - start)
                if stop >= end:
                    return samples

        return slices


def _biases(count: int, shape: tuple[int, ...], dtype: torch.dtype, wanted: bool) -> list[Any]:
    if not wanted:
        return [None] * count
    return list((torch.randn(count, *shape) * 0.01).to(dtype).unbind())


def torch_ffn(shape: Shape) -> Callable[..., Tensor]:
    """The FFN as a function of x, weights and biases, as torch's linear layers compute it."""
    act = reference.ACTIVATIONS[shape.activation]

    def plain(x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor, down_bias: Tensor) -> Tensor:
        return F.linear(act(F.linear(x, up, up_bias)), down, down_bias)

    def gated(
        x: Tensor, gate: Tensor, up: Tensor, down: Tensor, gate_bias: Tensor, up_bias: Tensor, down_bias: Tensor
    ) -> Tensor:
        return F.linear(act(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias), down, down_bias)

    return gated if shape.gated else plain


def _bytes(case: Case, neurons: int, dtype: torch.dtype, gather: bool = False) -> int:
    shape, weights = case.shape, None if dtype == WEIGHTS[case.dtype] else dtype
    form: dict[str, Any] = {"gated": shape.gated, "activation": shape.activation, "dtype": WEIGHTS[case.dtype]}
    biases = {"neuron_bias": shape.bias, "down_bias": shape.bias}
    kept = neurons if gather else None
    return described(shape.hidden_size, neurons, **form, **biases, weights=weights, kept=kept).nbytes


def torch_variant(case: Case, arena: Arena, x: Tensor, neurons: int) -> Variant:
    """Torch's linear layers over `neurons` neurons."""
    d, inputs = case.shape.hidden_size, 2 if case.shape.gated else 1
    weights = arena.copies(x.dtype, *[(neurons, d)] * inputs, (d, neurons))
    biases = [_biases(len(weights), (neurons,), x.dtype, case.shape.bias) for _ in range(inputs)]
    biases.append(_biases(len(weights), (d,), x.dtype, case.shape.bias))
    copies = [(x, *w, *b) for w, *b in zip(weights, *biases, strict=True)]
    return Variant(torch_ffn(case.shape), copies, _bytes(case, neurons, x.dtype), "torch")


def pruned_variant(case: Case, arena: Arena, x: Tensor, gather: bool) -> Variant:
    """The call that PrunedMLP makes, compact or gather."""
    shape, dtype = case.shape, WEIGHTS[case.weights]
    d, parts = shape.hidden_size, 3 if shape.gated else 2
    rows = shape.intermediate_size if gather else case.neurons
    index = None
    if gather:
        scores = torch.rand(rows, generator=torch.Generator().manual_seed(0))
        index = KeepIndex.from_scores(scores, case.neurons).neurons
    records = arena.copies(dtype, (rows, row_bytes(parts, d, dtype) // dtype.itemsize))
    scales: list[Any] = [None] * len(records)
    if dtype == torch.int8:
        scales = list(torch.full((len(records), rows, parts), 1e-4).unbind())
    neuron_bias = _biases(len(records), (rows, parts - 1), x.dtype, shape.bias)
    down_bias = _biases(len(records), (d,), x.dtype, shape.bias)
    form = (shape.gated, shape.activation)
    given = [
        Record(rows, *form, scale, bias, last, index)
        for (rows,), scale, bias, last in zip(records, scales, neuron_bias, down_bias, strict=True)
    ]
    problem = Problem.of(given[0], x.dtype, case.tokens)
    first_use.measure([problem])
    most = dispatch.native_tokens(x.dtype, dtype, d, gather, "cpu", case.neurons, *form)
    copies = [operators.arguments(x, record, "auto", most) for record in given]
    size = _bytes(case, case.neurons, dtype, gather)
    return Variant(operators.FFN, copies, size, dispatch.choose(problem).backend.NAME)


class Compiler:
    """torch.compile, until its time is up; says what it left out."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.left = seconds, seconds
        self.skipped: list[str] = []
        self._functions: dict[str, Callable[..., Any]] = {}
        torch._dynamo.config.recompile_limit = 64
        # The workers of a pool would take cores from what is timed.
        torch._inductor.config.compile_threads = 1

    def variant(self, case: Case, eager: Variant, what: str) -> Variant | None:
        """`eager` compiled, or None when there is no time."""
        if self.left <= 0:
            self.skipped.append(f"{case.shape.name} {what}")
            return None
        start = time.perf_counter()
        run = self._functions.setdefault(
            case.shape.name, torch.compile(torch_ffn(case.shape), mode="max-autotune", dynamic=False)
        )
        run(*eager.copies[0])
        self.left -= time.perf_counter() - start
        return Variant(run, eager.copies, eager.bytes, "inductor")


def variants(case: Case, arena: Arena, compiler: Compiler | None) -> dict[str, Variant]:
    """Every way to run a case, by name."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, case.tokens, case.shape.hidden_size, generator=generator).to(WEIGHTS[case.dtype])
    found = {"dense": torch_variant(case, arena, x, case.shape.intermediate_size)}
    pruned = case.neurons < case.shape.intermediate_size
    if pruned:
        found["torch-compact"] = torch_variant(case, arena, x, case.neurons)
    found["compact"] = pruned_variant(case, arena, x, gather=False)
    if pruned:
        found["gather"] = pruned_variant(case, arena, x, gather=True)
    if compiler and (case.weights, case.tokens) == ("bfloat16", 1) and case.keep in (1.0, 0.5):
        for name in ("dense", "torch-compact") if pruned else ("dense",):
            inductor = f"inductor-{name.removeprefix('torch-')}"
            compiled = compiler.variant(case, found[name], inductor)
            if compiled:
                found[inductor] = compiled
    return found
