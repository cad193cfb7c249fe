"""Smoothed sensitivity without PLATON's uncertainty: the exponential moving average alone."""

from __future__ import annotations

from ..ema import smoothed_score
from .base import Gathered, Method, Moment, State, method
from .platon import sensitivity


@method(
    "ema",
    summary="EMA of sum abs(w dL/dw); beta 0 is the sensitivity of the last batch",
    source="Zhang et al. 2022, arXiv 2206.12562, section 3, its first half; summed over neurons",
    scope="layer",
)
class SmoothedSensitivity(Method):
    """`beta` smooths the sensitivity."""

    learned = True

    def update(self, state: State, gathered: Gathered, moment: Moment) -> None:
        state["scores"] = smoothed_score(state, sensitivity(gathered.ffn), self.config.beta, None)
