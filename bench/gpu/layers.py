"""One FFN on the device in every way that pyprune and torch run it, over rotating weights, and what it must give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.cases import Case
from bench.gpu.timing import Call
from pyprune import PrunedMLP
from pyprune.base import reference
from pyprune.base.record import Record, described
from pyprune.ffn import dispatch
from pyprune.ffn.backends import Problem, cuda
from pyprune.model.patterns import PATTERNS
from pyprune.speed import roofline

ARENA = 4 << 30
# What one turn through the sets of weights reads at the least, so that the L2 holds none of it.
ROTATED, ROTATED_L2S = 512 << 20, 8


class Arena:
    """Device memory full of random numbers, of which the weights of all variants are views.

    `weights` are normal with a deviation of 0.02 in `dtype`; `int8` are even in [-127, 127].
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int = ARENA, rotated: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.size = min(size, roofline.free_memory(device) // 4)
        self.rotated = rotated or max(ROTATED, ROTATED_L2S * roofline.cache_bytes(device))
        self._kinds: dict[torch.dtype, Tensor] = {}

    def _numbers(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._kinds:
            count = self.size // dtype.itemsize
            empty = torch.empty(count, dtype=dtype, device=self.device)
            self._kinds[dtype] = empty.random_(-127, 128) if dtype == torch.int8 else empty.normal_(0, 0.02)
        return self._kinds[dtype]

    def sets(self, dtype: torch.dtype, *shapes: tuple[int, int], read: int = 0) -> list[tuple[Tensor, ...]]:
        """Sets of contiguous matrices of these shapes: as many as make a turn read `rotated` bytes, and fit.

        Args:
            dtype: theirs.
            shapes: of the matrices of one set.
            read: bytes that a call reads of a set; 0 for all of them.
        """
        numbers = self._numbers(dtype)
        sizes = [rows * columns for rows, columns in shapes]
        wanted = -(-self.rotated // (read or sum(sizes) * dtype.itemsize))
        count = max(1, min(wanted, len(numbers) // sum(sizes)))
        every = numbers[: count * sum(sizes)].view(count, sum(sizes))
        return [tuple(part.view(shape) for part, shape in zip(row.split(sizes), shapes, strict=True)) for row in every]


@dataclass
class Variant:
    """A way to run a case.

    Attributes:
        calls: one for each set of weights.
        bytes: of weights that one call reads.
        backend: who computes.
        truth: the result of the first call in float64, and of torch in the same dtype; None for rivals.
        config: the backend's, where it is not its default.
        plan: what the native CUDA kernels make of it.
    """

    calls: Sequence[Call]
    bytes: int
    backend: str
    truth: Callable[[], tuple[Tensor, Tensor]] | None = None
    config: dict[str, Any] | None = None
    plan: dict[str, int] | None = None


def torch_ffn(case: Case) -> Callable[..., Tensor]:
    """The dense FFN as a function of x, biases' and weights' tensors, by torch's linear layers."""
    act = reference.ACTIVATIONS[case.shape.activation]

    def plain(x: Tensor, bias: Tensor | None, last: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(act(F.linear(x, up, bias)), down, last)

    def gated(x: Tensor, bias: None, last: None, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(act(F.linear(x, gate)) * F.linear(x, up), down)

    return gated if case.shape.gated else plain


def _plan(problem: Problem, backend: str, config: dict[str, Any] | None = None) -> dict[str, int] | None:
    return cuda._planned(problem, config) if backend == cuda.NAME else None


@dataclass
class Layer:
    """A case on the device: what all of its variants share."""

    case: Case
    arena: Arena
    x: Tensor
    neurons: Tensor  # those that stay, int32, on the device
    _records: dict[tuple[bool, torch.dtype], list[Record]] = field(default_factory=dict)
    _truths: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def make(cls, case: Case, arena: Arena) -> Layer:
        shape, generator = case.shape, torch.Generator(arena.device).manual_seed(0)
        x = torch.randn(1, case.tokens, shape.hidden_size, device=arena.device, generator=generator).to(arena.dtype)
        scores = torch.rand(shape.intermediate_size, device=arena.device, generator=generator)
        neurons = scores.argsort()[: case.neurons].sort().values.to(torch.int32)
        return cls(case, arena, x, neurons)

    def normal(self, *shape: int) -> Tensor | None:
        """A bias, where the case has them."""
        if not self.case.shape.bias:
            return None
        return torch.randn(*shape, device=self.arena.device).mul_(0.01).to(self.arena.dtype)

    def separated(self, calls: Sequence[Call]) -> list[Call]:
        """Each call behind a small kernel of torch, as other layers stand between two FFNs of a model."""
        other = torch.empty_like(self.x)

        def both(call: Call) -> Tensor:
            torch.mul(self.x, 1.0, out=other)
            return call()

        return [lambda c=call: both(c) for call in calls]

    def bytes(self, neurons: int, dtype: torch.dtype, gather: bool = False) -> int:
        """Of weights that a call over `neurons` neurons reads."""
        shape, own = self.case.shape, self.arena.dtype
        form: dict[str, Any] = {"gated": shape.gated, "activation": shape.activation, "dtype": own, "weights": dtype}
        biases = {"neuron_bias": shape.bias, "down_bias": shape.bias}
        kept = neurons if gather else None
        return described(shape.hidden_size, neurons, **form, **biases, kept=kept).nbytes

    def dense_sets(self, neurons: int) -> list[tuple[Tensor, ...]]:
        """Arguments of `torch_ffn` for each set of weights over `neurons` neurons."""
        d, dtype = self.case.shape.hidden_size, self.arena.dtype
        inputs = 2 if self.case.shape.gated else 1
        bias, last = self.normal(neurons), self.normal(d)
        found = self.arena.sets(dtype, *[(neurons, d)] * inputs, (d, neurons))
        return [(self.x, bias, last, *weights) for weights in found]

    def dense(self, neurons: int) -> Variant:
        """Torch's linear layers over contiguous weights of `neurons` neurons."""
        run = torch_ffn(self.case)
        calls = [lambda a=arguments: run(*a) for arguments in self.dense_sets(neurons)]
        return Variant(calls, self.bytes(neurons, self.arena.dtype), "torch")

    def dense_fused(self, neurons: int) -> Variant:
        """Gated: gate and up by one product, as engines do it."""
        d, act = self.case.shape.hidden_size, reference.ACTIVATIONS[self.case.shape.activation]

        def run(both: Tensor, down: Tensor) -> Tensor:
            gate, up = F.linear(self.x, both).chunk(2, -1)
            return F.linear(act(gate) * up, down)

        found = self.arena.sets(self.arena.dtype, (2 * neurons, d), (d, neurons))
        return Variant([lambda w=w: run(*w) for w in found], self.bytes(neurons, self.arena.dtype), "torch")

    # --- pyprune

    def problem(self, gather: bool, weights: torch.dtype) -> Problem:
        shape, kept = self.case.shape, self.case.neurons
        rows = shape.intermediate_size if gather else kept
        form = (shape.gated, gather, shape.activation, weights)
        kind = self.arena.device.type
        return Problem(kind, self.arena.dtype, self.case.tokens, shape.hidden_size, rows, kept, *form)

    def records(self, gather: bool, weights: torch.dtype) -> list[Record]:
        """What a backend is called with, for each set of weights. The same at every call."""
        if (gather, weights) not in self._records:
            self._records[gather, weights] = self._make_records(gather, weights)
        return self._records[gather, weights]

    def _make_records(self, gather: bool, weights: torch.dtype) -> list[Record]:
        shape, kept = self.case.shape, self.case.neurons
        parts, rows = 3 if shape.gated else 2, shape.intermediate_size if gather else kept
        read = self.bytes(kept, weights)
        sets = self.arena.sets(weights, (rows, parts * shape.hidden_size), read=read)
        scales = torch.full((rows, parts), 2e-4, device=self.arena.device) if weights == torch.int8 else None
        bias, last = self.normal(rows, parts - 1), self.normal(shape.hidden_size)
        index = self.neurons if gather else None
        return [Record(own, shape.gated, shape.activation, scales, bias, last, index) for (own,) in sets]

    def truth(self, record: Record) -> tuple[Tensor, Tensor]:
        """The FFN of x in float64, and as torch computes it in the dtype of x; remembered."""
        rows, x = record.rows, self.x.view(-1, record.hidden_size)
        key = (rows.data_ptr(), rows.shape, rows.dtype, record.index is None)
        if key not in self._truths:
            self._truths[key] = reference.ffn(x.double(), record), reference.ffn(x, record)
        return self._truths[key]

    def module(self, gather: bool, weights: torch.dtype, backend: str) -> Variant:
        """What an accelerated model calls: a PrunedMLP for each set of weights."""
        pattern = next(p for p in PATTERNS if p.gated == self.case.shape.gated and not (p.in_layer or p.fused))
        records = self.records(gather, weights)
        modules = [
            PrunedMLP(record, pattern=pattern, dtype=self.arena.dtype, backend=backend).requires_grad_(False)
            for record in records
        ]
        problem = self.problem(gather, weights)
        name = dispatch.choose(problem, backend).backend.NAME
        return Variant(
            [lambda m=module: m(self.x) for module in modules],
            self.bytes(self.case.neurons, weights, gather),
            name,
            lambda: self.truth(records[0]),
            plan=_plan(problem, name),
        )

    def configured(self, gather: bool, weights: torch.dtype, backend: str, config: dict[str, Any]) -> Variant:
        """A backend by one of its configurations, past the operator."""
        records, run = self.records(gather, weights), dispatch.backends()[backend].run
        x = self.x.view(-1, self.case.shape.hidden_size)
        return Variant(
            [lambda r=record: run(x, r, config) for record in records],
            self.bytes(self.case.neurons, weights, gather),
            backend,
            lambda: self.truth(records[0]),
            dict(config),
            _plan(self.problem(gather, weights), backend, config),
        )
