"""Movement pruning: a neuron that the loss moves away from zero rises, one that it moves towards zero falls.

Scores are learned beside the weights, s <- s - rate * dL/ds, with the straight-through gradient of the mask in place of
dL/ds. Paper and public code give every weight or block of weights a score and mask the weights; here a neuron has one
score and its activation is masked, so that dL/ds_j = sum_t a_tj dL/da'_tj = sum_i V_ji dL/dV_ji: movement of the down
row. (The public code masks the rows of the up projection too, and so adds their movement.) The paper descends by plain
gradient steps; the public codes of Lagunas et al. and Santacroce et al. by AdamW without decay: `optimizer` has both.

The published score is the sum of all steps' movements, so what a noisy batch said never fades. With `beta` below 1 it
does, s <- beta s - rate * dL/ds, and the scores are an exponential moving average of the movement (times a constant,
which changes no rank); with 0 the last batch alone decides.

All scores start at zero, so the first neurons to go are those that few and early batches were against. With a
`criterion` they start from its ranks instead: in the steps before anything is removed it scores the neurons from the
weights and the batch at hand, the scores are summed, and neuron j of F stands at

    s_j = spread * ((rank of its sum in the layer, from 0) / (F - 1) - 1/2) + what movement has added

as it does from then on. Ranks, for the scores of a criterion have a unit of their own in each layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...base.errors import check, check_choice, is_number
from ...model.families import FFN
from ...pruning import importance
from .base import METHODS, Gathered, Method, Moment, State, check_amount

OPTIMIZERS = ("sgd", "adam")


def penalty_gradient(scores: Tensor, weight: float, layers: int) -> Tensor:
    """`[F]`, d/ds of weight * mean over layers of mean over neurons of sigmoid(s): an L1 norm of the soft mask."""
    soft = scores.sigmoid()
    return (weight / (scores.numel() * layers)) * soft * (1 - soft)


@METHODS.add
@dataclass(frozen=True)
class Movement(Method):
    """Scores learned by descent; `gradient` is what the variants change.

    Attributes:
        optimizer: of the scores: `sgd`, or `adam` without weight decay.
        score_rate: its learning rate, which does not change while training.
        penalty: weight of mean(sigmoid(s)) in the loss, once the schedule is through.
        beta: weight of the past in the scores, in [0, 1]; 1 sums it all, as published.
        criterion: an importance criterion (`pyprune.pruning.importance.names()`) whose ranks scores start from; None:
            they start equal.
        spread: how far apart the first and the last rank start; a step of Adam moves a score by `score_rate`.
    """

    NAME: ClassVar[str] = "movement"
    SUMMARY: ClassVar[str] = "s <- beta s - rate * sum_t a_j dL/da'_j; top v of the scores"
    SOURCE: ClassVar[str] = (
        "Sanh et al. 2020, arXiv 2005.07683, section 4 (hard); of neurons: Lagunas et al. 2021, arXiv 2109.04838"
    )
    NEEDS: ClassVar[frozenset[str]] = frozenset({"gradient"})
    LEARNED: ClassVar[bool] = True

    optimizer: str = "sgd"
    score_rate: float = 1e-2
    penalty: float = 0.0
    beta: float = 1.0
    criterion: str | None = None
    spread: float = 0.5

    def __post_init__(self) -> None:
        check_choice(self.optimizer, "optimizer", OPTIMIZERS)
        check_amount(self.score_rate, "score_rate", zero=False)
        check_amount(self.penalty, "penalty")
        check(is_number(self.beta) and 0 <= self.beta <= 1, "beta", "lie in [0, 1]", self.beta)
        check_amount(self.spread, "spread")
        if self.criterion is not None:
            check_choice(self.criterion, "criterion", importance.names())

    @property
    def needs(self) -> frozenset[str]:
        return self.NEEDS if self.criterion is None else self.NEEDS | importance.get(self.criterion).needs

    @property
    def reads_weights(self) -> bool:
        return self.criterion is not None

    def start(self, ffn: FFN, generator: torch.Generator) -> State:
        state = super().start(ffn, generator)
        # The same numbers at every step, or a sum of random orders would forget each of them.
        return state if self.criterion is None else {**state, "seed": torch.tensor(generator.initial_seed())}

    def gradient(self, state: State, gathered: Gathered, moment: Moment) -> Tensor:
        """`[F]`, dL/ds with the penalty's part."""
        assert gathered.gradient is not None
        weight = self.penalty * moment.progress
        return gathered.gradient.float() + penalty_gradient(state["scores"], weight, gathered.layers)

    def update(self, state: State, gathered: Gathered, moment: Moment) -> None:
        gradient = self.gradient(state, gathered, moment)
        if self.optimizer == "adam":
            gradient = adam(state, gradient, moment.step + 1)
        state["scores"] = self.beta * state["scores"] - self.score_rate * gradient
        if self.criterion is not None and (moment.progress == 0 or moment.step == 0):
            generator = torch.Generator().manual_seed(int(state["seed"]))
            now = importance.get(self.criterion)(gathered.ffn.weights(), gathered.statistics, generator)
            now = now.to(state["scores"].device)
            total = state["judged"] = state.get("judged", torch.zeros_like(now)) + now
            ranks = total.argsort(stable=True).argsort().to(state["scores"])
            place = self.spread * (ranks / max(1, len(ranks) - 1) - 0.5)
            state["scores"] = state["scores"] + place - self.beta * state.get("place", torch.zeros_like(place))
            state["place"] = place


def adam(state: State, gradient: Tensor, count: int, of: str = "", b1: float = 0.9, b2: float = 0.999) -> Tensor:
    """The direction of Adam's update number `count` (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1).

    Args:
        state: holds the moments between updates, as `of` + `first` and `of` + `second`.
        gradient: of any shape.
        count: from 1.
        of: whose moments they are, where a state has several.
        b1, b2: weights of the past.
    """
    zeros = torch.zeros_like(gradient)
    first = state[f"{of}first"] = b1 * state.get(f"{of}first", zeros) + (1 - b1) * gradient
    second = state[f"{of}second"] = b2 * state.get(f"{of}second", zeros) + (1 - b2) * gradient.square()
    return (first / (1 - b1**count)) / ((second / (1 - b2**count)).sqrt() + 1e-8)
