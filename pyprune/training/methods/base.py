"""What a method of pruning during training is, and the table of them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...base.errors import check, is_number
from ...base.options import Option, Registry
from ...base.statistics import ActivationStats
from ...model.families import FFN

# The tensors a method keeps for one layer from step to step; `scores`, `[F]`, is among them.
State = dict[str, Tensor]


@dataclass(frozen=True)
class Moment:
    """Where training stands.

    Attributes:
        step: t, the optimizer steps taken before this one.
        keep: v(t), the share of neurons that the schedule keeps.
        progress: the share already removed, of all that is to be removed (`CubicSchedule.progress`).
        final: the share is the final one: the cut, or a step of the cool-down.
    """

    step: int
    keep: float
    progress: float
    final: bool = False


@dataclass(frozen=True)
class Gathered:
    """What one optimizer step showed of one layer.

    Attributes:
        ffn: the FFN; its parameters carry their gradients.
        layers: FFNs in the model.
        gradient: `[F]`, sum over tokens of a_tj * dL/da'_tj; None where no method asked for it.
        products: `[F, F]`, sum over tokens of a' a'^T; None where no method asked for it.
        statistics: of the step's batches; None where no criterion asked for them.
    """

    ffn: FFN
    layers: int
    gradient: Tensor | None = None
    products: Tensor | None = None
    statistics: ActivationStats | None = None


@dataclass(frozen=True)
class Method(Option):
    """A method: how scores start, and what one step does to them. The highest scores are kept.

    A method is a frozen dataclass of its own options under `@METHODS.add`; what it keeps between steps is a `State`.

    Attributes:
        NAME: as in the configuration.
        SUMMARY: the formula in one line.
        SOURCE: the paper, with section or equation.
        NEEDS: what must be gathered: `gradient`, `products`, or keys of `importance.base.NEEDS` for `statistics`.
        SCOPE: `layer` or `global`, as the method was published.
        WEIGHTS: it hands weights to a criterion, which wants them whole in each process.
        LEARNED: scores start equal and are learned, so a layer whose scores never moved was ranked by nothing.
    """

    SUMMARY: ClassVar[str]
    SOURCE: ClassVar[str]
    NEEDS: ClassVar[frozenset[str]] = frozenset()
    SCOPE: ClassVar[str] = "layer"
    WEIGHTS: ClassVar[bool] = False
    LEARNED: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """What this object needs: `NEEDS`, or what its options ask for."""
        return self.NEEDS

    @property
    def reads_weights(self) -> bool:
        """Whether this object hands weights to a criterion: `WEIGHTS`, or as its options ask."""
        return self.WEIGHTS

    def start(self, ffn: FFN, generator: torch.Generator) -> State:
        """The state of a layer before the first step."""
        weights = ffn.weights().down
        return {"scores": torch.zeros(weights.shape[0], dtype=torch.float32, device=weights.device)}

    def update(self, state: State, gathered: Gathered, moment: Moment) -> None:
        """Change `state` by what one optimizer step showed."""
        raise NotImplementedError

    def prepare(self, states: Sequence[State], moment: Moment, scope: str) -> list[Tensor] | None:
        """Called before every step, and before the cut, with the states of all layers.

        Args:
            states: of all layers; they may be changed.
            moment: of the step to come.
            scope: `layer` or `global`.

        Returns:
            What activations are multiplied by while training, one `[F]` a layer; None: the masks.
        """
        return None

    def cutoff(self, moment: Moment) -> float | None:
        """Keep where sigmoid(score) is above this; None: keep the share that the schedule says."""
        return None


METHODS: Registry[Method] = Registry("method")


def check_amount(value: object, argument: str, zero: bool = True) -> None:
    """Raise `InputError` unless `value` is finite and positive, or zero where that is allowed."""
    fits = is_number(value) and 0 <= value < math.inf and (zero or value > 0)  # type: ignore[operator]
    check(fits, argument, f"be {'non-negative' if zero else 'positive'} and finite", value)
