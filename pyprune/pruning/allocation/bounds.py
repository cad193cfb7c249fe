"""What every allocation obeys: multiples, floors, layers that are protected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...base.errors import check
from ...model.mask import KeepIndex


def round_width(width: float, multiple: int, intermediate_size: int) -> int:
    """The multiple of `multiple` nearest to `width`, at least one multiple, at most `intermediate_size`.

    The full width is always allowed, also where it is no multiple.
    """
    rounded = max(1, int(width / multiple + 0.5)) * multiple
    return intermediate_size if width >= intermediate_size else min(rounded, intermediate_size)


def check_narrows(
    sizes: Sequence[int], widths: Sequence[int], keep: float, multiple: int, protect: tuple[int, int] = (0, 0)
) -> None:
    """Raise `InputError` when `widths` remove nothing although `keep` is below 1, for want of a width that is near.

    Args:
        sizes: F of each layer.
        widths: neurons that each is to keep.
        keep: share of all neurons that should stay.
        multiple: widths were rounded to it.
        protect: how many of the first and of the last layers keep all neurons.
    """
    if keep >= 1 or list(widths) != list(sizes):
        return
    free = [size for size, whole in zip(sizes, protected_layers(sizes, protect), strict=True) if not whole]
    size = max(free, default=0)
    below = (size - 1) // multiple * multiple if size else 0
    nearest = f"{below} or {size}" if below else f"{size} alone"
    rule = f"leave a width near keep {keep} of {size} neurons (nearest possible: {nearest}), or nothing is removed"
    check(not free, "multiple", rule, multiple)


def standardise(scores: Tensor) -> Tensor:
    """z-scores within one layer, so that layers can be compared (FLAP, An et al. 2023, arXiv 2312.11983, section 3)."""
    deviation = scores.std(correction=0)
    return (scores - scores.mean()) / deviation if deviation > 0 else torch.zeros_like(scores)


def protected_layers(sizes: Sequence[int], protect: tuple[int, int]) -> list[bool]:
    """Whether each layer is one of the first `protect[0]` or of the last `protect[1]`."""
    first, last = protect
    check(first >= 0 and last >= 0, "protect", "be two counts of layers, the first and the last ones", protect)
    return [i < first or i >= len(sizes) - last for i in range(len(sizes))]


def share_left(sizes: Sequence[int], keep: float, least: Sequence[int], protect: tuple[int, int]) -> float:
    """The share that layers outside `protect` keep, so that all layers together keep `keep`.

    Raises:
        InputError: the protected layers and the `least` neurons of the others exceed the budget.
    """
    safe = protected_layers(sizes, protect)
    if not any(safe):
        return keep
    spent = sum(size for size, whole in zip(sizes, safe, strict=True) if whole)
    others = sum(sizes) - spent
    needed = spent + sum(low for low, whole in zip(least, safe, strict=True) if not whole)
    budget = keep * sum(sizes)
    message = f"leave others enough: at keep {keep} all layers share {budget:.0f} neurons, and need {needed} at least"
    check(needed <= budget + 1e-6, "protect", message, protect)
    return min(1.0, (budget - spent) / others) if others else 1.0


def highest(scores: Sequence[Tensor], widths: Sequence[int]) -> list[KeepIndex]:
    """The keep index of each layer at its width."""
    pairs = zip(scores, widths, strict=True)
    return [KeepIndex.from_scores(s, w, f"scores of layer {i}") for i, (s, w) in enumerate(pairs)]


def least_widths(sizes: Sequence[int], multiple: int = 1, floor: float = 0.0) -> list[int]:
    """The least width of each layer: its share `floor`, rounded up to whole multiples, and one multiple at least."""
    # The tolerance keeps 0.3 * 10 = 3.0000000000000004 from becoming 4.
    least = [math.ceil(floor * size - 1e-9) for size in sizes]
    return [min(size, max(1, math.ceil(n / multiple)) * multiple) for n, size in zip(least, sizes, strict=True)]


def candidate_widths(
    sizes: Sequence[int], multiple: int = 1, floor: float = 0.0, protect: tuple[int, int] = (0, 0)
) -> list[list[int]]:
    """The widths that each layer may get, ascending: multiples from its floor up, and its full width.

    Args:
        sizes: F of each layer.
        multiple: widths are multiples of it.
        floor: least share kept in any layer.
        protect: how many of the first and of the last layers have their full width only.
    """
    whole = protected_layers(sizes, protect)
    return [
        [size] if safe else [*range(low, size, multiple), size]
        for size, low, safe in zip(sizes, least_widths(sizes, multiple, floor), whole, strict=True)
    ]
