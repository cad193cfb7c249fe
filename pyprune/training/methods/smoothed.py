"""Any importance criterion, judged at every step by that step's batch, and smoothed over the steps.

At step t the criterion scores the neurons from the weights as they are and the statistics of the batch (see
`statistics`); then mean <- b mean + (1 - b) score, from zero, divided by 1 - b^t, so that from the first step on it is
a weighted mean of scores in the criterion's own unit. With `beta` 0 it is the score of the last batch alone.

PLATON smooths its sensitivity so (without the division, which changes no rank); here the score is any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...model.families import FFN
from ...pruning import importance
from ..ema import corrected
from .base import Gathered, Method, Moment, State, method

if TYPE_CHECKING:
    from ..config import TrainingConfig


@method(
    "smoothed",
    summary="bias-corrected EMA of any importance criterion over the steps' batches; beta 0 is the last batch alone",
    source="smoothing of Zhang et al. 2022, arXiv 2206.12562, section 3; correction of Kingma and Ba 2015, "
    "arXiv 1412.6980, section 3",
    scope="layer",
    criterion="taylor-neuron",
)
class SmoothedCriterion(Method):
    """`criterion` names the score, `beta` smooths it."""

    learned = True

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__(config)
        assert config.criterion is not None
        self._criterion = importance.get(config.criterion)
        self.needs = self._criterion.needs  # type: ignore[misc]  # of the criterion, not of the class

    def start(self, ffn: FFN, generator: torch.Generator) -> State:
        # The same numbers at every step, or a mean of random orders would forget each of them.
        return {**super().start(ffn, generator), "seed": torch.tensor(generator.initial_seed())}

    def update(self, state: State, gathered: Gathered, moment: Moment) -> None:
        generator = torch.Generator().manual_seed(int(state["seed"]))
        now = self._criterion(gathered.ffn.weights(), gathered.statistics, generator)
        state["scores"] = corrected(state, now.to(state["scores"]), self.config.beta)
