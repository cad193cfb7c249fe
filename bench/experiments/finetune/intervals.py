"""95 % intervals: over examples by the bootstrap, over seeds by Student's t."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyprune.base.errors import check
from pyprune.evaluation.intervals import student_t, tails


def bootstrap(
    statistics: Sequence[Sequence[float]], score: Callable[[Any], float], samples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """A metric over all examples, and the percentile interval when examples are drawn again with replacement.

    Args:
        statistics: `[N, k]`: numbers of each example that add up.
        score: `[k]` sums -> the metric.
        samples: resamples.
        seed: of the drawing.

    Returns:
        `value`, `low`, `high`.

    Raises:
        InputError: no example.
    """
    rows = np.asarray(statistics, dtype=np.float64)
    check(len(rows) > 0, "statistics", "be of at least one example", len(rows))
    generator = np.random.default_rng(seed)
    # How often each example is drawn: [samples, N] counts.
    counts = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=samples)
    scores = [score(sums) for sums in counts @ rows]
    low, high = np.quantile(scores, tails(len(rows), len(rows) - 1))
    return {"value": score(rows.sum(0)), "low": float(low), "high": float(high)}


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean of a value over seeds with its t interval: `mean`, `low`, `high`, `n`; one seed has no interval (None)."""
    check(len(values) > 0, "values", "be of at least one seed", len(values))
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = student_t(n - 1) * spread / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}
