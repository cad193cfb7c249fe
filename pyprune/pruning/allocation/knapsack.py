"""The choice of widths that costs least within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...base.errors import check


def exact(
    losses: Sequence[Sequence[float]],
    costs: Sequence[Sequence[float]],
    budget: float,
    resolution: int = 20_000,
) -> list[int]:
    """One candidate of each layer, so that costs sum to at most `budget` and losses to the least: a multiple-choice
    knapsack, solved by dynamic programming over the cost spent.

    Whole-number costs (neurons) are taken as they are, and the result is the optimum. Others (seconds) are first
    rounded up to a grid of `resolution` steps between the least cost and the budget: the budget is never exceeded, and
    the result is as good as the optimum of a budget that is smaller by one step a layer. Time and memory grow as
    layers x candidates x steps, and layers x steps.

    Args:
        losses: of each candidate of each layer.
        costs: of the same; they may be negative.
        budget: of the sum of costs.
        resolution: steps of the grid, for costs that are no whole numbers.

    Returns:
        For each layer the position of its candidate; of equals the one that stands first.

    Raises:
        InputError: NaN or infinite values, a layer without candidates or with another number of costs than of losses,
            or a budget below the sum of the least costs.
    """
    check(len(losses) == len(costs) and len(losses) > 0, "costs", f"be given for {len(losses)} layers", len(costs))
    check(resolution >= 1, "resolution", "be at least 1", resolution)
    loss = [np.asarray(row, dtype=np.float64) for row in losses]
    cost = [np.asarray(row, dtype=np.float64) for row in costs]
    for i, (a, b) in enumerate(zip(loss, cost, strict=True)):
        check(a.ndim == 1 and a.size > 0, f"losses of layer {i}", "hold at least one candidate", a.shape)
        check(a.shape == b.shape, f"costs of layer {i}", f"hold {a.size} candidates", b.size)
        check(bool(np.isfinite(a).all()), f"losses of layer {i}", "be finite", a[~np.isfinite(a)][:1].tolist())
        check(bool(np.isfinite(b).all()), f"costs of layer {i}", "be finite", b[~np.isfinite(b)][:1].tolist())
    least = math.fsum(row.min() for row in cost)
    check(budget >= least, "budget", f"be at least {least:g}, the sum of the least costs", budget)
    if budget >= math.fsum(row.max() for row in cost):
        return [int(row.argmin()) for row in loss]
    steps, spent = _grid([row - row.min() for row in cost], budget - least, resolution)
    # table[l][b]: least loss of the first l layers at an extra cost of at most b steps
    table = np.full((len(loss) + 1, steps + 1), np.inf)
    table[0] = 0.0
    scratch = np.empty(steps + 1)
    for i, (row, taken) in enumerate(zip(loss, spent, strict=True)):
        for value, k in zip(row, taken, strict=True):
            if k <= steps:
                np.add(table[i, : steps + 1 - k], value, out=scratch[k:])
                np.minimum(table[i + 1, k:], scratch[k:], out=table[i + 1, k:])
    chosen, left = [], steps
    for i in reversed(range(len(loss))):
        fits = spent[i] <= left
        total = np.where(fits, table[i, np.where(fits, left - spent[i], 0)] + loss[i], np.inf)
        chosen.append(int(total.argmin()))
        left -= int(spent[i][chosen[-1]])
    return chosen[::-1]


def _grid(extra: Sequence[np.ndarray], room: float, resolution: int) -> tuple[int, list[np.ndarray]]:
    """The number of steps in `room`, and how many of them each extra cost takes, rounded up."""
    if all(bool((row == np.round(row)).all()) for row in extra):
        whole = [row.astype(np.int64) for row in extra]
        unit = max(1, int(np.gcd.reduce(np.concatenate(whole))))
        return int(room // unit), [row // unit for row in whole]
    step = room / resolution
    if step <= 0:
        return 0, [(row > 0).astype(np.int64) for row in extra]
    return resolution, [np.minimum(np.ceil(row / step), resolution + 1).astype(np.int64) for row in extra]
