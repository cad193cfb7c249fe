"""Weight magnitude: the norm of a neuron's weights (Han et al. 2015, arXiv 1506.02626; group form over neurons).

Fan-in is what leads into the neuron (up row, and gate row if there is one), fan-out its down row; `both` is the
norm of all parts concatenated, `product` the product of the parts' norms.
"""

from functools import partial

import torch
from torch import Tensor

from ...base.statistics import ActivationStats
from ...model.patterns import FFNWeights
from .base import criterion

# Numbers that are widened to float64 at once: 512 KB, which a core's cache holds.
_AT_ONCE = 1 << 16


def _norms(part: Tensor, order: int) -> Tensor:
    """`[F]` norms of the rows of `[F, D]`, in float64; of a transposed view too its memory is read in order."""
    across = int(part.stride(0) < part.stride(1))
    rows = max(1, _AT_ONCE // max(1, part.shape[1 - across]))
    widened = (piece.double() for piece in part.split(rows, across))
    sums = [(piece.abs() if order == 1 else piece.square()).sum(1) for piece in widened]
    total = torch.stack(sums).sum(0) if across else torch.cat(sums)
    return total if order == 1 else total.sqrt()


def _magnitude(
    weights: FFNWeights, stats: ActivationStats | None, generator: torch.Generator, *, order: int, part: str
) -> Tensor:
    *fan_in, fan_out = (_norms(part, order) for part in weights.parts)
    chosen = {"fan-in": fan_in, "fan-out": [fan_out]}.get(part, [*fan_in, fan_out])
    norms = torch.stack(chosen)
    return norms.prod(0) if part == "product" else torch.linalg.vector_norm(norms, ord=order, dim=0)


for _order in (1, 2):
    for _part in ("fan-in", "fan-out", "both", "product"):
        criterion(
            f"magnitude-l{_order}-{_part}",
            summary=f"L{_order} norm of a neuron's weights, {_part}",
            source="Han et al. 2015, arXiv 1506.02626, section 3",
        )(partial(_magnitude, order=_order, part=_part))
