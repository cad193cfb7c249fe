"""The same share of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...model.mask import KeepIndex
from .base import ALLOCATIONS, Allocation, Layers, Plan
from .bounds import check_narrows, highest, protected_layers, round_width, share_left


def uniform(
    scores: Sequence[Tensor], keep: float, multiple: int = 1, protect: tuple[int, int] = (0, 0)
) -> list[KeepIndex]:
    """Every layer keeps the share `keep` of its neurons; with `protect`, every layer outside the same, smaller one.

    Args:
        scores: one `[F]` a layer, higher = keep.
        keep: in (0, 1], of all neurons of all layers.
        multiple: widths are rounded to it.
        protect: how many of the first and of the last layers keep all neurons (LLM-Pruner, Ma et al. 2023, arXiv
            2305.11627, leaves out the first and last layers like this).

    Raises:
        InputError: NaN or infinite scores, `protect` leaves no neurons to the others, or `multiple` no narrower width.
    """
    return highest(scores, uniform_widths([s.numel() for s in scores], keep, multiple, protect))


def uniform_widths(
    sizes: Sequence[int], keep: float, multiple: int = 1, protect: tuple[int, int] = (0, 0)
) -> list[int]:
    """The widths of `uniform`, for layers of `sizes` neurons."""
    safe = protected_layers(sizes, protect)
    share = share_left(sizes, keep, [min(multiple, size) for size in sizes], protect)
    widths = [
        size if whole else round_width(share * size, multiple, size) for size, whole in zip(sizes, safe, strict=True)
    ]
    check_narrows(sizes, widths, keep, multiple, protect)
    return widths


@ALLOCATIONS.add
@dataclass(frozen=True, kw_only=True)
class Uniform(Allocation):
    """Every layer keeps the same share. Fields: see `Allocation`."""

    NAME = "uniform"
    SUMMARY = "every layer keeps the same share"

    def known(self, sizes: Sequence[int], keep: float) -> list[int]:
        return uniform_widths(sizes, keep, self.multiple, self.protect)

    def plan(self, layers: Layers, keep: float) -> Plan:
        return Plan(self.known(layers.sizes, keep))
