"""PLATON: sensitivity smoothed over steps, times how uncertain it was.

I_j = sum over the parameters w of neuron j (up and gate rows with their biases, down row) of abs(w * dL/dw); then mean
and uncertainty as in `ema.smoothed_score`. Paper and public code score single weights; the sum over the neuron comes
first here, as the average over groups does in its structured descendants. The public code takes I after the optimizer's
step, with the new weights and the clipped gradients; here before it, with the weights that the gradients belong to, and
clipped too where the loop clips. A removed neuron has no gradient, so its score only fades.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ...base.errors import check
from ...model.families import FFN
from ...model.weights import whole
from ..ema import check_beta, smoothed_score
from .base import METHODS, Gathered, Method, Moment, State


def neuron_sums(ffn: FFN, value: Callable[[Tensor], Tensor]) -> Tensor:
    """`[F]`: `value` of every parameter of the projections, elementwise, summed over the parameters of each neuron.

    The down bias belongs to no neuron.
    """
    size = ffn.intermediate_size
    total = torch.zeros(size, device=ffn.weights().down.device)
    for name, blocks in ffn.pattern.inputs:
        projection: Any = ffn.holder.get_submodule(name)
        # [blocks * F, D], or [D, blocks * F] in a Conv1D
        rows = whole(value(projection.weight).float().sum(int(not isinstance(projection, Conv1D))))
        total = total + rows.view(blocks, size).sum(0)
        if projection.bias is not None:
            total = total + whole(value(projection.bias).float()).view(blocks, size).sum(0)
    down: Any = ffn.down
    return total + whole(value(down.weight).float().sum(int(isinstance(down, Conv1D))))  # [D, F], or [F, D]


def sensitivity(ffn: FFN) -> Tensor:
    """`[F]`: abs(w * dL/dw) summed over each neuron's parameters.

    Raises:
        InputError: a parameter of the FFN has no gradient.
    """

    def product(parameter: Tensor) -> Tensor:
        rule = "have gradients: this method needs FFN weights that train, and a backward pass before `step`"
        check(parameter.grad is not None, f"weights of layer {ffn.layer}", rule, parameter.grad)
        assert parameter.grad is not None
        return (parameter.detach() * parameter.grad).abs()

    return neuron_sums(ffn, product)


@METHODS.add
@dataclass(frozen=True)
class Platon(Method):
    """The highest product of mean and uncertainty stays.

    Attributes:
        beta: b1, weight of the past in the smoothed sensitivity, in [0, 1).
        uncertainty_beta: b2, in its deviation from that.
    """

    NAME: ClassVar[str] = "platon"
    SUMMARY: ClassVar[str] = "EMA of sum abs(w dL/dw), times EMA of its deviation from that mean"
    SOURCE: ClassVar[str] = "Zhang et al. 2022, arXiv 2206.12562, section 3; summed over neurons"
    LEARNED: ClassVar[bool] = True

    beta: float = 0.85
    uncertainty_beta: float = 0.85

    def __post_init__(self) -> None:
        check_beta(self.beta, "beta")
        check_beta(self.uncertainty_beta, "uncertainty_beta")

    def update(self, state: State, gathered: Gathered, moment: Moment) -> None:
        state["scores"] = smoothed_score(state, sensitivity(gathered.ffn), self.beta, self.uncertainty_beta)
