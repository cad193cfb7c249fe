"""Mean absolute activation: how much a neuron speaks on calibration text, whatever its down row does with it."""

import torch
from torch import Tensor

from ...base.statistics import ActivationStats
from ...model.patterns import FFNWeights
from .base import criterion


@criterion(
    "activation",
    summary="mean over tokens of abs(a)",
    source="Hu et al. 2016, arXiv 1607.03250, section 2 (mean activation form)",
    needs=("activations",),
)
def activation(weights: FFNWeights, stats: ActivationStats, generator: torch.Generator) -> Tensor:
    return stats.abs_mean
