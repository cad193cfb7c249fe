"""Least squares: new down rows for the kept neurons, fitted to the dense output.

Symbols: V `[F, D]` down rows, H the second moment of the activations that enter the down projection, S kept, R removed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...base.errors import InputError, UnsupportedModelError, check, is_finite, is_number
from ...base.ranks import ALONE, Ranks
from ...base.statistics import ActivationStats
from ...model.described import Described
from ..calibration import adds_ffn
from ..importance.obs import DAMPING
from .base import REPAIRS, Fitted, Layer, Repair


@dataclass(frozen=True)
class Solved:
    """A new down projection for the kept neurons.

    Attributes:
        down: `[K, D]` float64 rows for the kept neurons.
        error_before, error_after: squared error of the FFN's output over the calibration tokens, relative to the
            squared dense output (both without the down bias), for the bare cut and for the repair.
        damping: the ridge of the fit.
    """

    down: Tensor
    error_before: float
    error_after: float
    damping: float


# Of the dense model's residual stream: what measured best on text that no fit had seen (bench/notes/quality.md).
TARGET = 0.5
# Of these the ridge is chosen where nobody gives it.
DAMPINGS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


def check_tokens(ids: Tensor, width: int, damping: float | None) -> None:
    """Raise `InputError` when `ids` (`[N, W]`) hold fewer tokens than the `width` neurons of a layer to fit.

    Where the damping is chosen (None), the held-out quarter of the windows is not fitted.
    """
    seen = ids.numel() if damping is not None else ids.numel() - max(1, len(ids) // 4) * ids.shape[1]
    needed = width if damping is not None else -(-4 * width // 3)
    rule = f"hold at least {needed} tokens to fit {width} neurons a layer (least squares)"
    check(seen >= width, "text", rule, f"{ids.numel()} tokens")


def warn_of_dead(dead: Sequence[int], neurons: int) -> None:
    """Warn when neurons were never active: nothing can be fitted to them.

    Args:
        dead: how many in each layer.
        neurons: of all layers.
    """
    if any(dead):
        warnings.warn(
            f"{sum(dead)} of {neurons} neurons, in {sum(map(bool, dead))} layers, were never active on the calibration "
            "text: their scores are zero, and only the damping makes their fit well-posed",
            stacklevel=6,
        )


def least_squares(
    down: Tensor,
    stats: ActivationStats,
    keep: Tensor,
    damping: float | None,
    target: float = 0.0,
    ranks: Ranks = ALONE,
) -> Solved:
    """Down rows of the kept neurons that minimise the output error over the calibration tokens, with a ridge.

        V' = H_SS^-1 (H_S: V + target * X_S / T),    H = C / T + damping * mean(diag(C / T)) * I

    so the ridge draws V' towards the old rows, not towards zero. Cholesky in float64. X is `stats.cross`: with `target`
    above 0 the rows also make up for that share of what the dense model's hidden state has more.

    Args:
        down: `[F, D]` dense down rows.
        stats: with `gram`; with `cross` where `target` is above 0, with `held_out` and `seen` where `damping` is None.
        keep: `[K]` kept neurons.
        damping: lambda above; None takes that of `DAMPINGS` whose fit to the other windows is best on `held_out`.
        target: share of the hidden state's difference to make up for.
        ranks: processes that call this with the same; each solves a part of the columns, which need one another not.

    Raises:
        InputError: the activations are not finite, or `damping` is too small for them.
    """
    assert stats.gram is not None
    hidden = down.shape[1]
    columns = slice(hidden * ranks.rank // ranks.size, hidden * (ranks.rank + 1) // ranks.size)
    v = down[:, columns].double()
    scale = float(stats.gram.diagonal().mean()) / stats.tokens
    if not 0 <= scale < float("inf"):
        raise InputError(f"activations must be finite for least squares; their mean square is {scale}")
    chosen = _choose_damping(v, stats, keep, target, columns, ranks) if damping is None else damping
    if scale == 0:
        return Solved(down[keep].double(), 0.0, 0.0, chosen)  # dead neurons only: the bare cut changes nothing
    fit = _Fit(stats, v, keep, target, columns)
    new = fit.rows(v, chosen)
    energies = torch.stack([fit.energy, _cut_energy(stats.gram, v, keep), fit.error(v, new, chosen)])
    ranks.add(energies)
    if ranks.several:
        parts = ranks.exchange({str(ranks.rank): new}, new.device)
        new = torch.cat([parts[str(rank)] for rank in range(ranks.size)], 1)
    errors = energies[1:] / energies[0].clamp_min(torch.finfo(torch.float64).tiny)
    return Solved(new, float(errors[0]), float(errors[1]), chosen)


class _Fit:
    """The normal equations of one set of kept neurons over some of the calibration tokens.

    These are the largest tensors of a run, so what is not needed again goes. Of C V, half of the work of a fit, come
    both the right side and the errors.

    Attributes:
        energy: the squared dense output, summed over those tokens.
    """

    def __init__(self, stats: ActivationStats, down: Tensor, keep: Tensor, target: float, columns: slice) -> None:
        assert stats.gram is not None
        self.keep, self.tokens, self.gram = keep, stats.tokens, stats.gram
        self.scale = float(stats.gram.diagonal().mean()) / stats.tokens
        given = stats.gram @ down
        self.energy = (down * given).sum()
        self.given = given[keep]  # C_S: V
        del given
        self.more = None
        if target and stats.cross is not None:
            self.more = stats.cross[keep, columns].mul_(target).div_(stats.tokens)

    def rows(self, down: Tensor, damping: float) -> Tensor:
        """`[K, D]`: the fitted down rows, for `down` `[F, D]` in float64."""
        ridge = damping * self.scale
        wanted = self.given / self.tokens
        wanted += down[self.keep].mul_(ridge)  # the ridge's share of H_S: V
        if self.more is not None:
            wanted += self.more
        factor = self.gram[self.keep[:, None], self.keep].div_(self.tokens)
        factor.diagonal().add_(ridge)
        triangle, failed = torch.linalg.cholesky_ex(factor)
        del factor
        if failed:
            raise InputError(f"damping must be large enough to make the second moment positive definite; got {damping}")
        # Not cholesky_solve, which makes a copy of the triangle.
        wanted = torch.linalg.solve_triangular(triangle, wanted, upper=False)
        return torch.linalg.solve_triangular(triangle.mT, wanted, upper=True)

    def error(self, down: Tensor, new: Tensor, damping: float) -> Tensor:
        """The squared change of the output with the rows that `rows` gave for `damping`.

        With V' the new rows, tr(V^T C V) - 2 tr(V'^T C_S: V) + tr(V'^T C_SS V'), where C_SS V' is known from the
        equations that V' solves: it is C_S: V and T times what the target and the ridge added.
        """
        beyond = (down[self.keep] - new).mul_(damping * self.scale)
        if self.more is not None:
            beyond += self.more
        left = self.energy - (new * self.given).sum() + self.tokens * (new * beyond).sum()
        return left.clamp_min(0)  # rounding, where hardly anything changes


def _cut_energy(gram: Tensor, down: Tensor, keep: Tensor) -> Tensor:
    """The squared output of the neurons that are not kept."""
    gone = torch.ones(len(down), dtype=torch.bool, device=down.device)
    gone[keep] = False
    removed = gone.nonzero()[:, 0]
    rows = down[removed]
    return (rows * (gram[removed[:, None], removed] @ rows)).sum()


def _change(down: Tensor, keep: Tensor, new: Tensor) -> Tensor:
    """`[F, D]`: by how much the down rows changed, where rows that are not kept went to zero."""
    change = down.clone()
    change[keep] -= new
    return change


def _choose_damping(
    down: Tensor, stats: ActivationStats, keep: Tensor, target: float, columns: slice, ranks: Ranks
) -> float:
    """That of `DAMPINGS` whose fit to all but the held-out windows leaves the least error on those, mean of sources."""
    held, seen = stats.held_out, stats.seen
    assert held is not None and held.gram is not None and seen is not None
    gram = held.gram
    fit = _Fit(seen, down, keep, target, columns)
    if fit.scale <= 0:
        return DAMPINGS[-1]

    def error(damping: float) -> Tensor:
        change = _change(down, keep, fit.rows(down, damping))
        total = (change * (gram @ change)).sum()
        if target and held.cross is not None:
            total += 2 * target * (change * held.cross[:, columns]).sum()
        return total

    errors = torch.stack([error(damping) for damping in DAMPINGS])
    ranks.add(errors)
    found = errors.tolist()
    return DAMPINGS[found.index(min(found))]


def _adds_ffn(model: nn.Module | Described) -> bool:
    """Whether layers have one FFN each and add what it gives as it is, as far as text can go layer by layer."""
    described = model if isinstance(model, Described) else Described(model)
    try:
        return described.plain and adds_ffn(described.model, described.ffns)
    except UnsupportedModelError:
        return False


@dataclass(frozen=True, kw_only=True)
class Fit(Repair):
    """Base of repairs that fit the kept neurons of a layer to its dense output.

    Attributes:
        damping: ridge of the least-squares fit, as a share of the mean diagonal of the activations' second moment;
            `auto` chooses it for each layer on a quarter of each source's windows that the fit has not seen.
        target: share of the dense model's residual stream in the target of the fit, in [0, 1]: at 0 a layer is fitted
            to its own dense output on the input it gets, at 1 it also makes up for what earlier layers lost. `auto`:
            `TARGET`, or 0 where a model's layers do not add what their FFN puts out as it is, or nothing is sequential.
    """

    damping: float | str = DAMPING
    target: float | str = 0.0

    def __post_init__(self) -> None:
        right = self.damping == "auto" or (is_finite(self.damping) and self.damping > 0)  # type: ignore[operator]
        check(right, "damping", "be positive and finite, or 'auto'", self.damping)
        share = self.target == "auto" or (is_number(self.target) and 0 <= self.target <= 1)  # type: ignore[operator]
        check(share, "target", "lie in [0, 1], or be 'auto'", self.target)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"activations", "gram"} | ({"held_out"} if self.fixed is None else set()))

    @property
    def fixed(self) -> float | None:
        """The damping, or None where it is chosen."""
        return None if isinstance(self.damping, str) else self.damping

    @property
    def share(self) -> float:
        return TARGET if isinstance(self.target, str) else self.target

    def suited(self, model: nn.Module | Described, sequential: bool) -> Fit:
        if not isinstance(self.target, str):
            return self
        return replace(self, target=TARGET if sequential and _adds_ffn(model) else 0.0)

    @property
    def ridge(self) -> float:
        return self.fixed or DAMPING

    def check(self, sequential: bool) -> None:
        right = sequential or self.target in (0, "auto")
        check(right, "target", "be 0 where nothing is sequential", self.target)

    def check_model(self, described: Described) -> None:
        if self.share > 0:
            described.check_plain("target above 0")
        if self.share > 0 and not adds_ffn(described.model, described.ffns):
            raise UnsupportedModelError(
                f"target above 0 needs FFNs whose output is added to the hidden state as it is; in "
                f"{type(described.model).__name__} something stands between (a norm or a multiplier); use target 0"
            )

    def check_tokens(self, ids: Tensor, width: int) -> None:
        check_tokens(ids, width, self.fixed)

    def solve(self, layer: Layer) -> Solved:
        """Down rows by least squares."""
        down = layer.ffn.weights().down
        return least_squares(down, layer.stats, layer.kept, self.fixed, self.share, layer.ranks)


@REPAIRS.add
@dataclass(frozen=True, kw_only=True)
class LeastSquares(Fit):
    """The down rows of the kept neurons are fitted to the dense output. Fields: see `Fit`."""

    NAME = "least-squares"
    SUMMARY = "the down rows of the kept neurons are fitted to the dense output"
    STRUCTURES = frozenset({"experts"})

    def fit(self, layer: Layer) -> Fitted:
        found = self.solve(layer)
        return Fitted(
            down=found.down, error_cut=found.error_before, error_repaired=found.error_after, damping=found.damping
        )
