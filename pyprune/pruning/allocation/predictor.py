"""A ridge regression from the widths of all layers to the loss, and the widths at which it is least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...base.errors import check
from .knapsack import exact
from .samples import Widths

_LITTLE = 1e-9
_POWERS = np.array([2.0, 4.0])
_RIDGES = tuple(10.0 ** (power / 2) for power in range(-8, 9))


@dataclass(frozen=True, eq=False)
class Predictor:
    """loss = c + sum_l ((b + u_l) x_l^2 + (d + w_l) x_l^4), with x_l the share of layer l that is removed.

    c, b and d are free, u_l and w_l are kept small by the ridge. So where samples say nothing of single layers these
    are alike, each neuron costs more than the one before it, and the even spread is best.

    Attributes:
        sizes: F of each layer.
        weights: `[L, 2]`, b + u_l and d + w_l.
        constant: c.
        ridge: the penalty, of `fit`'s choice.
        error: root mean square of the residuals where each sample was left out of the fit.
    """

    sizes: tuple[int, ...]
    weights: np.ndarray
    constant: float
    ridge: float
    error: float

    def parts(self, layer: int, widths: Sequence[int]) -> list[float]:
        """What a layer adds to the loss at each of `widths`."""
        x = 1 - np.asarray(widths, dtype=np.float64) / self.sizes[layer]
        return (x[:, None] ** _POWERS @ self.weights[layer]).tolist()

    def __call__(self, widths: Sequence[int]) -> float:
        """The loss at `widths`, one for each layer."""
        return self.constant + sum(self.parts(i, [width])[0] for i, width in enumerate(widths))


def fit(sizes: Sequence[int], samples: Sequence[Widths], losses: Sequence[float]) -> Predictor:
    """The predictor whose ridge predicts each sample best from the others (leave-one-out, in closed form).

    Args:
        sizes: F of each layer.
        samples: widths of all layers, some of which differ.
        losses: of each sample.

    Raises:
        InputError: losses that are not finite, or another number of them.
    """
    y = np.asarray(losses, dtype=np.float64)
    check(len(samples) == len(y), "losses", f"be given for {len(samples)} samples", len(y))
    check(bool(np.isfinite(y).all()), "losses", "be finite", y[~np.isfinite(y)][:1].tolist())
    x = 1 - np.asarray(samples, dtype=np.float64) / np.asarray(sizes, dtype=np.float64)
    powers = x[:, :, None] ** _POWERS  # [N, L, 2]
    own, common = powers.reshape(len(y), -1), powers.sum(1)
    mean, scale = own.mean(0), np.where(own.std(0) > _LITTLE, own.std(0), 1.0)
    columns = np.concatenate([np.ones((len(y), 1)), common, (own - mean) / scale], 1)
    penalty = np.r_[np.zeros(1 + len(_POWERS)), np.ones(own.shape[1])]
    best: tuple[float, float, np.ndarray] | None = None
    for ridge in _RIDGES:
        # A little on every column, for samples may be alike in the free ones.
        solved = np.linalg.solve(columns.T @ columns + np.diag(ridge * penalty + _LITTLE), columns.T)
        influence = np.minimum((columns * solved.T).sum(1), 1 - _LITTLE)
        found = solved @ y
        error = float(np.sqrt(np.mean(((y - columns @ found) / (1 - influence)) ** 2)))
        if best is None or error < best[0]:
            best = error, ridge, found
    assert best is not None
    error, ridge, found = best
    free, single = found[1 : 1 + len(_POWERS)], found[1 + len(_POWERS) :] / scale
    return Predictor(
        tuple(sizes), free + single.reshape(-1, len(_POWERS)), float(found[0] - single @ mean), ridge, error
    )


def search(
    predictor: Predictor,
    choices: Sequence[Sequence[int]],
    samples: Sequence[Widths],
    budget: int,
    count: int,
) -> list[Widths]:
    """The widths that the predictor likes best, in ever larger surroundings of the first sample.

    The predictor is a sum over layers, so the optimum is exact (`exact`). It knows only what it has seen: number k of
    the surroundings reaches k / `count` of the way from the first sample's width to the layer's extremes among samples.

    Args:
        predictor: of the loss.
        choices: widths that each layer may get.
        samples: the first of which keeps the budget.
        budget: of the sum of widths.
        count: how many surroundings.
    """
    start = np.asarray(samples[0], dtype=np.float64)
    ends = [np.asarray(samples).min(0), np.asarray(samples).max(0)]
    found: dict[Widths, None] = {}
    for k in range(1, count + 1):
        low, high = (start + (end - start) * k / count for end in ends)
        near = [
            [w for w in reversed(row) if a - 1e-6 <= w <= b + 1e-6]
            for row, a, b in zip(choices, low, high, strict=True)
        ]
        # More neurons are never worse, and of equals the widest stands first: so nothing is left unspent.
        parts = [predictor.parts(i, row) for i, row in enumerate(near)]
        losses = [np.minimum.accumulate(part[::-1])[::-1].tolist() for part in parts]
        chosen = exact(losses, near, budget)
        found[tuple(row[i] for row, i in zip(near, chosen, strict=True))] = None
    return list(found)
