"""Any importance criterion, judged at every step by that step's batch, and smoothed over the steps.

At step t the criterion scores the neurons from the weights as they are and the statistics of the batch (see
`statistics`); then mean <- b mean + (1 - b) score, from zero, divided by 1 - b^t, so that from the first step on it is
a weighted mean of scores in the criterion's own unit. With `beta` 0 it is the score of the last batch alone.

PLATON smooths its sensitivity so (without the division, which changes no rank); here the score is any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...base.errors import check_choice
from ...model.families import FFN
from ...pruning import importance
from ..ema import check_beta, corrected
from .base import METHODS, Gathered, Method, Moment, State


@METHODS.add
@dataclass(frozen=True)
class Smoothed(Method):
    """The highest smoothed score stays.

    Attributes:
        criterion: the score, an importance criterion (`pyprune.pruning.importance.names()`).
        beta: weight of the past, in [0, 1).
    """

    WEIGHTS: ClassVar[bool] = True
    NAME: ClassVar[str] = "smoothed"
    SUMMARY: ClassVar[str] = (
        "bias-corrected EMA of any importance criterion over the steps' batches; beta 0 is the last batch alone"
    )
    SOURCE: ClassVar[str] = (
        "smoothing of Zhang et al. 2022, arXiv 2206.12562, section 3; correction of Kingma and Ba 2015, "
        "arXiv 1412.6980, section 3"
    )
    LEARNED: ClassVar[bool] = True

    criterion: str = "taylor-neuron"
    beta: float = 0.85

    def __post_init__(self) -> None:
        check_choice(self.criterion, "criterion", importance.names())
        check_beta(self.beta, "beta")

    @property
    def needs(self) -> frozenset[str]:
        return importance.get(self.criterion).needs

    def start(self, ffn: FFN, generator: torch.Generator) -> State:
        # The same numbers at every step, or a mean of random orders would forget each of them.
        return {**super().start(ffn, generator), "seed": torch.tensor(generator.initial_seed())}

    def update(self, state: State, gathered: Gathered, moment: Moment) -> None:
        generator = torch.Generator().manual_seed(int(state["seed"]))
        now = importance.get(self.criterion)(gathered.ffn.weights(), gathered.statistics, generator)
        state["scores"] = corrected(state, now.to(state["scores"]), self.beta)
