"""Globally Unique Movement: movement with one cut over all layers, and a push against neurons that are alike.

Of two neurons that speak alike both are pushed down, and the one that the loss needs more survives. A neuron's
similarity is the mean of abs(cos) with the neurons kept,

    C <- b C + (1 - b) sum over the batch's tokens of a' a'^T;   sim_ij = abs(C_ij) / sqrt(C_ii C_jj), zero diagonal
    similarity_i = sum_j sim_ij / (F v(t)),

and the penalty of movement on sigmoid(s_i) is multiplied by 1 + lambda * similarity_i. The activations are the masked
ones, as in the public code: removed neurons are like nothing.

Where the public code differs from this: its b is 0.001, so the last batch is nearly alone; the penalty takes the
similarities of the step before; its weight falls from weight / v_f to weight as v(t) falls, while here it grows with
the share removed; the penalty is divided by all masked modules instead of by layers; the score gradient has the
movement of the up row too. Its second form subtracts lambda * similarity / norm(ds) from the score gradient ds, which
under descent lifts neurons that are alike; the `gradient` form here adds lambda * similarity * norm(ds), so the push
has the size of the gradient and the sign of the penalty. Its inverted ablation writes max - multiplier to a name that
nothing reads; here `inverted` does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...base.errors import check, check_choice
from ..ema import check_beta, smooth
from .base import METHODS, Gathered, Moment, State, check_amount
from .movement import Movement, penalty_gradient

FORMS = ("penalty", "gradient")


def similarity(products: Tensor, keep: float) -> Tensor:
    """`[F]`: sum over the other neurons of abs(cos), over F * `keep`; zero for a neuron that was silent.

    Args:
        products: C, `[F, F]`, running sums of products of neurons; its diagonal are the squared norms.
        keep: v(t).
    """
    norms = products.diagonal()
    scale = torch.where(norms > 0, norms, torch.inf).rsqrt()
    cosines = products.abs() * scale[:, None] * scale
    cosines.fill_diagonal_(0.0)
    return cosines.sum(1) / (products.shape[0] * keep)


@METHODS.add
@dataclass(frozen=True)
class Gum(Movement):
    """Movement of the whole model's neurons, those alike pushed down.

    Attributes:
        similarity: lambda.
        similarity_beta: weight of the past in the running sums, in [0, 1).
        uniqueness_form: `penalty`, or `gradient`, which pushes the score gradient itself.
        inverted: an ablation: push the neurons that are unlike the others.
    """

    NAME: ClassVar[str] = "gum"
    SUMMARY: ClassVar[str] = "movement, global top v, penalty on sigmoid(s_i) times 1 + lambda * similarity_i"
    SOURCE: ClassVar[str] = "Santacroce et al. 2023, arXiv 2302.03773; public code santacml/nn_pruning_uniqueness"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"gradient", "products"})
    SCOPE: ClassVar[str] = "global"

    penalty: float = 2.0
    similarity: float = 1.0
    similarity_beta: float = 0.9
    uniqueness_form: str = "penalty"
    inverted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount(self.similarity, "similarity")
        check_beta(self.similarity_beta, "similarity_beta")
        check_choice(self.uniqueness_form, "uniqueness_form", FORMS)
        check(isinstance(self.inverted, bool), "inverted", "be true or false", self.inverted)

    def gradient(self, state: State, gathered: Gathered, moment: Moment) -> Tensor:
        assert gathered.gradient is not None
        if gathered.products is not None:  # None where the layer saw no token
            smooth(state, "products", gathered.products.float(), self.similarity_beta)
        push = torch.zeros_like(state["scores"])
        if "products" in state:
            push = self.similarity * similarity(state["products"], moment.keep)
        if self.inverted:
            push = push.max() - push
        movement = gathered.gradient.float()
        penalty = penalty_gradient(state["scores"], self.penalty * moment.progress, gathered.layers)
        if self.uniqueness_form == "gradient":
            return movement + push * movement.norm() + penalty
        return movement + penalty * (1 + push)
