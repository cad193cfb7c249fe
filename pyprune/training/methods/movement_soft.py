"""Soft movement pruning: a threshold on the scores instead of a share, and a penalty that pushes them below it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...base.errors import check, is_number
from .base import METHODS, Moment
from .movement import Movement


@METHODS.add
@dataclass(frozen=True)
class MovementSoft(Movement):
    """The penalty's weight decides how many neurons go; the schedule only says when.

    As in the public code, tau and the weight both grow by the schedule, from zero to their final values: each is its
    final value times the schedule's progress. Scores start at zero, sigmoid one half, and must fall to
    ln(tau / (1 - tau)), -2.2 for the usual 0.1: with `score_rate` 1e-2 and Adam that takes 220 steps at least, and
    plain gradient steps hardly get there.

    Attributes:
        threshold: tau, in (0, 1).
    """

    NAME: ClassVar[str] = "movement-soft"
    SUMMARY: ClassVar[str] = (
        "movement, kept where sigmoid(s) > tau(t), with weight(t) * mean of sigmoid(s) added to the loss"
    )
    SOURCE: ClassVar[str] = (
        "Sanh et al. 2020, arXiv 2005.07683, section 4 (soft); of neurons: Lagunas et al. 2021, arXiv 2109.04838"
    )

    optimizer: str = "adam"
    penalty: float = 10.0
    threshold: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(is_number(self.threshold) and 0 < self.threshold < 1, "threshold", "lie in (0, 1)", self.threshold)

    def cutoff(self, moment: Moment) -> float:
        return self.threshold * moment.progress
