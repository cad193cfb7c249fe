"""FLAP's fluctuation: a neuron that hardly varies can be replaced by its mean, so its variance is what counts."""

import torch
from torch import Tensor

from ...base.statistics import ActivationStats
from ...model.patterns import FFNWeights
from .base import criterion


@criterion(
    "flap",
    summary="Var over tokens of a_j * squared L2 norm of the down row V_j",
    source="An et al. 2023, arXiv 2312.11983, section 3 (WIFV metric)",
    needs=("activations",),
)
def flap(weights: FFNWeights, stats: ActivationStats, generator: torch.Generator) -> Tensor:
    return stats.variance.cpu() * weights.down.double().square().sum(1).cpu()
