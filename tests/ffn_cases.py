"""Operands of one FFN call, its truth, and what every kernel's result is held against."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from pyprune.base import reference
from pyprune.base.record import Record
from pyprune.ffn.quantisation import cast, widened

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TYPES = list(itertools.product(FLOATS, (*FLOATS, torch.int8)))  # of x, of weights
FORMS = ("compact", "gather", "prefix")


@dataclasses.dataclass(frozen=True)
class Case:
    """The operands of one call."""

    x: Tensor
    record: Tensor
    index: Tensor | None = None
    scales: Tensor | None = None
    neuron_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gated: bool = True
    activation: str = "silu"

    def tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}

    def own(self) -> Record:
        """Its record."""
        biases = (self.neuron_bias, self.down_bias)
        return Record.unchecked(self.record, self.gated, self.activation, self.scales, *biases, self.index)

    def change(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    def rows(self, rows: Any) -> Case:
        """The same over these rows of record, scales and neuron_bias, copied."""
        taken = {k: v[rows].clone() for k, v in self.tensors().items() if k in ("record", "scales", "neuron_bias")}
        return self.change(**taken, index=None)


def twin(case: Case) -> Tensor:
    """The case in plain torch, in its own dtypes."""
    return reference.ffn(case.x, case.own())


def exact(case: Case) -> Tensor:
    """The case in float64."""
    return reference.ffn(case.x.double(), widened(case.own()))


def make(
    tokens: int = 5,
    hidden_size: int = 67,
    neurons: int = 37,
    types: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    gated: bool = True,
    activation: str = "silu",
    biases: tuple[bool, bool] = (True, True),
    form: str = "compact",
    kept: int | None = None,
    seed: int = 0,
) -> Case:
    """Random operands; `kept` neurons of `gather` and `prefix`, None for about half."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    dtype, weights = types
    parts = 3 if gated else 2
    sizes = torch.tensor([max(1, hidden_size) ** -0.5] * (parts - 1) + [neurons**-0.5])
    record = (randn(neurons, parts, hidden_size) * sizes[:, None]).flatten(1)
    record, scales = cast(record, parts, weights)
    x, neuron_bias = randn(tokens, hidden_size).to(dtype), randn(neurons, parts - 1).to(dtype)
    given = [t if e else None for t, e in zip((neuron_bias, randn(hidden_size).to(dtype)), biases, strict=True)]
    case = Case(x, record, None, scales, *given, gated, activation)
    kept = (neurons + 1) // 2 if kept is None else kept
    if form == "gather":
        return case.change(index=torch.randperm(neurons, generator=generator)[:kept].sort().values.int())
    if form == "prefix":
        cut = {k: v[:kept] for k, v in case.tensors().items() if k in ("record", "scales", "neuron_bias")}
        return case.change(**cut)
    return case


@st.composite
def cases(draw: st.DrawFn, tokens: Any, widths: Any, neurons: Any, types: Any) -> Case:
    """Cases of every form, each of the four from what is given."""
    count = draw(st.sampled_from(neurons))
    return make(
        draw(st.sampled_from(tokens)),
        draw(st.sampled_from(widths)),
        count,
        draw(st.sampled_from(types)),
        draw(st.booleans()),
        draw(st.sampled_from(sorted(reference.ACTIVATIONS))),
        draw(st.tuples(st.booleans(), st.booleans())),
        draw(st.sampled_from(FORMS)),
        draw(st.sampled_from(sorted({1, max(1, count - 1), count, (count + 1) // 2}))),
        draw(st.integers(0, 1000)),
    )


def check_error(case: Case, kernel: Callable[[Case], Tensor]) -> None:
    """At most twice the error of plain torch, or some units in the last place of float32."""
    want = exact(case)
    error, allowed = ((t.double() - want).norm() for t in (kernel(case), twin(case)))
    largest = want.abs().max() if want.numel() else torch.tensor(0.0)
    floor = 4 * torch.finfo(torch.float32).eps * largest * math.sqrt(want.numel())
    assert error <= 2 * allowed + floor, f"{error} > 2 * {allowed} + {floor}"


def check_special(case: Case, kernel: Callable[[Case], Tensor]) -> None:
    """NaN and infinities where float64 has them, and no others."""
    want, got = exact(case), kernel(case)
    assert torch.equal(got.isnan(), want.isnan())
    infinite = want.isinf()
    assert torch.equal(got.isinf(), infinite)
    assert torch.equal(got[infinite].double(), want[infinite])


def embedded(tensor: Tensor, offset: int = 0, rows_apart: int = 0) -> Tensor:
    """The same values inside a larger buffer, `offset` elements from its start, all else NaN or out of range."""
    last = tensor.shape[-1] + rows_apart
    lines = tensor.numel() // max(1, tensor.shape[-1])
    poison = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    buffer = torch.full((offset + lines * last + 96,), poison, dtype=tensor.dtype)
    view = buffer[offset : offset + lines * last].view(*tensor.shape[:-1], last)[..., : tensor.shape[-1]]
    return view.copy_(tensor)
