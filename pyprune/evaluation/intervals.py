"""95 % intervals by the bootstrap over items: of a mean, and of anything made from several means of the same items.

Percentiles of the bootstrap are too narrow where items are few (of those of 8 items 89 % hold the mean): their
variance lacks a factor of n / (n - 1), and their tails are the normal's. So they are taken further out, by Student's t
(the expanded percentile interval of Hesterberg 2015, What teachers should know about the bootstrap, arXiv 1411.5279).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import torch
from torch import Tensor

_RESAMPLES = 2000
_NORMAL = NormalDist()
_FEW = (12.706, 4.303)


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, within 0.2 %.

    From 3 degrees of freedom on by the expansion in powers of their inverse (Abramowitz and Stegun 26.7.5).
    """
    if freedom <= len(_FEW):
        return _FEW[freedom - 1]
    z = _NORMAL.inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**i for i, term in enumerate(terms, 1))


def tails(items: int, freedom: int) -> Tensor:
    """The shares of resamples below and above which nothing counts; `items` are the fewest that a mean is of."""
    if items < 2:
        return torch.tensor([0.025, 0.975], dtype=torch.float64)
    low = _NORMAL.cdf(-math.sqrt(items / (items - 1)) * student_t(freedom))
    return torch.tensor([low, 1 - low], dtype=torch.float64)


def resampled_means(columns: Tensor, seed: int = 0) -> Tensor:
    """`[R, C]` float64: means of the columns of `[N, C]` over R samples of N rows, a row's values drawn together."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(columns), (_RESAMPLES, len(columns)), generator=generator)
    return columns.double()[drawn].mean(1)


def bootstrap(values: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values` `[N]`, by percentiles of the means of samples drawn from them."""
    n = len(values)
    low, high = resampled_means(values[:, None], seed)[:, 0].quantile(tails(n, n - 1))
    return float(low), float(high)


def paired_bootstrap(a: Tensor, b: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % interval of mean(a) - mean(b), both `[N]` of the same items: the two of an item are drawn together."""
    return bootstrap(a.double() - b.double(), seed)


def bootstrap_of(columns: Tensor, statistic: Callable[[Tensor], Tensor], seed: int = 0) -> tuple[float, float]:
    """95 % interval of a statistic of means.

    Args:
        columns: `[N, C]`, C values of each of N items.
        statistic: means `[R, C]` -> `[R]`; where it is NaN (a ratio over nothing) the sample does not count.
        seed: of what is drawn.

    Returns:
        The interval; NaN where no sample counts.
    """
    n = len(columns)
    low, high = statistic(resampled_means(columns, seed)).nanquantile(tails(n, n - 1))
    return float(low), float(high)


def bootstrap_mean_of_means(groups: Sequence[Tensor], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over groups of their means, `[N_i]` each; every group is drawn by itself."""
    means = [resampled_means(values[:, None], seed + i)[:, 0] for i, values in enumerate(groups)]
    sizes = [len(values) for values in groups]
    low, high = torch.stack(means).mean(0).quantile(tails(min(sizes), sum(sizes) - len(sizes)))
    return float(low), float(high)
