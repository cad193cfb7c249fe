"""Smoothed sensitivity without PLATON's uncertainty: the exponential moving average alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ema import check_beta, smoothed_score
from .base import METHODS, Gathered, Method, Moment, State
from .platon import sensitivity


@METHODS.add
@dataclass(frozen=True)
class Ema(Method):
    """The highest smoothed sensitivity stays.

    Attributes:
        beta: weight of the past, in [0, 1).
    """

    NAME: ClassVar[str] = "ema"
    SUMMARY: ClassVar[str] = "EMA of sum abs(w dL/dw); beta 0 is the sensitivity of the last batch"
    SOURCE: ClassVar[str] = "Zhang et al. 2022, arXiv 2206.12562, section 3, its first half; summed over neurons"
    LEARNED: ClassVar[bool] = True

    beta: float = 0.85

    def __post_init__(self) -> None:
        check_beta(self.beta, "beta")

    def update(self, state: State, gathered: Gathered, moment: Moment) -> None:
        state["scores"] = smoothed_score(state, sensitivity(gathered.ffn), self.beta, None)
