"""Soft movement pruning: a threshold on the scores instead of a share, and a penalty that pushes them below it."""

from __future__ import annotations

from .base import Moment, method
from .movement import Movement


@method(
    "movement-soft",
    summary="movement, kept where sigmoid(s) > tau(t), with weight(t) * mean of sigmoid(s) added to the loss",
    source="Sanh et al. 2020, arXiv 2005.07683, section 4 (soft); of neurons: Lagunas et al. 2021, arXiv 2109.04838",
    needs=("gradient",),
    scope="layer",
    optimizer="adam",
    penalty=10.0,
)
class SoftMovement(Movement):
    """The penalty's weight decides how many neurons go; the schedule only says when.

    As in the public code, tau and the weight both grow by the schedule, from zero to their final values: each is its
    final value times the schedule's progress. Scores start at zero, sigmoid one half, and must fall to
    ln(tau / (1 - tau)), -2.2 for the usual 0.1: with `rate` 1e-2 and Adam that takes 220 steps at least, and plain
    gradient steps hardly get there.
    """

    def threshold(self, moment: Moment) -> float:
        return self.config.threshold * moment.progress
