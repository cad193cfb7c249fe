"""First and second order Taylor expansions of the loss: what it would change if a neuron, or its weights, were zero.

`taylor-neuron` takes every token as an example of its own; Molchanov et al. average over the positions of a feature map
before the absolute value, and divide by the layer's L2 norm for a global cut, which is left to the allocation.

LLM-Pruner's group of an FFN neuron is its gate row, up row and down row. For `taylor-vector` a structure is one of
these rows, in the paper as in the public code, and the group's importance the sum of its structures' (of the paper's
four aggregations the code's default); so products cancel within a row only. `taylor-element2` is the paper's formula,
with the Hessian's diagonal as the mean over samples of the squared gradient. That is the public code's `param_mix`; its
`param_second` leaves the first order out. Biases are left out, as there.

`sensitivity` differs from `taylor-vector` in three ways: the absolute value is taken of each sample and not of the mean
gradient, of the neuron as a whole, and input biases are counted, as in the public code (which also turns values that
are not finite into zeros; here they are refused).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...base.statistics import ActivationStats
from ...model.patterns import FFNWeights
from .base import criterion, gradients

_LLM_PRUNER = "Ma et al. 2023, arXiv 2305.11627, section 3.2"


def _products(weights: FFNWeights, stats: ActivationStats) -> Iterator[Tensor]:
    """`[F, D]` of each part: w * dL/dw."""
    for w, g in zip(weights.parts, gradients(stats).parts, strict=True):
        yield w.double() * g


@criterion(
    "taylor-neuron",
    summary="mean over tokens of abs(a_tj * dL/da_tj)",
    source="Molchanov et al. 2016, arXiv 1611.06440, section 2.2 (Taylor expansion), a token as an example",
    needs=("gradients",),
)
def taylor_neuron(weights: FFNWeights, stats: ActivationStats, generator: torch.Generator) -> Tensor:
    return gradients(stats).neuron_taylor


@criterion(
    "taylor-vector",
    summary="sum over gate, up and down row of abs(sum over the row of w * dL/dw)",
    source=f"{_LLM_PRUNER}, vector-wise, first order",
    needs=("gradients",),
)
def taylor_vector(weights: FFNWeights, stats: ActivationStats, generator: torch.Generator) -> Tensor:
    return sum((p.sum(1).abs() for p in _products(weights, stats)), torch.zeros(()))


@criterion(
    "taylor-element",
    summary="sum over all weights of abs(w * dL/dw)",
    source=f"{_LLM_PRUNER}, element-wise, first order",
    needs=("gradients",),
)
def taylor_element(weights: FFNWeights, stats: ActivationStats, generator: torch.Generator) -> Tensor:
    return sum((p.abs().sum(1) for p in _products(weights, stats)), torch.zeros(()))


@criterion(
    "taylor-element2",
    summary="sum over all weights of abs(w * g - w^2 * f / 2), g = dL/dw, f = mean over samples of g^2",
    source=f"{_LLM_PRUNER}, element-wise, second order",
    needs=("gradients", "gradients2"),
)
def taylor_element2(weights: FFNWeights, stats: ActivationStats, generator: torch.Generator) -> Tensor:
    squares = gradients(stats).parts_square
    terms = zip(weights.parts, _products(weights, stats), squares, strict=True)
    return sum(((p - w.double().square() * f / 2).abs().sum(1) for w, p, f in terms), torch.zeros(()))


@criterion(
    "sensitivity",
    summary="mean over samples of abs(sum over all weights and input biases of w * dL/dw)",
    source="Santacroce et al. 2023, arXiv 2302.03773, section on redundancy (sensitivity)",
    needs=("gradients",),
)
def sensitivity(weights: FFNWeights, stats: ActivationStats, generator: torch.Generator) -> Tensor:
    return gradients(stats).sample_taylor
