"""Widths drawn at random that spend a budget of neurons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...base.errors import check

Widths = tuple[int, ...]
# Of the logarithms of the layers' shares: up to this the shares of one draw differ. At 0.6 two thirds of the layers
# keep between 0.55 and 1.8 times the usual share.
_SPREAD = 0.6


def fill(weights: Sequence[float], choices: Sequence[Sequence[int]], budget: int) -> Widths:
    """Widths in proportion to `weights`, in sum as near below `budget` as steps of the choices allow.

    Args:
        weights: of each layer, positive.
        choices: widths that each layer may get, ascending, the last its full width.
        budget: of the sum of widths; at least that of the first choices.
    """
    least, most = (np.array([row[end] for row in choices], dtype=np.float64) for end in (0, -1))
    wanted = np.asarray(weights, dtype=np.float64) * most
    low, high = 0.0, float(np.max(most / wanted))
    for _ in range(60):  # the scale at which clipped widths sum to the budget
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * wanted, least, most).sum() <= budget else (low, middle)
    exact = np.clip(low * wanted, least, most)
    places = [max(0, int(np.searchsorted(row, x + 1e-6, "right")) - 1) for row, x in zip(choices, exact, strict=True)]
    left = budget - sum(row[i] for row, i in zip(choices, places, strict=True))
    while True:  # what rounding down left goes where most was cut off
        steps = [
            row[i + 1] - row[i] if i + 1 < len(row) else budget + 1 for row, i in zip(choices, places, strict=True)
        ]
        fits = [i for i, step in enumerate(steps) if step <= left]
        if not fits:
            return tuple(row[i] for row, i in zip(choices, places, strict=True))
        best = max(fits, key=lambda i: exact[i] - choices[i][places[i]])
        left -= steps[best]
        places[best] += 1


def draw(choices: Sequence[Sequence[int]], budget: int, count: int, seed: int) -> list[Widths]:
    """The even spread of `budget`, then up to `count` - 1 others that differ, some near to even and some far.

    Args:
        choices: as for `fill`.
        budget: as for `fill`.
        count: fewer come back where there are not so many, or they are hard to find.
        seed: of the draws.
    """
    check(count >= 1, "count", "be at least 1", count)
    generator = np.random.default_rng(seed)
    found = dict.fromkeys([fill([1.0] * len(choices), choices, budget)])
    for _ in range(20 * count):
        if len(found) == count:
            break
        deviation = _SPREAD * generator.uniform(0.2, 1)
        weights = np.exp(deviation * generator.standard_normal(len(choices)))
        found[fill(weights.tolist(), choices, budget)] = None
    return list(found)
