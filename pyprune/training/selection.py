"""Scores -> how many neurons each layer keeps while training -> which.

Everything keeps the highest scores of a layer; the three functions differ in how many that are. Scores are compared
as they are: unlike in `allocation`, nothing is standardised, for that is how the learned scores were published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..pruning.allocation import bounds
from ..pruning.allocation.bounds import round_width


def _least(size: int, floor: float, multiple: int) -> int:
    """The fewest neurons that a layer may keep: its floor, and one multiple."""
    wanted = max(1, math.ceil(floor * size - 1e-9))  # 0.3 * 10 = 3.0000000000000004 must not become 4
    return min(size, math.ceil(wanted / multiple) * multiple)


def layer_widths(scores: Sequence[Tensor], share: float, floor: float = 0.0, multiple: int = 1) -> list[int]:
    """The same share in every layer."""
    sizes = [s.numel() for s in scores]
    return [max(round_width(share * n, multiple, n), _least(n, floor, multiple)) for n in sizes]


def check_narrows(sizes: Sequence[int], scope: str, share: float, floor: float, multiple: int) -> None:
    """Raise `InputError` when no layer can become narrower at the final `share`, though that is below 1."""
    if scope == "layer":
        widths = layer_widths([torch.zeros(n) for n in sizes], share, floor, multiple)
    else:
        widths = [_least(n, floor, multiple) for n in sizes]
    bounds.check_narrows(sizes, widths, share, multiple)


def global_widths(scores: Sequence[Tensor], share: float, floor: float = 0.0, multiple: int = 1) -> list[int]:
    """How many of the `share` of all neurons with the highest scores lie in each layer.

    Every layer is given its floor first (at least one neuron); what is left goes to the highest scores anywhere. Of
    equal scores the earlier layer's comes first. With a `multiple`, widths are rounded so that the total stays as near
    to `share` as it can: down first, then up where most was cut off.
    """
    sizes = [s.numel() for s in scores]
    budget = max(round(share * sum(sizes)), len(sizes))
    least = [_least(n, floor, 1) for n in sizes]
    ranked = []
    for s, count in zip(scores, least, strict=True):
        s = s.float().cpu().clone()
        s[s.argsort(descending=True, stable=True)[:count]] = math.inf
        ranked.append(s)
    layer = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])
    best = torch.cat(ranked).argsort(descending=True, stable=True)[: max(budget, sum(least))]
    counts = torch.bincount(layer[best], minlength=len(sizes)).tolist()
    if multiple == 1:
        return counts
    widths = [
        max(c if c == n else c // multiple * multiple, _least(n, floor, multiple))
        for c, n in zip(counts, sizes, strict=True)
    ]
    while True:
        room = [i for i, n in enumerate(sizes) if widths[i] < n]
        if not room:
            return widths
        best_layer = max(room, key=lambda i: counts[i] - widths[i])
        grow = min(multiple, sizes[best_layer] - widths[best_layer])
        if sum(widths) + grow / 2 > budget:
            return widths
        widths[best_layer] += grow


def threshold_widths(scores: Sequence[Tensor], threshold: float, floor: float = 0.0, multiple: int = 1) -> list[int]:
    """How many scores of each layer have sigmoid(s) > `threshold`."""
    counts = torch.stack([(s.sigmoid() > threshold).sum() for s in scores]).tolist()
    pairs = zip(counts, (s.numel() for s in scores), strict=True)
    return [max(round_width(c, multiple, n), _least(n, floor, multiple)) for c, n in pairs]


def top(scores: Tensor, width: int) -> Tensor:
    """`[F]` bool, true for the `width` highest of `scores` `[F]`; of equal ones the lower number comes first."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep[scores.argsort(descending=True, stable=True)[:width]] = True
    return keep
