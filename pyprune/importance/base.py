"""What a criterion gets and gives, and the table of them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import check
from ..patterns import FFNWeights


@dataclass(frozen=True)
class ActivationStats:
    """Moments over calibration tokens of what enters the down projection: a_tj, token t, neuron j.

    Attributes:
        tokens: T.
        mean, abs_mean: `[F]`, means over t of a and of abs(a).
        square_sum: `[F]`, sum over t of a squared.
        gram: `[F, F]`, sum over t of a a^T, or None when nobody asked for it. Float64 like the rest.
    """

    tokens: int
    mean: Tensor
    abs_mean: Tensor
    square_sum: Tensor
    gram: Tensor | None = None

    @property
    def norm(self) -> Tensor:
        """`[F]`, L2 norm over tokens."""
        return self.square_sum.sqrt()

    @property
    def variance(self) -> Tensor:
        """`[F]`, population variance over tokens."""
        return (self.square_sum / self.tokens - self.mean.square()).clamp_min(0.0)


# Stats are None only where the criterion does not ask for them, so a score function may declare them as given.
Score = Callable[[FFNWeights, Any, torch.Generator], Tensor]


@dataclass(frozen=True)
class Criterion:
    """One importance criterion.

    Attributes:
        name: as on the command line.
        summary: the formula in one line.
        source: the paper, with section or equation.
        needs_activations: scores need `ActivationStats`, so calibration text.
        score: `(weights, stats, generator) -> [F]`.
    """

    name: str
    summary: str
    source: str
    needs_activations: bool
    score: Score

    def __call__(
        self, weights: FFNWeights, stats: ActivationStats | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Scores `[F]` (float64) of one FFN's neurons.

        Raises:
            InputError: the criterion needs activation statistics and got none.
        """
        check(stats is not None or not self.needs_activations, "stats", f"be given for method {self.name!r}", stats)
        return self.score(weights, stats, generator or torch.Generator().manual_seed(0)).double().cpu()


CRITERIA: dict[str, Criterion] = {}


def criterion(name: str, *, summary: str, source: str, needs_activations: bool = False) -> Callable[[Score], Score]:
    """Register the decorated score function under `name`."""

    def register(score: Score) -> Score:
        if name in CRITERIA:
            raise RuntimeError(f"two criteria are called {name!r}")
        CRITERIA[name] = Criterion(name, summary, source, needs_activations, score)
        return score

    return register
