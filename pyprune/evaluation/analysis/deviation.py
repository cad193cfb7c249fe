"""How far what a pruned model computes is from what the dense one computes: for vectors, and for probabilities.

All of it in float64 and without the cancellation that the textbook forms suffer where the two are nearly equal: one
minus a cosine comes from the difference of unit vectors, a KL divergence from terms that are never negative. Identical
inputs give exactly zero.

Spaces, estimates and amplification: He et al. 2026, arXiv 2603.24652. With z the logits of the dense model, Delta those
of the pruned one minus z, and p = softmax(z / T), to second order in Delta

    1 - cos(z, z + Delta) = norm(Delta_orthogonal)^2 / (2 norm(z)^2)
    1 - cos(p, p')        = Var_r(Delta) / (2 T^2),   r_i proportional to p_i^2
    KL(p || p')           = Var_p(Delta) / (2 T^2)

so what counts in probability space is how unevenly the logits of the likely tokens move, not how far all of them do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ...base.errors import check, check_choice, is_finite

VECTOR = ("cosine", "angle", "norm", "parallel", "orthogonal", "estimate")
PROBABILITY = (
    "cosine",
    "cosine_estimate",
    "kl",
    "kl_estimate",
    "kl_reverse",
    "js",
    "total_variation",
    "top1",
    "top5",
    "entropy",
    "entropy_pruned",
    "change",
    "change_estimate",
    "change_bound",
)
_TOP = 5
# Elements of a block of rows: small enough for a core's cache, since a row takes some thirty passes.
_BLOCK = 1 << 17
_LOG2 = math.log(2.0)
_ZERO = torch.zeros((), dtype=torch.float64)


def _check_pair(dense: Tensor, pruned: Tensor) -> None:
    check(dense.ndim == 2 and dense.numel() > 0, "dense", "be [T, D], not empty", tuple(dense.shape))
    check(dense.shape == pruned.shape, "pruned", f"be {tuple(dense.shape)}, as dense is", tuple(pruned.shape))
    for name, value in (("dense", dense), ("pruned", pruned)):
        check(bool(value.isfinite().all()), name, "be finite", "NaN or infinity")


def _blocks(dense: Tensor, pruned: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, _BLOCK // dense.shape[1])
    for i in range(0, len(dense), rows):
        yield dense[i : i + rows], pruned[i : i + rows]


def _joined(
    measure: Callable[[Tensor, Tensor], dict[str, Tensor]], names: Sequence[str], dense: Tensor, pruned: Tensor
) -> dict[str, Tensor]:
    """What `measure` finds in every block of rows, one after the other."""
    # One table for all: small results kept between large temporaries would pin the heap's pages, block after block.
    table = torch.empty(len(names), len(dense), dtype=torch.float64, device=dense.device)
    done = 0
    for a, b in _blocks(dense, pruned):
        _fill(table[:, done : done + len(a)], names, measure(a, b))
        done += len(a)
    return dict(zip(names, table, strict=True))


def _fill(table: Tensor, names: Sequence[str], found: dict[str, Tensor]) -> None:
    for row, name in zip(table, names, strict=True):
        row.copy_(found[name])


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; rows of zeros stay."""
    # Divided by the largest entry first: squares of very small or large ones would leave float64's range.
    rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    norm = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norm > 0, norm, 1.0)


