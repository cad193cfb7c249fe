"""95 % intervals by the bootstrap over items: of a mean, and of anything made from several means of the same items."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_RESAMPLES = 2000
_TAILS = torch.tensor([0.025, 0.975], dtype=torch.float64)


def resampled_means(columns: Tensor, seed: int = 0) -> Tensor:
    """`[R, C]` float64: means of the columns of `[N, C]` over R samples of N rows, a row's values drawn together."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(columns), (_RESAMPLES, len(columns)), generator=generator)
    return columns.double()[drawn].mean(1)


def bootstrap(values: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values` `[N]`, by percentiles of the means of samples drawn from them."""
    low, high = resampled_means(values[:, None], seed)[:, 0].quantile(_TAILS)
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
    low, high = statistic(resampled_means(columns, seed)).nanquantile(_TAILS)
    return float(low), float(high)


def bootstrap_mean_of_means(groups: Sequence[Tensor], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over groups of their means, `[N_i]` each; every group is drawn by itself."""
    means = [resampled_means(values[:, None], seed + i)[:, 0] for i, values in enumerate(groups)]
    low, high = torch.stack(means).mean(0).quantile(_TAILS)
    return float(low), float(high)
