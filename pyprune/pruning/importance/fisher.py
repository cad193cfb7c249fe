"""Second order by the empirical Fisher information: squared gradients of single samples stand for the Hessian.

With a mask m_j on the neuron (a_j becomes m_j a_j), dL/dm_j at m_j = 1 is sum_t a_tj * dL/da_tj, and to second order
the loss rises by half its mean square when the neuron goes; `fisher` leaves the factor 1/2 out, as both papers do.
`obd` sums the same over the neuron's single weights instead, as if their effects added up.
"""

import torch
from torch import Tensor

from ...base.statistics import ActivationStats
from ...model.patterns import FFNWeights
from .base import criterion, gradients


@criterion(
    "fisher",
    summary="mean over samples of (dL/dm_j)^2, m_j a mask on a_j",
    source="Kwon et al. 2022, arXiv 2204.09656, section 4; gates of Molchanov et al. 2019, arXiv 1906.10771, section 3",
    needs=("gradients",),
)
def fisher(weights: FFNWeights, stats: ActivationStats, generator: torch.Generator) -> Tensor:
    return gradients(stats).mask_square


@criterion(
    "obd",
    summary="sum over all weights of w^2 * f / 2, f = mean over samples of (dL/dw)^2",
    source="LeCun et al. 1990, https://papers.nips.cc/paper/250-optimal-brain-damage (diagonal OBD); "
    "Hessian by the empirical Fisher as Theis et al. 2018, arXiv 1801.05787",
    needs=("gradients2",),
)
def obd(weights: FFNWeights, stats: ActivationStats, generator: torch.Generator) -> Tensor:
    squares = gradients(stats).parts_square
    terms = zip(weights.parts, squares, strict=True)
    return sum(((w.double().square() * f).sum(1) / 2 for w, f in terms), torch.zeros(()))
