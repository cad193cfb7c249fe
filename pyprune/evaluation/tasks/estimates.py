"""What a task's single scores say of two models: means, the paired difference, and the share that is retained.

Every interval is 95 %, by bootstrap over items, all values of an item drawn together. A metric is rescaled to chance
before a share of it is taken, (value - chance) / (1 - chance), so that guessing retains nothing and tasks with
different chances can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...base.errors import check
from ..intervals import bootstrap, bootstrap_of, paired_bootstrap


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    interval: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"value": self.value, "interval": list(self.interval)}


@dataclass(frozen=True)
class Metric:
    """One metric of one task.

    Attributes:
        dense, pruned: means over items.
        difference: dense minus pruned.
        relative_loss: that over dense; None where dense is 0.
        retained: (pruned - chance) / (dense - chance); None without a chance, or where the dense model is not shown to
            be better than chance: there is nothing to retain then.
        chance: what guessing gives, or None for what is no score.
    """

    dense: Estimate
    pruned: Estimate | None
    difference: Estimate | None
    relative_loss: Estimate | None
    retained: Estimate | None
    chance: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    """Elementwise; NaN where the denominator is not above 0."""
    return torch.where(under > 0, over / under, torch.nan)


def estimate(values: Tensor, seed: int = 0) -> Estimate:
    """The mean of `[N]`."""
    return Estimate(float(values.double().mean()), bootstrap(values, seed))


def metric(dense: Tensor, pruned: Tensor | None, chance: float | None, seed: int = 0) -> Metric:
    """A metric of N items.

    Args:
        dense, pruned: `[N]` of the same items; `pruned` may be None.
        chance: what guessing gives, below 1, or None.
        seed: of the bootstrap.

    Raises:
        InputError: no item, or different numbers of them.
    """
    check(dense.ndim == 1 and len(dense) > 0, "dense", "be [N], not empty", tuple(dense.shape))
    mine = estimate(dense, seed)
    if pruned is None:
        return Metric(mine, None, None, None, None, chance)
    check(pruned.shape == dense.shape, "pruned", f"have the same {len(dense)} items", tuple(pruned.shape))
    theirs = estimate(pruned, seed)
    difference = Estimate(mine.value - theirs.value, paired_bootstrap(dense, pruned, seed))
    both = torch.stack([dense.double(), pruned.double()], 1)
    loss, retained = None, None
    if mine.value > 0:
        found = bootstrap_of(both, lambda m: _ratio(m[:, 0] - m[:, 1], m[:, 0]), seed)
        loss = Estimate(difference.value / mine.value, found)
    if chance is not None and mine.interval[0] > chance:
        found = bootstrap_of(both, lambda m: _ratio(m[:, 1] - chance, m[:, 0] - chance), seed)
        retained = Estimate((theirs.value - chance) / (mine.value - chance), found)
    return Metric(mine, theirs, difference, loss, retained, chance)


@dataclass(frozen=True)
class Scores:
    """The single scores of one metric of one task.

    Attributes:
        ids: of what is asked; empty texts where the file names none.
        dense, pruned: `[N]`.
        chance: what guessing gives.
    """

    ids: Sequence[str]
    dense: Tensor
    pruned: Tensor
    chance: float


@dataclass(frozen=True)
class Order:
    """Which of two ways to ask for the same facts suffers more.

    Attributes:
        first, second: shares retained, above chance.
        difference: first minus second: above 0 where the second suffers more.
        facts: how many were asked both ways.
    """

    first: float
    second: float
    difference: Estimate
    facts: int

    def verdict(self) -> str:
        """`second`, `first` or `undecided`: which suffers more, by whether the interval leaves out 0."""
        low, high = self.difference.interval
        return "second" if low > 0 else "first" if high < 0 else "undecided"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        facts = {"first": self.first, "second": self.second, "facts": self.facts}
        return {**facts, "difference": self.difference.to_json(), "suffers_more": self.verdict()}


def order(first: Scores, second: Scores, seed: int = 0) -> Order | None:
    """Compare the shares retained on the facts that both ask, drawn together; None where nothing can be said.

    That is: less than two facts in common, or a dense model that is not shown to be better than chance at one of them.
    """
    places = [{name: i for i, name in enumerate(s.ids) if name} for s in (first, second)]
    shared = [name for name in places[0] if name in places[1]]
    if len(shared) < 2:
        return None
    columns = []
    for scores, place in zip((first, second), places, strict=True):
        rows = torch.tensor([place[name] for name in shared])
        # Chance off already: a share retained is then the ratio of two means.
        columns += [scores.dense[rows].double() - scores.chance, scores.pruned[rows].double() - scores.chance]
        if bootstrap(columns[-2], seed)[0] <= 0:
            return None

    def statistic(m: Tensor) -> Tensor:
        return _ratio(m[:, 1], m[:, 0]) - _ratio(m[:, 3], m[:, 2])

    table = torch.stack(columns, 1)
    means = table.mean(0)
    one, other = float(means[1] / means[0]), float(means[3] / means[2])
    return Order(one, other, Estimate(one - other, bootstrap_of(table, statistic, seed)), len(shared))
