"""The widths that meet a target at the least loss."""

from __future__ import annotations

import math

from ...base.errors import check
from ...speed.latency.table import LatencyTable
from ..sensitivity import SensitivityCurves
from . import bounds
from .knapsack import exact


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
