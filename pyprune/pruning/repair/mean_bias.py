"""The mean of what was removed, in the down bias."""

from __future__ import annotations

from torch import Tensor

from ...base.statistics import ActivationStats


def mean_bias(down: Tensor, stats: ActivationStats, removed: Tensor) -> Tensor:
    """`[D]`: sum over removed neurons of mean(a_j) V_j (FLAP, An et al. 2023, arXiv 2312.11983, section 3)."""
    return stats.mean[removed] @ down[removed].double()
