"""What a criterion gets and gives, and the table of them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...base.errors import check
from ...base.statistics import ActivationStats, GradientStats
from ...model.patterns import FFNWeights

# What a criterion may need, and what of its statistics must be there then.
NEEDS: dict[str, str] = {
    "activations": "stats",
    "gram": "stats.gram",
    "gradients": "stats.gradients.parts",
    "gradients2": "stats.gradients.parts_square",
}


def _missing(stats: ActivationStats | None, need: str) -> str | None:
    """The first attribute on the path of `need` that is not there, dotted from `stats`, or None where all are there."""
    value: Any = stats
    path = ""
    for name in NEEDS[need].split("."):
        path = f"{path}.{name}".lstrip(".")
        value = stats if name == "stats" else getattr(value, name)
        if value is None or value == ():
            return path
    return None


def gradients(stats: ActivationStats) -> GradientStats:
    """The gradients, where a criterion asked for them."""
    assert stats.gradients is not None
    return stats.gradients


# Stats are None only where the criterion does not ask for them, so a score function may declare them as given.
Score = Callable[[FFNWeights, Any, torch.Generator], Tensor]


@dataclass(frozen=True)
class Criterion:
    """One importance criterion.

    Attributes:
        name: as on the command line.
        summary: the formula in one line.
        source: the paper, with section or equation.
        needs: what of the statistics the scores need, keys of `NEEDS`; empty: weights are enough.
        score: `(weights, stats, generator) -> [F]`.
    """

    name: str
    summary: str
    source: str
    needs: frozenset[str]
    score: Score

    @property
    def needs_activations(self) -> bool:
        """Whether the scores need any statistics, so calibration text."""
        return bool(self.needs)

    def __call__(
        self, weights: FFNWeights, stats: ActivationStats | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Scores `[F]` (float64) of one FFN's neurons.

        Raises:
            InputError: the criterion needs statistics that were not given.
        """
        for need in sorted(self.needs):
            missing = _missing(stats, need)
            check(missing is None, missing or "", f"be given for method {self.name!r}", None)
        return self.score(weights, stats, generator or torch.Generator().manual_seed(0)).double().cpu()


CRITERIA: dict[str, Criterion] = {}


def criterion(name: str, *, summary: str, source: str, needs: Iterable[str] = ()) -> Callable[[Score], Score]:
    """Register the decorated score function under `name`; `needs` are keys of `NEEDS`."""
    needed = frozenset(needs)
    if unknown := needed - NEEDS.keys():
        raise RuntimeError(f"criterion {name!r} needs {sorted(unknown)}, not in {list(NEEDS)}")

    def register(score: Score) -> Score:
        if name in CRITERIA:
            raise RuntimeError(f"two criteria are called {name!r}")
        CRITERIA[name] = Criterion(name, summary, source, needed, score)
        return score

    return register
