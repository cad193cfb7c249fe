"""Scores -> how many neurons each layer keeps -> keep indices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .errors import check
from .mask import KeepIndex, check_scores


def round_width(width: float, multiple: int, intermediate_size: int) -> int:
    """The multiple of `multiple` nearest to `width`, at least one multiple, at most `intermediate_size`.

    The full width is always allowed, also where it is no multiple.
    """
    rounded = max(1, int(width / multiple + 0.5)) * multiple
    return intermediate_size if width >= intermediate_size else min(rounded, intermediate_size)


def check_narrows(
    sizes: Sequence[int], widths: Sequence[int], keep: float, multiple: int, protect: tuple[int, int] = (0, 0)
) -> None:
    """Raise `InputError` when `widths` remove nothing although `keep` is below 1, for want of a width that is near.

    Args:
        sizes: F of each layer.
        widths: neurons that each is to keep.
        keep: share of all neurons that should stay.
        multiple: widths were rounded to it.
        protect: how many of the first and of the last layers keep all neurons.
    """
    if keep >= 1 or list(widths) != list(sizes):
        return
    free = [size for size, whole in zip(sizes, _protected(sizes, protect), strict=True) if not whole]
    size = max(free, default=0)
    below = (size - 1) // multiple * multiple if size else 0
    nearest = f"{below} or {size}" if below else f"{size} alone"
    rule = f"leave a width near keep {keep} of {size} neurons (nearest possible: {nearest}), or nothing is removed"
    check(not free, "multiple", rule, multiple)


def standardise(scores: Tensor) -> Tensor:
    """z-scores within one layer, so that layers can be compared (FLAP, An et al. 2023, arXiv 2312.11983, section 3)."""
    deviation = scores.std(correction=0)
    return (scores - scores.mean()) / deviation if deviation > 0 else torch.zeros_like(scores)


def _protected(sizes: Sequence[int], protect: tuple[int, int]) -> list[bool]:
    """Whether each layer is one of the first `protect[0]` or of the last `protect[1]`."""
    first, last = protect
    check(first >= 0 and last >= 0, "protect", "be two counts of layers, the first and the last ones", protect)
    return [i < first or i >= len(sizes) - last for i in range(len(sizes))]


def _share_left(sizes: Sequence[int], keep: float, least: Sequence[int], protect: tuple[int, int]) -> float:
    """The share that layers outside `protect` keep, so that all layers together keep `keep`.

    Raises:
        InputError: the protected layers and the `least` neurons of the others exceed the budget.
    """
    safe = _protected(sizes, protect)
    if not any(safe):
        return keep
    spent = sum(size for size, whole in zip(sizes, safe, strict=True) if whole)
    others = sum(sizes) - spent
    needed = spent + sum(low for low, whole in zip(least, safe, strict=True) if not whole)
    budget = keep * sum(sizes)
    message = f"leave others enough: at keep {keep} all layers share {budget:.0f} neurons, and need {needed} at least"
    check(needed <= budget + 1e-6, "protect", message, protect)
    return min(1.0, (budget - spent) / others) if others else 1.0


def uniform(
    scores: Sequence[Tensor], keep: float, multiple: int = 1, protect: tuple[int, int] = (0, 0)
) -> list[KeepIndex]:
    """Every layer keeps the share `keep` of its neurons; with `protect`, every layer outside the same, smaller one.

    Args:
        scores: one `[F]` a layer, higher = keep.
        keep: in (0, 1], of all neurons of all layers.
        multiple: widths are rounded to it.
        protect: how many of the first and of the last layers keep all neurons (LLM-Pruner, Ma et al. 2023, arXiv
            2305.11627, leaves out the first and last layers like this).

    Raises:
        InputError: NaN or infinite scores, `protect` leaves no neurons to the others, or `multiple` no narrower width.
    """
    return _highest(scores, uniform_widths([s.numel() for s in scores], keep, multiple, protect))


def uniform_widths(
    sizes: Sequence[int], keep: float, multiple: int = 1, protect: tuple[int, int] = (0, 0)
) -> list[int]:
    """The widths of `uniform`, for layers of `sizes` neurons."""
    safe = _protected(sizes, protect)
    share = _share_left(sizes, keep, [min(multiple, size) for size in sizes], protect)
    widths = [
        size if whole else round_width(share * size, multiple, size) for size, whole in zip(sizes, safe, strict=True)
    ]
    check_narrows(sizes, widths, keep, multiple, protect)
    return widths


def _highest(scores: Sequence[Tensor], widths: Sequence[int]) -> list[KeepIndex]:
    """The keep index of each layer at its width."""
    pairs = zip(scores, widths, strict=True)
    return [KeepIndex.from_scores(s, w, f"scores of layer {i}") for i, (s, w) in enumerate(pairs)]


def global_top(
    scores: Sequence[Tensor],
    keep: float,
    multiple: int = 1,
    floor: float = 0.0,
    protect: tuple[int, int] = (0, 0),
) -> list[KeepIndex]:
    """The share `keep` of all neurons with the highest standardised scores stays; widths differ by layer.

    Widths are rounded to `multiple` so that the total stays as near to `keep` as the multiple allows: each layer
    starts at its floor (at least one multiple), then the layers whose next neurons score highest grow by one multiple
    at a time.

    Args:
        scores: one `[F]` a layer, higher = keep.
        keep: in (0, 1], of all neurons of all layers.
        multiple: widths are rounded to it.
        floor: least share kept in any layer.
        protect: how many of the first and of the last layers keep all neurons.

    Raises:
        InputError: NaN or infinite scores, `floor` above `keep`, `protect` leaves too little to the others, or
            `multiple` no narrower width.
    """
    check(floor <= keep, "floor", f"be at most keep ({keep})", floor)
    for i, s in enumerate(scores):
        check_scores(s, f"scores of layer {i}")
    ranked = [standardise(s.double()).sort(descending=True).values for s in scores]
    sizes = [s.numel() for s in scores]
    budget = round(keep * sum(sizes))
    widths = least_widths(sizes, multiple, floor)
    _share_left(sizes, keep, widths, protect)
    widths = [
        size if whole else width for size, width, whole in zip(sizes, widths, _protected(sizes, protect), strict=True)
    ]

    def gain(i: int) -> float:
        step = ranked[i][widths[i] : widths[i] + multiple]
        return float(step.mean()) if step.numel() else -float("inf")

    gains = [gain(i) for i in range(len(scores))]
    while True:
        best = max(range(len(scores)), key=lambda i: gains[i])
        step = min(multiple, scores[best].numel() - widths[best])
        if step <= 0 or sum(widths) + step / 2 > budget:
            break
        widths[best] += step
        gains[best] = gain(best)
    check_narrows(sizes, widths, keep, multiple, protect)
    return _highest(scores, widths)


def least_widths(sizes: Sequence[int], multiple: int = 1, floor: float = 0.0) -> list[int]:
    """The least width of each layer: its share `floor`, rounded up to whole multiples, and one multiple at least."""
    # The tolerance keeps 0.3 * 10 = 3.0000000000000004 from becoming 4.
    least = [math.ceil(floor * size - 1e-9) for size in sizes]
    return [min(size, max(1, math.ceil(n / multiple)) * multiple) for n, size in zip(least, sizes, strict=True)]


def candidate_widths(
    sizes: Sequence[int], multiple: int = 1, floor: float = 0.0, protect: tuple[int, int] = (0, 0)
) -> list[list[int]]:
    """The widths that each layer may get, ascending: multiples from its floor up, and its full width.

    Args:
        sizes: F of each layer.
        multiple: widths are multiples of it.
        floor: least share kept in any layer.
        protect: how many of the first and of the last layers have their full width only.
    """
    whole = _protected(sizes, protect)
    return [
        [size] if safe else [*range(low, size, multiple), size]
        for size, low, safe in zip(sizes, least_widths(sizes, multiple, floor), whole, strict=True)
    ]


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
