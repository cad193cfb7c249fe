"""What a criterion gets and gives, and the table of them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import check
from ..patterns import FFNWeights


@dataclass(frozen=True)
class GradientStats:
    """How the dense model's loss depends on one FFN's neurons and weights (see `gradients.collect`).

    L is the mean next-token cross entropy of a sample (a window), in nats; a_tj is what enters the down projection.

    Attributes:
        samples, tokens: windows, and tokens in all of them.
        neuron_taylor: `[F]`, mean over tokens of abs(a_tj * dL/da_tj).
        mask_square: `[F]`, mean over samples of (sum_t a_tj * dL/da_tj) squared.
        sample_taylor: `[F]`, mean over samples of abs(sum over the neuron's parameters of w * dL/dw), biases included.
        parts: (gate, up, down) or (up, down), each `[F, D]`: dL/dw of the mean loss over samples; () if nobody asked.
        parts_square: the same of the squared dL/dw of each sample, mean over samples; () if nobody asked.
    """

    samples: int
    tokens: int
    neuron_taylor: Tensor
    mask_square: Tensor
    sample_taylor: Tensor
    parts: tuple[Tensor, ...] = ()
    parts_square: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class ActivationStats:
    """Moments over calibration tokens of what enters the down projection: a_tj, token t, neuron j.

    Attributes:
        tokens: T.
        mean, abs_mean: `[F]`, means over t of a and of abs(a).
        square_sum: `[F]`, sum over t of a squared.
        gram: `[F, F]`, sum over t of a a^T, or None when nobody asked for it. Float64 like the rest.
        gradients: of the dense model, or None when nobody asked for them.
        cross: `[F, D]`, sum over t of a e^T, where e is what the dense model's hidden state after the layer has more
            than this one's with all its neurons; None when nobody asked for it.
        held_out: the last quarter of the windows alone: only `gram` and `cross` are of them; None as above.
    """

    tokens: int
    mean: Tensor
    abs_mean: Tensor
    square_sum: Tensor
    gram: Tensor | None = None
    gradients: GradientStats | None = None
    cross: Tensor | None = None
    held_out: ActivationStats | None = None

    @property
    def norm(self) -> Tensor:
        """`[F]`, L2 norm over tokens."""
        return self.square_sum.sqrt()

    @property
    def variance(self) -> Tensor:
        """`[F]`, population variance over tokens."""
        return (self.square_sum / self.tokens - self.mean.square()).clamp_min(0.0)


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
