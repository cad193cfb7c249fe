"""Random scores: the baseline that every method has to beat (Santacroce et al. 2023, arXiv 2302.03773)."""

import torch
from torch import Tensor

from ...base.statistics import ActivationStats
from ...model.patterns import FFNWeights
from .base import criterion


@criterion("random", summary="uniform in [0, 1), seeded", source="baseline; Santacroce et al. 2023, arXiv 2302.03773")
def random(weights: FFNWeights, stats: ActivationStats | None, generator: torch.Generator) -> Tensor:
    return torch.rand(weights.down.shape[0], generator=generator, dtype=torch.float64)
