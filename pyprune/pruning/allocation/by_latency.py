"""The widths that meet a target at the least loss."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ...base.errors import check, is_finite
from ...speed.latency.table import LatencyTable
from ..sensitivity.curve import SensitivityCurves
from . import bounds
from .base import ALLOCATIONS, Floored, Layers, Plan
from .knapsack import exact

_WORKLOAD = re.compile(r"(decode|prefill):[1-9]\d{0,6}(:\w+)?")


def _least(table: LatencyTable, floor: float, protect: tuple[int, int]) -> list[int]:
    """The narrowest width that each layer may get, in the table's range."""
    rows = bounds.candidate_widths(table.sizes, 1, floor, protect)
    return [max(row[0], min(table.widths[0], size)) for row, size in zip(rows, table.sizes, strict=True)]


def check_target(
    table: LatencyTable, target_speedup: float, floor: float = 0.0, protect: tuple[int, int] = (0, 0)
) -> None:
    """Raise `InputError` unless some widths that `floor` and `protect` allow reach the target, which is 1 at least."""
    check(1 <= target_speedup < math.inf, "target_speedup", "be a number of at least 1", target_speedup)
    largest = table.largest(_least(table, floor, protect))
    rule = f"be at most {math.floor(largest * 1000) / 1000:.3f}, the largest that any allowed widths reach here"
    check(target_speedup <= largest, "target_speedup", rule, target_speedup)


def choose_widths(
    curves: SensitivityCurves,
    table: LatencyTable,
    target_speedup: float,
    floor: float = 0.0,
    protect: tuple[int, int] = (0, 0),
) -> list[int]:
    """The widths that cost least by `curves` among those whose step is predicted to be `target_speedup` times faster.

    Args:
        curves: of the dense model.
        table: of the same, on this machine.
        target_speedup: of the accelerated pruned model over the accelerated dense one, at least 1.
        floor: least share of neurons kept in any layer.
        protect: how many of the first and of the last layers keep all neurons.

    Raises:
        InputError: the target is below 1 or above what any widths reach here, or table and curves are of different
            models.
    """
    check_target(table, target_speedup, floor, protect)
    same = table.sizes == curves.sizes
    check(same, "table", f"be of a model with widths {list(curves.sizes)[:4]}...", list(table.sizes)[:4])
    least = _least(table, floor, protect)
    choices = [
        sorted({w for w in table.widths if low <= w <= size} | {size}, reverse=True)
        for low, size in zip(least, table.sizes, strict=True)
    ]
    losses = [curves.at(i, row) for i, row in enumerate(choices)]
    # Against the dense FFN, so that a target of 1 is met by it to the last bit.
    costs = [[table.cost(w) - table.cost(size) for w in row] for row, size in zip(choices, table.sizes, strict=True)]
    # A target that only the cheapest widths reach must not be lost to rounding.
    budget = max(table.step / target_speedup - table.step, math.fsum(min(row) for row in costs))
    chosen = exact(losses, costs, budget)
    return [row[i] for row, i in zip(choices, chosen, strict=True)]


@ALLOCATIONS.add
@dataclass(frozen=True, kw_only=True)
class Latency(Floored):
    """Of the widths that make the whole model `target_speedup` times faster on this machine, those that cost least.

    `keep` is not used. Further fields: see `Allocation` and `Floored`.

    Attributes:
        target_speedup: of the whole model over the dense one, both accelerated; above 1. It must be given.
        workload: what that speed-up is of: `decode:1` for steps of one token with one sequence, `prefill:512` for a
            prompt of 512 tokens; a third part, as in `decode:1:int8`, for weights that are kept in another dtype.
    """

    NAME = "latency"
    SUMMARY = "the widths that cost least among all that reach target_speedup on this machine"
    NEEDS_TEXT = True
    USES_KEEP = False

    target_speedup: float | None = None
    workload: str = "decode:1"

    def __post_init__(self) -> None:
        super().__post_init__()
        target = self.target_speedup
        rule = "be a number above 1 with allocation 'latency'"
        check(is_finite(target) and target > 1, "target_speedup", rule, target)  # type: ignore[operator]
        right = isinstance(self.workload, str) and bool(_WORKLOAD.fullmatch(self.workload))
        check(right, "workload", "be like decode:1, prefill:512 or decode:1:int8", self.workload)

    def plan(self, layers: Layers, keep: float) -> Plan:
        assert self.target_speedup is not None
        rules = self.floor, self.protect
        choices = bounds.candidate_widths(layers.sizes, self.multiple, *rules)
        table = layers.latencies(sorted({width for row in choices for width in row}), self.workload)
        check_target(table, self.target_speedup, *rules)  # before the curves, which take longer
        widths = choose_widths(layers.curves(self.multiple), table, self.target_speedup, *rules)
        return Plan(widths, table.speedup(widths))
