"""What a method of pruning during training is, and the table of them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...base.statistics import ActivationStats
from ...model.families import FFN

if TYPE_CHECKING:
    from ..config import TrainingConfig

# The tensors a method keeps for one layer from step to step; `scores`, `[F]`, is among them.
State = dict[str, Tensor]


@dataclass(frozen=True)
class Moment:
    """Where training stands.

    Attributes:
        step: t, the optimizer steps taken before this one.
        keep: v(t), the share of neurons that the schedule keeps.
        progress: the share already removed, of all that is to be removed (`CubicSchedule.progress`).
    """

    step: int
    keep: float
    progress: float


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


class Method:
    """A method: how scores start, and what one step does to them. The highest scores are kept.

    Attributes:
        name: as in the configuration.
        summary: the formula in one line.
        source: the paper, with section or equation.
        needs: what must be gathered: `gradient`, `products`, or keys of `importance.base.NEEDS` for `statistics`.
        learned: scores start equal and are learned, so a layer whose scores never moved was ranked by nothing.
        defaults: values of `TrainingConfig` fields that the user left open.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    learned: ClassVar[bool] = False
    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config

    def start(self, ffn: FFN, generator: torch.Generator) -> State:
        """The state of a layer before the first step."""
        weights = ffn.weights().down
        return {"scores": torch.zeros(weights.shape[0], dtype=torch.float32, device=weights.device)}

    def update(self, state: State, gathered: Gathered, moment: Moment) -> None:
        """Change `state` by what one optimizer step showed."""
        raise NotImplementedError

    def threshold(self, moment: Moment) -> float | None:
        """Keep where sigmoid(score) is above this; None: keep the share that the schedule says."""
        return None


METHODS: dict[str, type[Method]] = {}


def method(
    name: str, *, summary: str, source: str, needs: tuple[str, ...] = (), **defaults: Any
) -> Callable[[type[Method]], type[Method]]:
    """Register the decorated class under `name`; `defaults` for configuration fields that the user leaves open."""

    def register(cls: type[Method]) -> type[Method]:
        if name in METHODS:
            raise RuntimeError(f"two methods are called {name!r}")
        cls.name, cls.summary, cls.source, cls.needs, cls.defaults = name, summary, source, frozenset(needs), defaults
        METHODS[name] = cls
        return cls

    return register
