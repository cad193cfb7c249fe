"""The widths that cost least by curves of each layer."""

from __future__ import annotations

from dataclasses import dataclass

from ...base.errors import check
from ...model.units import whole_rows
from ..sensitivity.curve import SensitivityCurves
from . import bounds
from .base import ALLOCATIONS, Floored, Layers, Plan
from .knapsack import exact


def choose_widths(
    curves: SensitivityCurves,
    keep: float,
    multiple: int = 1,
    floor: float = 0.0,
    protect: tuple[int, int] = (0, 0),
) -> list[int]:
    """The width of each layer, those that cost least by `curves` and keep at most the share `keep` of all neurons.

    Losses of layers are taken to add up; the optimum of the sum is exact (`exact`).

    Args:
        curves: of the dense model.
        keep: in (0, 1], of all neurons of all layers.
        multiple: widths are multiples of it, or F.
        floor: least share kept in any layer.
        protect: how many of the first and of the last layers keep all neurons.

    Raises:
        InputError: the least widths allowed hold more neurons than `keep` does.
    """
    counts, choices = curves.counts, bounds.candidate_widths(curves.sizes, multiple, floor, protect)
    if curves.members:  # banks of experts have whole rows alone
        pairs = zip(choices, counts, strict=True)
        choices = [row if n == 1 else whole_rows(row) for row, n in pairs]
    every = sum(n * size for n, size in zip(counts, curves.sizes, strict=True))
    budget, least = round(keep * every), sum(n * row[0] for n, row in zip(counts, choices, strict=True))
    rule = f"be at least {least / every:.3f} with this multiple, floor and protect"
    check(least <= budget, "keep", rule, keep)
    # The widest first: of equal losses it is taken, so a flat curve leaves no neurons unspent.
    choices = [row[::-1] for row in choices]
    losses = [curves.at(i, row) for i, row in enumerate(choices)]
    chosen = exact(losses, [[n * width for width in row] for n, row in zip(counts, choices, strict=True)], budget)
    return [row[i] for row, i in zip(choices, chosen, strict=True)]


@ALLOCATIONS.add
@dataclass(frozen=True, kw_only=True)
class Sensitivity(Floored):
    """The widths that cost least by curves of each layer. Fields: see `Allocation` and `Floored`."""

    NAME = "sensitivity"
    SUMMARY = "the widths that cost least by curves of each layer's loss"
    NEEDS_TEXT = True

    def plan(self, layers: Layers, keep: float) -> Plan:
        curves = layers.curves(self.multiple)
        widths = choose_widths(curves, keep, self.multiple, self.floor, self.protect)
        return Plan([width for width, n in zip(widths, curves.counts, strict=True) for _ in range(n)])
