"""PLATON: sensitivity smoothed over steps, times how uncertain it was.

I_j = sum over the parameters w of neuron j (up and gate rows with their biases, down row) of abs(w * dL/dw); then mean
and uncertainty as in `ema.smoothed_score`. Paper and public code score single weights; the sum over the neuron comes
first here, as the average over groups does in its structured descendants. The public code takes I after the optimizer's
step, with the new weights and the clipped gradients; here before it, with the weights that the gradients belong to, and
clipped too where the loop clips. A removed neuron has no gradient, so its score only fades.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ...base.errors import check
from ...model.families import FFN
from ..ema import smoothed_score
from .base import Gathered, Method, Moment, State, method


def neuron_sums(ffn: FFN, value: Callable[[Tensor], Tensor]) -> Tensor:
    """`[F]`: `value` of every parameter of the projections, elementwise, summed over the parameters of each neuron.

    The down bias belongs to no neuron.
    """
    size = ffn.intermediate_size
    total = torch.zeros(size, device=ffn.weights().down.device)
    for name, blocks in ffn.pattern.inputs:
        projection: Any = ffn.holder.get_submodule(name)
        # [blocks * F, D], or [D, blocks * F] in a Conv1D
        total = total + value(projection.weight).float().sum(int(not isinstance(projection, Conv1D))).view(
            blocks, size
        ).sum(0)
        if projection.bias is not None:
            total = total + value(projection.bias).float().view(blocks, size).sum(0)
    down: Any = ffn.down
    return total + value(down.weight).float().sum(int(isinstance(down, Conv1D)))  # [D, F], or [F, D] in a Conv1D


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


@method(
    "platon",
    summary="EMA of sum abs(w dL/dw), times EMA of its deviation from that mean",
    source="Zhang et al. 2022, arXiv 2206.12562, section 3; summed over neurons",
    scope="layer",
)
class Platon(Method):
    """`beta` smooths the sensitivity (b1), `uncertainty_beta` its deviation (b2)."""

    learned = True

    def update(self, state: State, gathered: Gathered, moment: Moment) -> None:
        config = self.config
        state["scores"] = smoothed_score(state, sensitivity(gathered.ffn), config.beta, config.uncertainty_beta)
