"""Wanda for neurons (Wanda-sp): weight magnitude times activation norm, summed over a neuron's down row."""

import torch
from torch import Tensor

from ...base.statistics import ActivationStats
from ...model.patterns import FFNWeights
from .base import criterion


@criterion(
    "wanda",
    summary="sum_i abs(V_ji) * L2 norm over tokens of a_j",
    source="Sun et al. 2023, arXiv 2306.11695, eq. 1; neuron form as in FLAP's baselines (An et al. 2023)",
    needs=("activations",),
)
def wanda(weights: FFNWeights, stats: ActivationStats, generator: torch.Generator) -> Tensor:
    return weights.down.double().abs().sum(1).cpu() * stats.norm.cpu()
