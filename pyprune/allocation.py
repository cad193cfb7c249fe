"""Scores -> how many neurons each layer keeps -> keep indices."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def standardise(scores: Tensor) -> Tensor:
    """z-scores within one layer, so that layers can be compared (FLAP, An et al. 2023, arXiv 2312.11983, section 3)."""
    deviation = scores.std(correction=0)
    return (scores - scores.mean()) / deviation if deviation > 0 else torch.zeros_like(scores)


def uniform(scores: Sequence[Tensor], keep: float, multiple: int = 1) -> list[KeepIndex]:
    """Every layer keeps the share `keep` of its neurons.

    Args:
        scores: one `[F]` a layer, higher = keep.
        keep: in (0, 1].
        multiple: widths are rounded to it.

    Raises:
        InputError: NaN or infinite scores.
    """
    return [
        KeepIndex.from_scores(s, round_width(keep * s.numel(), multiple, s.numel()), f"scores of layer {i}")
        for i, s in enumerate(scores)
    ]


def global_top(scores: Sequence[Tensor], keep: float, multiple: int = 1, floor: float = 0.0) -> list[KeepIndex]:
    """The share `keep` of all neurons with the highest standardised scores stays; widths differ by layer.

    Widths are rounded to `multiple` so that the total stays as near to `keep` as the multiple allows: each layer
    starts at its floor (at least one multiple), then the layers whose next neurons score highest grow by one multiple
    at a time.

    Args:
        scores: one `[F]` a layer, higher = keep.
        keep: in (0, 1].
        multiple: widths are rounded to it.
        floor: least share kept in any layer.

    Raises:
        InputError: NaN or infinite scores, or `floor` above `keep`.
    """
    check(floor <= keep, "floor", f"be at most keep ({keep})", floor)
    for i, s in enumerate(scores):
        check_scores(s, f"scores of layer {i}")
    ranked = [standardise(s.double()).sort(descending=True).values for s in scores]
    budget = round(keep * sum(s.numel() for s in scores))
    # The tolerance keeps 0.3 * 10 = 3.0000000000000004 from becoming 4.
    least = [math.ceil(floor * s.numel() - 1e-9) for s in scores]
    widths = [min(s.numel(), max(1, math.ceil(n / multiple)) * multiple) for n, s in zip(least, scores, strict=True)]

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
    pairs = zip(scores, widths, strict=True)
    return [KeepIndex.from_scores(s, w, f"scores of layer {i}") for i, (s, w) in enumerate(pairs)]
