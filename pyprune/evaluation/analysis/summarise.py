"""Many values of one measure in a few numbers, with an interval."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..intervals import bootstrap


def number(value: float) -> float | None:
    """`value` where JSON has a word for it, else None."""
    return float(value) if math.isfinite(value) else None


def interval(units: Tensor) -> list[float] | None:
    """95 % of the mean of `units` `[N]`, by bootstrap; None for a single unit, or where one is not finite."""
    return list(bootstrap(units)) if len(units) > 1 and bool(units.isfinite().all()) else None


def summarise(values: Tensor) -> dict[str, Any]:
    """Numbers of a measure, as JSON values.

    Args:
        values: `[N, W]`: N windows or prompts, which are independent, of W tokens, which are not.

    Returns:
        `mean`; `interval`, 95 %, by bootstrap over the N rows, None for one row; `median` and `p90` over all tokens.
    """
    values = values.double()
    levels = torch.tensor([0.5, 0.9], dtype=torch.float64)
    median, high = values.flatten().quantile(levels).tolist()
    return {
        "mean": number(float(values.mean())),
        "interval": interval(values.mean(1)),
        "median": number(median),
        "p90": number(high),
    }