def _cosine_deviation(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of rows `[T, D]`; 0 for two rows of zeros, 1 for one."""
    a, b = _unit(a), _unit(b)
    half = (a - b).square().sum(1) / 2
    one_is_zero = a.any(1) != b.any(1)
    return torch.where(one_is_zero, 1.0, half)


def _vectors(dense: Tensor, pruned: Tensor, centred: bool) -> dict[str, Tensor]:
    """`vector_deviation` of one block of rows."""
    x, y = dense.double(), pruned.double()
    if centred:
        x, y = (rows - rows.mean(1, keepdim=True) for rows in (x, y))
    unit_x, unit_y = _unit(x), _unit(y)
    # Kahan's form: exact for angles near 0 and near 180 degrees alike.
    angle = 2 * torch.atan2((unit_x - unit_y).norm(dim=1), (unit_x + unit_y).norm(dim=1))
    angle = torch.where(unit_x.any(1) != unit_y.any(1), math.pi / 2, angle)
    length, other = x.norm(dim=1), y.norm(dim=1)
    difference = y - x
    along = (difference * unit_x).sum(1)
    across = (difference - along[:, None] * unit_x).norm(dim=1)
    scale = torch.where(length > 0, length, math.inf)
    return {
        "cosine": _cosine_deviation(x, y),
        "angle": angle * (180 / math.pi),
        "norm": torch.where((length == 0) & (other == 0), 1.0, other / length),
        "parallel": along / scale,
        "orthogonal": across / scale,
        "estimate": (across / scale).square() / 2,
    }


def vector_deviation(dense: Tensor, pruned: Tensor, centred: bool = False) -> dict[str, Tensor]:
    """Deviations of the rows of `pruned` from those of `dense`.

    Args:
        dense, pruned: `[T, D]`.
        centred: of the rows less their means, a block at a time.

    Returns:
        `[T]` float64 each. `cosine`: 1 - cos. `angle`: in degrees. `norm`: norm(pruned) / norm(dense), 1 for two rows
        of zeros. `parallel` (signed) and `orthogonal`: parts of the difference along `dense` and across it, relative to
        norm(dense); 0 for a dense row of zeros. `estimate`: of `cosine`, orthogonal^2 / 2.

    Raises:
        InputError: shapes differ, or values are not finite.
    """
    _check_pair(dense, pruned)
    return _joined(partial(_vectors, centred=centred), VECTOR, dense, pruned)


def _variance(weights: Tensor, values: Tensor) -> Tensor:
    mean = (weights * values).sum(1, keepdim=True)
    return (weights * (values - mean).square()).sum(1)


def _bregman(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """Sum of q - p - p d, with d = log(q / p): KL(p || q), every term at least 0."""
    # exp(d) - 1 - d is exact enough near 0, q - p - p d where exp(d) could overflow.
    small = d.abs() < 1.0
    near = torch.where(small, d, 0.0)
    return torch.where(small, p * (torch.expm1(near) - near), q - p - p * d).sum(1)


def _jensen_shannon(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """Jensen-Shannon divergence, with d = log(q / p)."""
    small = d.abs() < 1.0  # log of the mixture over p: the first form is exact near 0, the second cannot overflow
    gap = torch.where(small, torch.log1p(torch.expm1(torch.where(small, d, 0.0)) / 2), d.logaddexp(_ZERO) - _LOG2)
    return ((q * (d - gap) - p * gap).sum(1) / 2).clamp_min(0.0)


def _shared_top(a: Tensor, b: Tensor) -> Tensor:
    """Share of the likeliest few of one that are among those of the other."""
    count = min(_TOP, a.shape[1])
    top_a, top_b = a.topk(count, dim=1).indices, b.topk(count, dim=1).indices
    return (top_a[:, :, None] == top_b[:, None, :]).any(2).double().mean(1)


def _probabilities(a: Tensor, b: Tensor, temperature: float, names: Sequence[str]) -> dict[str, Tensor]:
    """`probability_deviation` of one block of rows; a measure that nobody asked for costs nothing."""
    z, change = a.double() / temperature, (b.double() - a.double()) / temperature
    log_p = z.log_softmax(1)
    p = log_p.exp()
    # log(q / p), from the change of the logits and not from two logarithms.
    d = change - (log_p + change).logsumexp(1, keepdim=True)
    d = torch.where((change == 0).all(1, keepdim=True), 0.0, d)
    log_q = log_p + d
    q = log_q.exp()
    norm = p.norm(dim=1)

    def squared() -> Tensor:
        r = p.square()
        return r / r.sum(1, keepdim=True)

    measures: dict[str, Callable[[], Tensor]] = {
        "cosine": lambda: _cosine_deviation(p, q),
        "cosine_estimate": lambda: _variance(squared(), change) / 2,
        "kl": lambda: _bregman(p, q, d),
        "kl_estimate": lambda: _variance(p, change) / 2,
        "kl_reverse": lambda: _bregman(q, p, -d),
        "js": lambda: _jensen_shannon(p, q, d),
        "total_variation": lambda: (p - q).abs().sum(1) / 2,
        "top1": lambda: (a.argmax(1) == b.argmax(1)).double(),
        "top5": lambda: _shared_top(a, b),
        "entropy": lambda: -(p * log_p).sum(1),
        "entropy_pruned": lambda: -(q * log_q).sum(1),
        "change": lambda: (q - p).norm(dim=1) / norm,
        "change_estimate": lambda: (p * (change - (p * change).sum(1, keepdim=True))).norm(dim=1) / norm,
        "change_bound": lambda: (change - change.mean(1, keepdim=True)).norm(dim=1) / (2 * norm),
    }
    return {name: measures[name]() for name in names}


def probability_deviation(
    dense: Tensor, pruned: Tensor, temperature: float = 1.0, names: Sequence[str] = PROBABILITY
) -> dict[str, Tensor]:
    """Deviations between the softmax of the rows of `pruned` and of `dense`, both divided by a temperature.

    Args:
        dense, pruned: `[T, V]` logits.
        temperature: T of the softmax, above 0.
        names: which of the measures, since some take as long as all others together.

    Returns:
        `[T]` float64 each, p of the dense model and q of the pruned one, KL and entropies in nats. `cosine`: 1 - cos(p,
        q), and `cosine_estimate`, its second order. `kl`: KL(p || q), and `kl_estimate`. `kl_reverse`: KL(q || p).
        `js`: Jensen-Shannon, at most log 2. `total_variation`: half the sum of abs(p - q). `top1`: 1 where both have
        the same likeliest token. `top5`: share of the five likeliest of one that are among those of the other.
        `entropy`, `entropy_pruned`. `change`: norm(q - p) / norm(p); `change_estimate`: of it to first order, by the
        softmax Jacobian, norm(J Delta) / norm(p) with J = (diag(p) - p p^T) / T; `change_bound`: what it can be at
        most, norm(Delta - mean) / (2 T norm(p)), since no softmax has a Jacobian of norm above 1 / (2 T).

    Raises:
        InputError: shapes differ, values that are not finite, a temperature that is not above 0, or an unknown measure.

    Source: He et al. 2026, arXiv 2603.24652 (the estimates); see the module's text.
    """
    check(is_finite(temperature) and temperature > 0, "temperature", "be above 0 and finite", temperature)
    _check_pair(dense, pruned)
    for name in names:
        check_choice(name, "names", PROBABILITY)
    return _joined(partial(_probabilities, temperature=temperature, names=names), names, dense, pruned)
