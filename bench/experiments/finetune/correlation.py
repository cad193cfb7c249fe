"""Does redundancy explain quality? Spearman's correlation over the cells of a grid, with a bootstrap over methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyprune.base.errors import check
from pyprune.evaluation.intervals import tails

Array = NDArray[np.float64]
# Of fewer cells or methods, drawn again, most samples have the same few: the interval is too narrow, or a point.
LEAST, LEAST_METHODS = 8, 5


def ranks(values: Array) -> Array:
    """Ranks from 1, those of equal values their mean."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    mean: Array = (np.cumsum(count) - (count - 1) / 2)[place]
    return mean


def spearman(left: Array, right: Array, strata: Sequence[Any]) -> float:
    """Correlation of ranks taken within each stratum and centred there; NaN where a side does not vary.

    With one stratum for all this is Spearman's coefficient.
    """
    places = np.asarray(strata)
    sides = []
    for values in (left, right):
        centred = np.empty(len(values))
        for stratum in np.unique(places):
            inside = places == stratum
            own = ranks(values[inside])
            centred[inside] = (own - own.mean()) / len(own)
        sides.append(centred)
    a, b = sides
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else float("nan")


def correlation(
    left: Sequence[float],
    right: Sequence[float],
    strata: Sequence[Any],
    methods: Sequence[str],
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Spearman's coefficient within strata, and its percentile interval when methods are drawn again, with all their
    cells: those of one method are no independent witnesses.

    Args:
        left, right: `[N]`, a value of each cell.
        strata: `[N]`, what must not explain it: cells are ranked among their like.
        methods: `[N]`, what is drawn.
        samples, seed: of the bootstrap.

    Returns:
        `value`, `low`, `high`, `n`; None for the numbers with fewer than 8 cells or 5 methods, or where a side does not
        vary. Samples in which one does not, such as of one method throughout, do not count.

    Raises:
        InputError: lengths that differ.
    """
    n = len(left)
    lengths = len(right), len(strata), len(methods)
    check(set(lengths) == {n}, "right, strata and methods", f"be as long as left ({n})", lengths)
    nothing = {"value": None, "low": None, "high": None, "n": n}
    a, b, places = np.asarray(left, float), np.asarray(right, float), np.asarray([str(s) for s in strata])
    if n < LEAST or len(set(methods)) < LEAST_METHODS or np.isnan(value := spearman(a, b, places)):
        return nothing
    generator = np.random.default_rng(seed)
    named = np.asarray(methods)
    cells = [np.flatnonzero(named == method) for method in np.unique(named)]
    found = []
    for _ in range(samples):
        drawn = np.concatenate([cells[i] for i in generator.integers(len(cells), size=len(cells))])
        found.append(spearman(a[drawn], b[drawn], places[drawn]))
    low, high = np.nanquantile(found, tails(len(cells), len(cells) - 1))
    return {"value": value, "low": float(low), "high": float(high), "n": n}
