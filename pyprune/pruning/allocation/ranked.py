"""Neurons of all layers compete by their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...base.errors import check
from ...model.mask import KeepIndex, check_scores
from .base import ALLOCATIONS, Floored, Layers, Plan
from .bounds import check_narrows, highest, least_widths, protected_layers, share_left, standardise


def global_top(
    scores: Sequence[Tensor],
    keep: float,
    multiple: int = 1,
    floor: float = 0.0,
    protect: tuple[int, int] = (0, 0),
) -> list[KeepIndex]:
    """The share `keep` of all neurons with the highest standardised scores stays; widths differ by layer.

    Widths are rounded to `multiple` so that the total stays as near to `keep` as the multiple allows: each layer
    starts at its floor (at least one multiple), then the layers whose next neurons score highest grow by one multiple
    at a time.

    Args:
        scores: one `[F]` a layer, higher = keep.
        keep: in (0, 1], of all neurons of all layers.
        multiple: widths are rounded to it.
        floor: least share kept in any layer.
        protect: how many of the first and of the last layers keep all neurons.

    Raises:
        InputError: NaN or infinite scores, `floor` above `keep`, `protect` leaves too little to the others, or
            `multiple` no narrower width.
    """
    check(floor <= keep, "floor", f"be at most keep ({keep})", floor)
    for i, s in enumerate(scores):
        check_scores(s, f"scores of layer {i}")
    ranked = [standardise(s.double()).sort(descending=True).values for s in scores]
    sizes = [s.numel() for s in scores]
    budget = round(keep * sum(sizes))
    widths = least_widths(sizes, multiple, floor)
    share_left(sizes, keep, widths, protect)
    widths = [
        size if whole else width
        for size, width, whole in zip(sizes, widths, protected_layers(sizes, protect), strict=True)
    ]

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
    check_narrows(sizes, widths, keep, multiple, protect)
    return highest(scores, widths)


@ALLOCATIONS.add
@dataclass(frozen=True, kw_only=True)
class Global(Floored):
    """Neurons of all layers compete by their standardised scores. Fields: see `Allocation` and `Floored`."""

    NAME = "global"
    SUMMARY = "neurons of all layers compete by their standardised scores"
    SOURCE = "An et al. 2023 (FLAP), arXiv 2312.11983, section 3"

    def plan(self, layers: Layers, keep: float) -> Plan:
        return Plan(global_top(layers.scores(), keep, self.multiple, self.floor, self.protect))
