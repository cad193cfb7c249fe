"""Repairs of the down projection after neurons were removed.

Symbols: V `[F, D]` down rows, H the second moment of the activations that enter the down projection, S kept, R removed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError
from .importance import ActivationStats


@dataclass(frozen=True)
class Repair:
    """A new down projection for the kept neurons.

    Attributes:
        down: `[K, D]` float64 rows for the kept neurons.
        error_before, error_after: squared error of the FFN's output over the calibration tokens, relative to the
            squared dense output (both without the down bias), for the bare cut and for the repair.
    """

    down: Tensor
    error_before: float
    error_after: float


def _relative_error(gram: Tensor, change: Tensor, down: Tensor) -> float:
    """tr(change^T C change) / tr(V^T C V): the squared output error relative to the squared dense output."""
    dense = (down * (gram @ down)).sum()
    return float((change * (gram @ change)).sum() / dense.clamp_min(torch.finfo(torch.float64).tiny))


def mean_bias(down: Tensor, stats: ActivationStats, removed: Tensor) -> Tensor:
    """`[D]`: sum over removed neurons of mean(a_j) V_j (FLAP, An et al. 2023, arXiv 2312.11983, section 3)."""
    return stats.mean[removed] @ down[removed].double()


def least_squares(down: Tensor, stats: ActivationStats, keep: Tensor, damping: float) -> Repair:
    """Down rows of the kept neurons that minimise the output error over the calibration tokens, with a ridge.

        V' = H_SS^-1 H_S: V,    H = C / T + damping * mean(diag(C / T)) * I

    so the ridge draws V' towards the old rows, not towards zero. Cholesky in float64.

    Args:
        down: `[F, D]` dense down rows.
        stats: with `gram`.
        keep: `[K]` kept neurons.
        damping: lambda above.

    Raises:
        InputError: the activations are not finite, or `damping` is too small for them.
    """
    assert stats.gram is not None
    v = down.double()
    h = stats.gram / stats.tokens
    scale = float(h.diagonal().mean())
    if not 0 <= scale < float("inf"):
        raise InputError(f"activations must be finite for least squares; their mean square is {scale}")
    if scale == 0:
        return Repair(v[keep], 0.0, 0.0)  # dead neurons only: the bare cut changes nothing
    rows = h[keep]
    factor = rows[:, keep].clone()
    factor.diagonal().add_(damping * scale)
    target = rows @ v
    target += damping * scale * v[keep]  # the ridge's share of H_S: V
    triangle, failed = torch.linalg.cholesky_ex(factor)
    if failed:
        raise InputError(f"damping must be large enough to make the second moment positive definite; got {damping}")
    new = torch.cholesky_solve(target, triangle)
    cut = v.clone()
    cut[keep] = 0.0
    change = v.clone()
    change[keep] -= new
    return Repair(new, _relative_error(h, cut, v), _relative_error(h, change, v))
