"""Operands of one call of experts, its truth, and what every kernel's result is held against."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyprune.base import reference
from pyprune.base.experts import Experts, ragged
from pyprune.ffn.quantisation import dequantise, quantise


@dataclasses.dataclass(frozen=True)
class Routed:
    """The operands of one call."""

    x: Tensor
    experts: Experts
    index: Tensor
    weights: Tensor

    def change(self, **changes: Tensor | Experts) -> Routed:
        return dataclasses.replace(self, **changes)

    def of(self, run: Callable[..., Any], *more: Any) -> Any:
        return run(self.x, self.experts, self.index, self.weights, *more)

    def spoil_what_no_index_names(self) -> None:
        """Put NaN into every row that a gather does not use, into scales where rows hold integers."""
        e = self.experts
        assert e.index is not None and e.counts is not None
        numbers = e.rows if e.scales is None else e.scales
        for own, index, count in zip(numbers, e.index, e.counts, strict=True):
            unused = torch.ones(len(own), dtype=torch.bool, device=own.device)
            unused[index[:count].long()] = False
            own[unused] = float("nan")


def widened(experts: Experts) -> Experts:
    """The same experts in float64."""
    rows = experts.rows
    if experts.scales is not None:
        pairs = zip(rows, experts.scales, strict=True)
        rows = torch.stack([dequantise(r, s, experts.parts, torch.float64) for r, s in pairs])
    return Experts(rows.double(), experts.gated, experts.activation, None, experts.index, experts.counts)


def exact(case: Routed) -> Tensor:
    """The case in float64."""
    wide = case.change(x=case.x.double(), experts=widened(case.experts), weights=case.weights.double())
    out: Tensor = wide.of(reference.moe)
    return out


def make(
    tokens: int = 5,
    experts: int = 6,
    picked: int = 2,
    hidden_size: int = 67,
    neurons: int = 37,
    types: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    gated: bool = True,
    activation: str = "silu",
    seed: int = 0,
    among: int | None = None,
    gather: bool = False,
) -> Routed:
    """Random operands; tokens choose among the last `among` experts, None for all.

    Of a gather each expert keeps another number of neurons, the first one none and the last one all.
    """
    generator = torch.Generator().manual_seed(seed)
    parts, among = 3 if gated else 2, experts if among is None else among
    sizes = torch.tensor([max(1, hidden_size) ** -0.5] * (parts - 1) + [max(1, neurons) ** -0.5])
    rows = torch.randn(experts, neurons, parts, hidden_size, generator=generator) * sizes[:, None]
    rows, scales = rows.flatten(2), None
    if types[1] == torch.int8:
        found = [quantise(r, parts) for r in rows]
        rows, scales = torch.stack([q for q, _ in found]), torch.stack([s for _, s in found])
    x = torch.randn(tokens, hidden_size, generator=generator).to(types[0])
    order = torch.rand(tokens, among, generator=generator).argsort(1)[:, :picked]
    weights = torch.rand(tokens, picked, generator=generator)
    kept = (None, None)
    if gather:
        counts = torch.randint(0, neurons + 1, (experts,), generator=generator)
        counts[0], counts[-1] = 0, neurons
        kept = ragged([torch.randperm(neurons, generator=generator)[:n].sort().values for n in counts.tolist()])
    given = Experts(rows.to(types[1]), gated, activation, scales, *kept)
    return Routed(x, given, order + experts - among, weights.to(types[0]))


def check_error(case: Routed, kernel: Callable[..., Tensor], torch_own: Callable[..., Tensor] = reference.moe) -> None:
    """At most twice the error of torch, or some units in the last place of float32."""
    want = exact(case)
    error, allowed = ((t.double() - want).norm() for t in (case.of(kernel), case.of(torch_own)))
    largest = want.abs().max() if want.numel() else torch.tensor(0.0)
    floor = 4 * torch.finfo(torch.float32).eps * largest * math.sqrt(want.numel())
    assert error <= 2 * allowed + floor, f"{error} > 2 * {allowed} + {floor}"


WHERE = ("x", "rows", "weights")


def spoil(case: Routed, where: str, special: float) -> None:
    """Put NaN or infinity into an operand: of five experts, two a token, 40 neurons, 35 channels or more."""
    if where == "rows":
        case.experts.rows[3, 39, 34] = special
    else:
        (case.x if where == "x" else case.weights)[len(case.x) // 2, 34 if where == "x" else 1] = special
